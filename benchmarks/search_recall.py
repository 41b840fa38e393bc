"""Does a search that only looks into some clusters find the right photos less often?

    python -m xlir.main index --workdir=RUN --to=photos.index PATH/flickr8k/images
    python benchmarks/search_recall.py photos.index PATH/flickr8k

Searches all photos of Flickr8k with the 899 test captions in each language, exactly and through
clusters. There are few photos, so the clusters are smaller than usual. A second setting looks
into the same share of the clusters (10%) as a search in an index of a million photos does. Prints
Recall@10 (the caption's own photo is among the first ten), and the share of the ten nearest photos
that are found.
"""

import argparse
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from xlir.search import stores
from xlir.search.index import Index
from xlir.search.stores import lance

LANGUAGES = ("en", "de", "fr", "zh", "cs")
# Pairs: the values of CLUSTER_ROWS and PROBES in `xlir.search.stores.lance`.
SETTINGS = ((88, lance.PROBES), (88, 0.1 * 88**0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=pathlib.Path)
    parser.add_argument("flickr8k", type=pathlib.Path)
    options = parser.parse_args()
    index, folder = Index.open(options.index), options.flickr8k / "multilingual_test"
    names = (folder / "test_image_names.txt").read_text().splitlines()
    rows = pa.Table.from_batches(index._store.scan(stores.schema(1).names))
    ids = zip(rows["path"].to_pylist(), rows["id"].to_pylist(), strict=True)
    place = {pathlib.Path(path).name: identifier for path, identifier in ids}
    gold = [place[pathlib.Path(name).name] for name in names]
    print(f"{len(rows):,} photos, {len(gold)} captions in each language")
    queries = {
        language: index.encoder.encode_text(
            (folder / f"test_captions_{language}.txt").read_text().splitlines()
        )
        for language in LANGUAGES
    }
    for size, root in SETTINGS:
        changed = mock.patch.multiple(lance, LARGE=0, CLUSTER_ROWS=size, PROBES=root)
        with tempfile.TemporaryDirectory() as scratch, changed:
            compare(pathlib.Path(scratch), rows, queries, gold)


def compare(folder: pathlib.Path, rows: pa.Table, queries: dict, gold: list[str]) -> None:
    """Prints a line for each language."""
    store = lance.LanceStore(folder, rows.schema.field("vector").type.list_size, create=True)
    store.add(rows)
    store.optimize()
    print(f"{store._clusters} clusters, {lance.probes(store._clusters)} looked into")
    for language, embedded in queries.items():
        exact, found = (
            [rows["id"].to_pylist() for rows, _ in store.search(embedded, 10, ["id"], exact=exact)]
            for exact in (True, False)
        )
        recalls = [
            np.mean([right in ids for right, ids in zip(gold, side, strict=True)])
            for side in (exact, found)
        ]
        shares = [len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]
        print(
            f"  {language}: R@10 exact {recalls[0]:.4f}, through clusters {recalls[1]:.4f} "
            f"({recalls[1] - recalls[0]:+.4f}); share of the ten nearest {np.mean(shares):.4f}"
        )


if __name__ == "__main__":
    main()
