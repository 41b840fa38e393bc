"""The service under load: many clients or one client, with batches and without.

    pip install -e '.[search,serve,quickstart]'
    python benchmarks/serve.py RUN --captions=PATH/xtd10,PATH/flickr8k [--photos=VECTORS.npy]

Makes an index of 100,000 photos with the encoder of a run, starts `xlir serve` on this machine,
and sends it text queries over the loopback device. All clients send at once right after the start.
After a pause, one client sends queries alone, and then all clients send again. Clients keep their
connections, wait for each answer, and never ask the same query twice. They run in a process of
their own, on the same cores as the service. All of this is repeated with a service that answers
each query by itself.

The embeddings of the photos are drawn around topics; with --photos, each is the embedding of a
photo plus half the difference of two others. Prints for each part the answers per second,
the times that clients wait, and by how much the memory (VmRSS) of the service grew over the second
half.
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from urllib.parse import quote

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Sets the largest number of requests in a batch, then runs the program.
START = """
import sys
from xlir.search import batching
batching.LARGEST_BATCH = int(sys.argv.pop(1))
from xlir import main
sys.exit(main.main())
"""


def captions(folders: list[str]) -> list[str]:
    """Different texts of at most 200 characters, in a random order."""
    files = [file for folder in folders for file in sorted(pathlib.Path(folder).rglob("*.txt"))]
    lines = [line.strip() for file in files for line in file.read_text("utf8").splitlines()]
    kept = sorted({line for line in lines if 10 <= len(line) <= 200})
    return [kept[row] for row in np.random.default_rng(0).permutation(len(kept))]


def make(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """An index of many photos."""
    from xlir.search.index import Index

    index = Index.create(folder / "index", options.run)
    generator, dim = np.random.default_rng(0), index.encoder.config.embedding_dim
    if options.photos:
        photos = np.load(options.photos).astype(np.float32)
        first, second, third = generator.integers(len(photos), size=(3, options.rows))
        vectors = photos[first] + 0.5 * (photos[second] - photos[third])
    else:
        centers = generator.normal(size=(1000, dim))
        vectors = centers[generator.integers(1000, size=options.rows)]
        vectors = vectors + generator.normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "vectors.npy", vectors.astype(np.float32))
    names = "".join(f"/photos/{row // 1000}/{row}.jpg\n" for row in range(options.rows))
    (folder / "paths.txt").write_text(names)
    index.add_embeddings(folder / "vectors.npy", folder / "paths.txt")


class Service:
    """A running service, as a context manager."""

    def __init__(self, index: pathlib.Path, batch: int):
        command = [sys.executable, "-c", START, str(batch), "serve", f"--index={index}", "--port=0"]
        start = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for line in self._process.stdout:
            if found := re.search(r"photos at http://127\.0\.0\.1:(\d+)/", line):
                break
        self.port, self.seconds = int(found[1]), time.perf_counter() - start

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._process.stdout.close()

    def memory(self) -> float:
        """Resident memory in MB."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1000


async def client(port: int, queries, end: float, waited: list, failed: list) -> None:
    """Asks one query after the other, until the time `end`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        path = f"/api/search?q={quote(next(queries))}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
        waited.append(time.perf_counter() - start)
        if not (head.startswith(b"HTTP/1.1 200") and body.startswith(b'{"hits":[{')):
            failed.append(head.split(b"\r\n")[0].decode() + " " + body[:100].decode())
            await asyncio.sleep(1)
    writer.close()


async def clients(port: int, number: int, seconds: float, queries) -> dict:
    """Runs several clients for some seconds; returns their waiting times and failures."""
    waited, failed = [], []
    start = time.perf_counter()
    end = start + seconds
    await asyncio.gather(*(client(port, queries, end, waited, failed) for _ in range(number)))
    p50, p95, p99 = (float(1000 * value) for value in np.percentile(waited, (50, 95, 99)))
    return {
        "per second": len(waited) / (time.perf_counter() - start),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "worst": 1000 * max(waited),
        "answers": len(waited),
        "failed": len(failed),
        "failures": sorted(set(failed))[:3],
    }


def load(service: Service, number: int, seconds: float, texts: pathlib.Path, first: int) -> dict:
    """Runs clients in another process, and watches the service's memory."""
    command = [sys.executable, __file__, str(texts), f"--client={service.port},{number},{first}"]
    process = subprocess.Popen(
        [*command, f"--seconds={seconds}"], stdout=subprocess.PIPE, text=True
    )
    memory = []
    while process.poll() is None:
        memory.append(service.memory())
        time.sleep(0.5)
    result = json.loads(process.stdout.read())
    # The medians of the memory in two tenths of the time: right after its middle, and at its end.
    width = max(len(memory) // 10, 1)
    middle = float(np.median(memory[len(memory) // 2 :][:width]))
    last = float(np.median(memory[-width:]))
    return result | {"clients": number, "memory": last, "growth": last / middle - 1}


def measured(folder: pathlib.Path, batch: int, options: argparse.Namespace) -> list[dict]:
    """The results of all parts, with one service."""
    parts, texts, first = [], folder / "captions.json", 0
    with Service(folder / "index", batch) as service:
        idle = service.memory()
        for name, number, seconds in (
            ("first burst", options.clients, 1),
            ("one client", 1, options.seconds / 4),
            ("all clients", options.clients, options.seconds),
        ):
            if number == 1:
                time.sleep(options.pause)
            part = load(service, number, seconds, texts, first)
            first += part["answers"] + number
            parts.append({"part": name, "batch": batch, **part})
        average = os.getloadavg()[0]
    print(
        f"\nbatches of at most {batch}: ready after {service.seconds:.1f} s with {idle:.0f} MB, "
        f"load at the end {average:.1f}"
    )
    for part in parts:
        print(
            f"  {part['part']:12} {part['per second']:6.1f}/s  p50 {part['p50']:6.0f} ms  p95 "
            f"{part['p95']:6.0f} ms  p99 {part['p99']:6.0f} ms  worst {part['worst']:6.0f} ms  "
            f"{part['answers']} answers, {part['failed']} failed  {part['memory']:.0f} MB "
            f"({part['growth']:+.2%})  {' '.join(part['failures'])}",
            flush=True,
        )
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="the folder of a run")
    parser.add_argument("--captions", help="folders with .txt files of captions")
    parser.add_argument("--photos", help="a .npy file with embeddings of photos")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=30, help="seconds after the first burst")
    parser.add_argument("--batches", default="64,1", help="most requests in a batch")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        port, number, first = map(int, options.client.split(","))
        queries = itertools.islice(json.loads(options.run.read_text()), first, None)
        print(json.dumps(asyncio.run(clients(port, number, options.seconds, queries))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        texts = captions(options.captions.split(","))
        (folder / "captions.json").write_text(json.dumps(texts))
        make(folder, options)
        print(f"{options.rows:,} photos, {len(texts):,} different queries, {os.cpu_count()} cores")
        found = [measured(folder, int(batch), options) for batch in options.batches.split(",")]
    many = found[0][2]
    bound = 5 * found[0][1]["p50"] * options.clients / os.cpu_count()
    print(f"\np95 {many['p95']:.0f} ms; 5 * one client's median * clients per core: {bound:.0f} ms")
    if len(found) > 1:
        ratio = many["per second"] / found[1][2]["per second"]
        print(f"answers per second, with batches / without: {ratio:.2f}")
    print(json.dumps([*itertools.chain(*found)]))


if __name__ == "__main__":
    main()
