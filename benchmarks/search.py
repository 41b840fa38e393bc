"""Searching a million photos: time, recall and memory, beside other libraries.

    pip install -e '.[search]' faiss-cpu sentence-transformers
    python benchmarks/search.py [--rows=1000000] [--dim=512] [--engines=xlir,faiss-ivf]
    python benchmarks/search.py --photos=PHOTOS.npy --queries=QUERIES.npy

Every library builds its index in one process and searches in a new one, one query at a time. The
table shows how long building took (storing the rows included), and the largest memory (VmHWM) of
the process that searches. For each kind of query, it shows the median and the 95th percentile of
the time, and the share of the ten nearest rows that were found. The last line is the same as JSON.
The share of the processors' time that other programs took tells whether the times can be trusted.

Without --photos, the rows are drawn around 2,000 random topics. With --photos, each row is the
embedding of a photo plus half the difference of two others' embeddings, so that rows are spread as
real photos are. Rows of one topic, or of one photo, follow each other, as photos of a folder do.
The embeddings are rounded to 16 bits, and the true neighbours are those that faiss.IndexFlatIP
finds among the rounded embeddings.

A filter by days keeps rows that are independent of the embeddings. A filter by folder keeps rows
that lie together, so nearly always all of them are far from the query, or all are near it.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

TOPICS, CHUNK, NEAREST = 2000, 50_000, 10
# The photos were taken on DAYS days from 1990 on. They lie in YEARS folders, which together hold
# EVENTS folders.
DAYS, YEARS, EVENTS = 10_000, 10, 1000
QUERIES, FILTERED = 300, 40
ENGINES = ("xlir", "faiss-ivf", "faiss-ivf-sq8", "sentence-transformers", "faiss-hnsw")
# Shares of the rows that a filter keeps.
SHARES = (0.1, 0.01, 0.001, 0.0001)
LEAST_RECALL = 0.97


def days_of(rows: int) -> np.ndarray:
    """The day of each row, independent of its embedding."""
    return np.random.default_rng(7).permutation(rows) * DAYS // rows


def filters_of(rows: int) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Kind of query -> pairs: a filter and the rows that it keeps."""
    generator, days, numbers = np.random.default_rng(8), days_of(rows), np.arange(rows)
    kinds: dict[str, list[tuple[str, np.ndarray]]] = {}
    for share in SHARES:
        length = round(share * DAYS)
        kinds[f"days, {share:.2%} of rows"] = []
        for first in generator.integers(DAYS - length + 1, size=FILTERED):
            kept = np.flatnonzero((days >= first) & (days < first + length))
            start, end = (np.datetime64("1990-01-01") + day for day in (first, first + length - 1))
            kinds[f"days, {share:.2%} of rows"].append((f"taken {start}..{end}", kept))
    for name, parts in (("year", YEARS), ("event", EVENTS)):
        kinds[f"folder, {1 / parts:.2%} of rows"] = [
            (f"folder {name}{part}", np.flatnonzero(numbers * parts // rows == part))
            for part in generator.integers(parts, size=FILTERED)
        ]
    return kinds


class Data:
    """The rows and queries of a run, in a folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.shape = tuple(json.loads((folder / "shape.json").read_text()))
        self.queries = np.load(folder / "queries.npy")

    def chunks(self):
        """Yields (first row, rows as float32), in order."""
        rows, dim = self.shape
        with open(self.folder / "vectors.bin", "rb") as file:
            for start in range(0, rows, CHUNK):
                part = np.fromfile(file, np.float16, min(CHUNK, rows - start) * dim)
                yield start, part.reshape(-1, dim).astype(np.float32)

    def all(self) -> np.ndarray:
        """All rows, of unit length."""
        vectors = np.empty(self.shape, np.float32)
        for start, part in self.chunks():
            vectors[start : start + len(part)] = unit(part)
        return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Writes the data and the true neighbours."""
    rows, dim = options.rows, options.dim
    generator = np.random.default_rng(0)
    if options.photos:
        photos = np.load(options.photos).astype(np.float32)
        queries = np.load(options.queries).astype(np.float32)
        dim = photos.shape[1]
        queries = queries[generator.choice(len(queries), QUERIES, replace=False)]

        def draw(origin: np.ndarray) -> np.ndarray:
            others = generator.integers(len(photos), size=(2, len(origin)))
            return photos[origin] + 0.5 * (photos[others[0]] - photos[others[1]])

        origins = len(photos)
    else:
        # Each dimension varies less than the one before, as in trained embeddings.
        scale = (1 + np.arange(dim, dtype=np.float32)) ** -0.4
        centers = generator.normal(size=(TOPICS, dim)).astype(np.float32)
        origins = TOPICS

        def draw(origin: np.ndarray) -> np.ndarray:
            noise = generator.standard_normal((len(origin), dim), np.float32)
            return scale * (centers[origin] + noise)

        queries = draw(generator.integers(origins, size=QUERIES))
    with open(folder / "vectors.bin", "wb") as file:
        for start in range(0, rows, CHUNK):
            origin = np.arange(start, min(start + CHUNK, rows)) * origins // rows
            unit(draw(origin)).astype(np.float16).tofile(file)
    np.save(folder / "queries.npy", unit(queries))
    (folder / "shape.json").write_text(json.dumps([rows, dim]))
    truth(Data(folder))


def truth(data: Data) -> None:
    """Writes the nearest rows of each query, for each kind of filter."""
    import faiss

    vectors, found = data.all(), {}
    flat = faiss.IndexFlatIP(data.shape[1])
    flat.add(vectors)
    found["all rows"] = flat.search(data.queries, NEAREST)[1]
    del flat
    for kind, pairs in filters_of(data.shape[0]).items():
        nearest = []
        for query, (_, kept) in zip(data.queries, pairs, strict=False):
            part = faiss.IndexFlatIP(data.shape[1])
            part.add(vectors[kept])
            places = part.search(query[None], NEAREST)[1][0]
            nearest.append(np.where(places < 0, -1, kept[places]))
        found[kind] = np.stack(nearest)
    np.savez(data.folder / "truth.npz", **found)


def asked(data: Data, search, kinds=("all rows",), queries: int = QUERIES) -> dict[str, dict]:
    """Times `search(query, filter, kept rows) -> rows`, and compares with the truth."""
    filtered, results = filters_of(data.shape[0]), {}
    with np.load(data.folder / "truth.npz") as nearest:
        for kind in kinds:
            pairs = filtered.get(kind, [("", None)] * queries)
            seconds, right = [], []
            for number, (where, kept) in enumerate(pairs):
                query = data.queries[number]
                start = time.perf_counter()
                rows = search(query, where, kept)
                seconds.append(time.perf_counter() - start)
                true = set(nearest[kind][number].tolist()) - {-1}
                right.append(len(true.intersection(rows)) / len(true))
            p50, p95 = np.percentile(seconds, (50, 95)) * 1000
            results[kind] = {"p50": p50, "p95": p95, "recall": float(np.mean(right))}
    return results


def tuned(data: Data, search, settings) -> dict[str, dict]:
    """The results of the first setting with enough recall; the cheapest settings come first."""
    for setting in settings:
        results = asked(data, functools.partial(search, setting))
        if results["all rows"]["recall"] >= LEAST_RECALL:
            break
    return {"setting": setting, **results}


def xlir_build(data: Data) -> None:
    from xlir.search.stores.lance import LanceStore

    rows, dim = data.shape
    store = LanceStore(data.folder / "store", dim, create=True)
    days = days_of(rows)
    for start, vectors in data.chunks():
        store.add(table(start, vectors, days, rows))
    store.optimize()


def table(start: int, vectors: np.ndarray, days: np.ndarray, rows: int):
    """Rows of a store, with dates and folders, but without thumbnails."""
    import pyarrow as pa

    from xlir.search import stores

    numbers = np.arange(start, start + len(vectors))
    folders = [f"/photos/year{n * YEARS // rows}/event{n * EVENTS // rows}/" for n in numbers]
    columns = {
        "id": [f"{number:020x}" for number in numbers],
        "path": [f"{folder}{number}.jpg" for folder, number in zip(folders, numbers, strict=True)],
        "folder": folders,
        "name": [f"{number}.jpg" for number in numbers],
        "size": numbers,
        "modified": numbers,
        "taken": (days[numbers] + 7305) * 86_400,
        "width": (numbers % 5000).astype(np.int32),
        "height": (numbers % 3000).astype(np.int32),
        "thumbnail": [b""] * len(numbers),
    }
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table(columns, schema=stores.schema(vectors.shape[1]))


def named(found: list) -> list[int]:
    """The numbers of the rows that a store found for one query."""
    return [int(name, 16) for name in found[0].rows["id"].to_pylist()]


def xlir_ask(data: Data) -> dict[str, dict]:
    from xlir.search import filters
    from xlir.search.stores.lance import LanceStore

    store = LanceStore(data.folder / "store", data.shape[1])

    def search(query, where, kept):
        return named(store.search(query[None], NEAREST, ["id"], filters.parse(where)))

    def exact(query, where, kept):
        return named(store.search(query[None], NEAREST, ["id"], exact=True))

    asked(data, search)  # not timed: reads the index from the disk
    results = asked(data, search, ["all rows", *filters_of(data.shape[0])])
    return results | {"all rows, exact": asked(data, exact, queries=20)["all rows"]}


def faiss_build(kind: str, data: Data) -> None:
    import faiss

    rows, dim = data.shape
    inner, lists = faiss.METRIC_INNER_PRODUCT, max(1, rows // 1000)
    vectors = data.all()
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 16, inner)
        index.hnsw.efConstruction = 64
    elif kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, inner)
    else:
        eight = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, eight, inner)
    if kind != "hnsw":
        sample = np.random.default_rng(0).choice(rows, min(rows, 50 * lists), replace=False)
        index.train(vectors[np.sort(sample)])
    index.add(vectors)
    faiss.write_index(index, str(data.folder / f"{kind}.faiss"))


def faiss_ask(kind: str, data: Data) -> dict[str, dict]:
    import faiss

    index = faiss.read_index(str(data.folder / f"{kind}.faiss"))

    def search(effort, query, where, kept):
        if kind == "hnsw":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort
        return index.search(query[None], NEAREST)[1][0].tolist()

    return tuned(data, search, (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512))


def torch_ask(data: Data) -> dict[str, dict]:
    """The exact search of sentence-transformers, over rows in memory."""
    import torch
    from sentence_transformers.util import dot_score, semantic_search

    vectors = torch.from_numpy(data.all())

    def search(query, where, kept):
        corpus = vectors if kept is None else vectors[torch.from_numpy(kept)]
        asked = torch.from_numpy(query[None])
        hits = semantic_search(asked, corpus, top_k=NEAREST, score_function=dot_score)[0]
        rows = [hit["corpus_id"] for hit in hits]
        return rows if kept is None else kept[rows].tolist()

    return asked(data, search, ["all rows", *filters_of(data.shape[0])])


def steps(engine: str):
    """The functions that build an engine's index (None if it has none) and that search."""
    if engine.startswith("faiss"):
        kind = engine.removeprefix("faiss-")
        return functools.partial(faiss_build, kind), functools.partial(faiss_ask, kind)
    return (xlir_build, xlir_ask) if engine == "xlir" else (None, torch_ask)


def busy_seconds() -> float:
    """The processor time that all programs on this machine have taken."""
    user, nice, system, _, _, irq, softirq = map(
        int, pathlib.Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def step(engine: str, what: str, folder: pathlib.Path) -> None:
    """Builds the index or searches it, in this process; prints the result."""
    build, ask = steps(engine)
    data, start, busy = Data(folder), time.perf_counter(), busy_seconds()
    results = {}
    if what == "ask":
        results["kinds"] = ask(data)
    elif build:
        build(data)
    results["seconds"] = time.perf_counter() - start
    results["cpu seconds"] = time.process_time()
    others = busy_seconds() - busy - time.process_time()
    results["others"] = max(others, 0) / results["seconds"] / os.cpu_count()
    status = pathlib.Path("/proc/self/status").read_text()
    results["memory"] = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1e6
    print(json.dumps(results))


def run(engine: str, folder: pathlib.Path) -> dict:
    """What an engine's two processes measure."""
    parts = {}
    for what in ("build", "ask"):
        command = [sys.executable, __file__, f"--step={engine}:{what}", f"--folder={folder}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        parts[what] = json.loads(done.stdout.splitlines()[-1])
    return {
        "engine": engine,
        "build": {name: round(value, 3) for name, value in parts["build"].items()},
        "memory": parts["ask"]["memory"],
        "others": parts["ask"]["others"],
        **parts["ask"]["kinds"],
    }


def report(result: dict) -> None:
    """Prints the rows of one engine."""
    setting = f", effort {result['setting']}" if "setting" in result else ""
    build = result["build"]
    print(
        f"\n{result['engine']}{setting}: built in {build['seconds']:.0f} s "
        f"({build['cpu seconds']:.0f} s of processor time, {build['memory']:.2f} GB, "
        f"{build['others']:.0%} taken by other programs); "
        f"searched with {result['memory']:.2f} GB, {result['others']:.0%} taken by other programs"
    )
    for kind, found in result.items():
        if isinstance(found, dict) and "p50" in found:
            print(
                f"  {kind:24} p50 {found['p50']:7.1f} ms  p95 {found['p95']:7.1f} ms  "
                f"recall {found['recall']:.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--photos", help="a .npy file with embeddings of photos")
    parser.add_argument("--queries", help="a .npy file with embeddings of queries")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the data and the indexes here")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return step(*options.step.split(":"), options.folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or pathlib.Path(scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / "truth.npz").exists():
            make(folder, options)
        results = []
        for engine in options.engines.split(","):
            results.append(run(engine, folder))
            report(results[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
