"""Which weights should the parts of a query have?

Searches 970 test photos of Flickr8k for pairs of nouns. A photo shows a noun if one of its five
English captions mentions it.

- "A, but not B" (`search A --not=B`), with several weights of B. A pair is used if at least ten
  photos show both nouns, and at least ten show A without B.
- "A and B" (`search A --and=B`), with several weights of B, and as one text, "A B". A pair is used
  if at least ten photos show both nouns.

  python benchmarks/search_parts.py RUN PATH/flickr8k

For each language, prints which shares of the first ten photos show A, B, both, and A without B.
"""

import itertools
import json
import pathlib
import sys

import numpy as np

import xlir
from input_pipeline import labels, vocabularies
from xlir.search.query import combined

LANGUAGES = ("en", "de", "fr", "zh")
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST, BEST = 10, 10


def main() -> None:
    run, folder = map(pathlib.Path, sys.argv[1:3])
    entries = json.loads((folder / "dataset_flickr8k.json").read_text())["images"]
    tests = [entry for entry in entries if entry["split"] == "test"]
    captions = [[sentence["raw"] for sentence in entry["sentences"]] for entry in tests]
    vocabulary = vocabularies.load("flickr8k")
    tags = [names[0] for names in vocabulary.names_in("en")]
    shows = labels.mentioned(captions, tags).astype(int)
    both = shows.T @ shows
    alone = shows.T @ (1 - shows)
    couples = [
        (a, b)
        for a, b in itertools.permutations(range(len(tags)), 2)
        if both[a, b] >= LEAST and alone[a, b] >= LEAST
    ]
    together = [
        (a, b) for a, b in itertools.combinations(range(len(tags)), 2) if both[a, b] >= LEAST
    ]
    encoder = xlir.Encoder.load(run)
    photos = encoder.encode_image([folder / "images" / entry["filename"] for entry in tests])
    print(f"{len(tests)} photos; pairs: {len(couples)} of A without B, {len(together)} of A and B")
    for language in LANGUAGES:
        names = [names[0] for names in vocabulary.names_in(language)]
        texts = encoder.encode_text(names)
        for weight in WEIGHTS:
            queries = [combined(texts[[a]], texts[[b]], weight) for a, b in couples]
            report(f"{language}: A - {weight} B", queries, photos, shows, couples)
        for weight in WEIGHTS:
            queries = [unit(texts[a] + weight * texts[b]) for a, b in together]
            report(f"{language}: A + {weight} B", queries, photos, shows, together)
        joined = encoder.encode_text([f"{names[a]} {names[b]}" for a, b in together])
        report(f"{language}: 'A B'", joined, photos, shows, together)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def report(name: str, queries, photos, shows, pairs) -> None:
    """Prints which shares of the first photos for the pairs show A, B, both, and A without B."""
    best = np.argsort(-(np.stack(queries) @ photos.T), axis=1)[:, :BEST]
    first, second = (
        np.stack([shows[rows, pair[side]] for rows, pair in zip(best, pairs, strict=True)])
        for side in (0, 1)
    )
    shares = {
        "A": first,
        "B": second,
        "A and B": first & second,
        "A without B": first & ~second & 1,
    }
    row = "; ".join(f"{key} {np.mean(value):.3f}" for key, value in shares.items())
    print(f"{name}: {row}")


if __name__ == "__main__":
    main()
