"""Does a search that only looks into some clusters find the right photos less often?

    python -m xlir.main index --workdir=RUN --to=photos.index PATH/flickr8k/images
    python benchmarks/search_recall.py photos.index PATH/flickr8k

Searches all photos of Flickr8k with the 899 test captions in each language, exactly and through
clusters. Photos are few here, so clusters are made smaller: of the size that gives as many
clusters as a usual index of that many rows would have per photo looked at. Prints Recall@10 (the
caption's own photo is among the first ten), and the share of the ten nearest photos that are found.
"""

import argparse
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from xlir.search.index import Index
from xlir.search.stores import lance

LANGUAGES = ("en", "de", "fr", "zh", "cs")
# Rows of a cluster.
SIZES = (88, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=pathlib.Path)
    parser.add_argument("flickr8k", type=pathlib.Path)
    options = parser.parse_args()
    index, folder = Index.open(options.index), options.flickr8k / "multilingual_test"
    names = (folder / "test_image_names.txt").read_text().splitlines()
    rows = pa.Table.from_batches(index._store.scan([f.name for f in lance.schema(1)]))
    place = {pathlib.Path(path).name: n for n, path in zip(rows["id"], rows["path"], strict=True)}
    gold = [str(place[pathlib.Path(name).name]) for name in names]
    print(f"{len(rows):,} photos, {len(gold)} captions in each language")
    queries = {
        language: index.encoder.encode_text(
            (folder / f"test_captions_{language}.txt").read_text().splitlines()
        )
        for language in LANGUAGES
    }
    for size in SIZES:
        with tempfile.TemporaryDirectory() as scratch, mock.patch.object(lance, "LARGE", 0):
            compare(pathlib.Path(scratch), rows, size, queries, gold)


def compare(folder, rows: pa.Table, size: int, queries: dict, gold: list[str]) -> None:
    """Prints a line for each language."""
    dim = rows.schema.field("vector").type.list_size
    with mock.patch.object(lance, "CLUSTER_ROWS", size), mock.patch.object(lance, "FEW", 0):
        store = lance.LanceStore(folder, dim, create=True)
        store.add(rows)
        store.optimize()
        clusters = store._clusters
        print(f"{clusters} clusters, {lance.probes(clusters)} looked into")
        for language, embedded in queries.items():
            exact, found = (
                [store.search(query, 10, exact=exact).ids for query in embedded]
                for exact in (True, False)
            )
            recalls = [
                np.mean([right in ids for right, ids in zip(gold, side, strict=True)])
                for side in (exact, found)
            ]
            same = np.mean(
                [len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]
            )
            print(
                f"  {language}: R@10 exact {recalls[0]:.4f}, clusters {recalls[1]:.4f} "
                f"({recalls[1] - recalls[0]:+.4f}), of the ten nearest {same:.4f}"
            )


if __name__ == "__main__":
    main()
