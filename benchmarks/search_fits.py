"""Can percentiles separate queries that fit a photo in an index from queries that fit none?

Indexes the 970 test photos of Flickr8k. Queries that fit are the 899 test captions in each
language. Queries that do not fit are names of emoji in the same language. An emoji is used if no
word of its English name, singular or plural, is in any English caption of Flickr8k. Words of one
or two letters do not count, and flags are left out.

  python benchmarks/search_fits.py RUN PATH/flickr8k

For each language, prints the area under the ROC curve (AUROC) of the top photo's cosine and of its
percentile. Also prints, at two cutoffs, for which share of each kind of query a photo is shown.
"""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np
from sklearn.metrics import roc_auc_score

import xlir
from input_pipeline.datasets import emoji

LANGUAGES = ("en", "de", "fr", "zh")
CUTOFFS = (0.05, 0.1)
FLAGS = range(0x1F1E6, 0x1F200)


def names_of_nothing(captions: list[str]) -> dict[str, list[str]]:
    """Language -> the names of emoji that no caption mentions."""
    words = {word for caption in captions for word in re.findall("[a-z]+", caption.lower())}
    names = emoji.names()

    def mentioned(name: str) -> bool:
        parts = [part for part in re.findall("[a-z]+", name.lower()) if len(part) > 2]
        forms = [{part, part.rstrip("s"), f"{part}s"} for part in parts]
        return not parts or any(form & words for form in forms)

    kept = [
        row
        for row, (name, character) in enumerate(zip(names["en"], emoji.characters(), strict=True))
        if not mentioned(name) and ord(character[0]) not in FLAGS
    ]
    return {language: [names[language][row] for row in kept] for language in LANGUAGES}


def main() -> None:
    run, folder = map(pathlib.Path, sys.argv[1:3])
    entries = json.loads((folder / "dataset_flickr8k.json").read_text())["images"]
    captions = [sentence["raw"] for entry in entries for sentence in entry["sentences"]]
    nothing = names_of_nothing(captions)
    with tempfile.TemporaryDirectory() as scratch:
        index = xlir.Index.create(pathlib.Path(scratch) / "index", run)
        tests = [entry["filename"] for entry in entries if entry["split"] == "test"]
        index.add([folder / "images" / name for name in tests])
        print(f"{index.count()} photos, {len(nothing['en'])} emoji names that no caption mentions")
        shown = {cutoff: [] for cutoff in CUTOFFS}
        for language in LANGUAGES:
            file = folder / "multilingual_test" / f"test_captions_{language}.txt"
            queries = [file.read_text().splitlines(), nothing[language]]
            hits = [[index.search(query, count=1)[0] for query in side] for side in queries]
            labels = [1] * len(hits[0]) + [0] * len(hits[1])
            row = [language]
            for field in ("cosine", "percentile"):
                values = [getattr(hit, field) for side in hits for hit in side]
                row.append(f"AUROC of the {field} {roc_auc_score(labels, values):.3f}")
            for cutoff in CUTOFFS:
                shares = [np.mean([hit.percentile >= cutoff for hit in side]) for side in hits]
                shown[cutoff].append(shares[0])
                row.append(f"shown at {cutoff}: {shares[0]:.3f} fitting, {shares[1]:.3f} other")
            print("; ".join(row))
        for cutoff, shares in shown.items():
            print(f"spread of languages at {cutoff}: {max(shares) / min(shares) - 1:.3f}")


if __name__ == "__main__":
    main()
