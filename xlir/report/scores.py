"""The ranks of a test set's queries, recall by language with intervals, and paired comparisons."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from input_pipeline.test_sets.retrieval_set import RetrievalSet
from xlir import evaluate, significance
from xlir.comparison import ZERO_SHOT
from xlir.evaluate import Embedded
from xlir.metrics import AT
from xlir.results import DIRECTIONS
from xlir.significance import ByPhoto, Difference

# (language, direction, K) -> Recall@K by photo.
Recalls = dict[tuple[str, str, int], ByPhoto]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A test set with its embeddings and its recall.

    Attributes:
      data: the test set.
      texts: language -> embeddings of its captions, of unit length.
      images: embeddings of the images, of unit length.
      ranks: language -> the expected rank of each caption's photo; 1 is best.
      recalls: Recall@K by photo.
    """

    data: RetrievalSet
    texts: dict[str, Float[np.ndarray, "_ dim"]]
    images: Float[np.ndarray, "images dim"]
    ranks: dict[str, Float[np.ndarray, " _"]]
    recalls: Recalls

    @classmethod
    def of(cls, embedded: Embedded) -> "Scored":
        """Ranks all captions and photos of a test set."""
        data, images = embedded.data, embedded.images
        ranks, recalls = {}, {}
        for code, directions in evaluate.rankings(data, embedded.texts, images).items():
            for direction, ranked in directions.items():
                if direction == DIRECTIONS[0]:
                    ranks[code] = ranked.ranks.best().expected_rank()
                by_photo = ranked.by_photo(len(images))
                recalls |= {(code, direction, k): by_photo[f"R@{k}"] for k in AT}
        others = [code for code in embedded.texts if code != "en"]
        for direction in DIRECTIONS if others else ():
            for k in AT:
                parts = [recalls[code, direction, k] for code in others]
                recalls[ZERO_SHOT, direction, k] = significance.macro(parts)
        return cls(data, embedded.texts, images, ranks, recalls)

    def of_direction(self, direction: str, k: int) -> Recalls:
        """Recall@K of all languages, in one direction."""
        return {key: recall for key, recall in self.recalls.items() if key[1:] == (direction, k)}

    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Language -> direction -> Recall@K ("R@K"), and its 95% interval in "intervals"."""
        ends = significance.intervals(self.recalls)
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (code, direction, k), recall in self.recalls.items():
            place = found.setdefault(code, {}).setdefault(direction, {"intervals": {}})
            place[f"R@{k}"] = recall.mean()
            place["intervals"][f"R@{k}"] = tuple(ends[code, direction, k])
        return found


def compare(first: Scored, second: Scored, direction: str, k: int) -> dict[str, Difference]:
    """The difference in Recall@K between two runs on the same test set, by language."""
    found = significance.paired(*(scored.of_direction(direction, k) for scored in (first, second)))
    return {key[0]: difference for key, difference in found.items()}
