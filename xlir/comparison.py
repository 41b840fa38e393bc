"""A paired comparison of two runs on a test set."""

import dataclasses
from collections.abc import Mapping, Sequence

from xlir import results, significance
from xlir.retrieval_metrics import Ranked
from xlir.significance import ByPhoto

Rankings = Mapping[str, Mapping[str, Ranked]]
# The name of the mean over all languages except English.
ZERO_SHOT = "zero-shot"


def compare(first: Rankings, second: Rankings, photos: int, at: Sequence[int]) -> dict:
    """Compares the recall and the mean reciprocal rank of two runs.

    Args:
      first, second: the ranks of both runs on the same test set, as of `evaluate.rankings`.
      photos: the number of photos of the test set.
      at: the values of k.

    Returns:
      Language -> direction -> metric -> `first`, `second`, `mean` (of the difference), `interval`
      and `p`, as in `significance.Difference`. If there are several languages besides English,
      "zero-shot" is the mean over them.

    Raises:
      ValueError: the runs were evaluated on different queries.
    """
    ours, theirs = (_metrics(ranked, photos, at) for ranked in (first, second))
    differences = significance.paired(ours, theirs)
    found: dict = {}
    for key, difference in differences.items():
        language, direction, name = key
        both = {"first": ours[key].mean(), "second": theirs[key].mean()}
        place = found.setdefault(language, {}).setdefault(direction, {})
        place[name] = both | dataclasses.asdict(difference)
    return found


def _metrics(
    ranked: Rankings, photos: int, at: Sequence[int]
) -> dict[tuple[str, str, str], ByPhoto]:
    """(language, direction, metric) -> its values."""
    names = [*(f"R@{k}" for k in at), "mrr"]
    found = {}
    for language, directions in ranked.items():
        for direction, one in directions.items():
            by_photo = one.by_photo(photos, at)
            found |= {(language, direction, name): by_photo[name] for name in names}
    others = [language for language in ranked if language != "en"]
    if len(others) > 1:
        for direction in results.DIRECTIONS:
            for name in names:
                means = [found[language, direction, name] for language in others]
                found[ZERO_SHOT, direction, name] = significance.macro(means)
    return found


def table(differences: Mapping, first: str, second: str, metric: str = "R@10") -> str:
    """A comparison as a table for the terminal, in percent."""
    lines = [
        f"{metric} of {first} minus {second}, with 95% intervals and p-values by photo",
        f"{'':<10}{'text to image':<44}image to text",
    ]
    for language, directions in differences.items():
        cells = []
        for direction in results.DIRECTIONS:
            one = directions[direction][metric]
            low, high = (100 * end for end in one["interval"])
            ours, theirs, mean = (100 * one[name] for name in ("first", "second", "mean"))
            cells.append(
                f"{ours:5.1f} - {theirs:5.1f} = {mean:+5.1f} [{low:+.1f}, {high:+.1f}] "
                f"p={one['p']:.4f}"
            )
        lines.append(f"{language:<10}{cells[0]:<44}{cells[1]}".rstrip())
    return "\n".join(lines)
