"""The sections about recall: by language, and compared with another run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline.test_sets.retrieval_set import RetrievalSet
from xlir.comparison import ZERO_SHOT
from xlir.metrics import AT
from xlir.report import charts, languages
from xlir.report.markup import Markup, join, note, table, tag
from xlir.report.scores import Scored, compare
from xlir.results import DIRECTIONS

FORWARD, BACKWARD = DIRECTIONS
MACRO = "Mean without English"


def key_numbers(sets: Iterable[Scored]) -> Markup:
    """Recall@10 of English and of the other languages, by test set."""
    parts = []
    for one in sets:
        for code, result in one.results().items():
            if code in ("en", ZERO_SHOT):
                name = "English" if code == "en" else "mean of the other languages"
                unit = f"% Recall@10 ({_interval(result[FORWARD])})"
                value = tag("dd", _percent(result[FORWARD]), " ", tag("small", unit))
                parts.append(tag("div", tag("dt", f"{one.data.name}, {name}"), value))
    return tag("dl", *parts, class_="key-numbers")


def by_language(of: Scored) -> Markup:
    """A table of recall by language, grouped by family and script, with intervals."""
    images = len(of.images)
    others = [f"R@{k}" for k in AT if k != 10]
    head = ["Language", "Text to image", "R@10", "95% interval", *others]
    head += ["Image to text: R@10", "95% interval"]
    rows = []
    for group, members in _grouped(of.results().items()):
        rows.append((group,))
        for name, result in members:
            there, back = result[FORWARD], result[BACKWARD]
            low, high = there["intervals"]["R@10"]
            bar = charts.share(there["R@10"], (low, high))
            cells = [_percent(there), _interval(there)]
            cells += [_percent(there, metric) for metric in others]
            rows.append((name, bar, *cells, _percent(back), _interval(back)))
    told = (
        f"Test set {of.data.name}: the share of captions, in percent, that find their photo among "
        f"the first 1, 5 and 10 of {images:,} photos. The bars show R@10, which is "
        f"{min(100, 1000 / images):.2g} for a random ranking. Intervals are bootstrap intervals by "
        "photo. Families of languages are those of Glottolog, scripts those of CLDR."
    )
    return join([note(told), table("Recall by language", head, rows, "numbers")])


def compared(of: Scored, other: Scored, names: tuple[str, str]) -> Markup:
    """A table of the differences between two runs in Recall@10, text to image.

    Args:
      of, other: the runs' evaluations of the same test set.
      names: the names of the two runs.
    """
    found = compare(of, other, FORWARD, 10)
    most = max(abs(end) for one in found.values() for end in (*one.interval, one.mean))
    rows = []
    means = {
        code: [side.recalls[code, FORWARD, 10].mean() for side in (of, other)] for code in found
    }
    for group, members in _grouped((code, (found[code], means[code])) for code in found):
        rows.append((group,))
        for name, (one, both) in members:
            low, high = one.interval
            bar = charts.difference(one.mean, (low, high), most)
            sides = (f"{100 * side:.1f}" for side in both)
            ends = f"{100 * low:+.1f} to {100 * high:+.1f}"
            rows.append((name, bar, f"{100 * one.mean:+.1f}", ends, f"{one.p:.2g}", *sides))
    told = (
        f"R@10, text to image, in percent: {names[0]} minus {names[1]}, on the same captions, with "
        "95% bootstrap intervals by photo. p is the probability of a difference at least as large "
        "if it were random, for each photo, which result belongs to which run."
    )
    head = ("Language", "R@10", "Difference", "95% interval", "p", *names)
    return join([note(told), table("Compared with another run", head, rows, "numbers")])


def check_comparable(first: Sequence[RetrievalSet], second: Sequence[RetrievalSet]) -> None:
    """Checks that two runs have a test set in common, and that it is the same for both.

    Raises:
      ValueError: they have none, or two sets of the same name have other photos or captions.
    """
    others = {data.name: data for data in second}
    common = [(data, others[data.name]) for data in first if data.name in others]
    way_out = "Name one test set for both with --test_set and --images"
    if not common:
        ours, theirs = (", ".join(data.name for data in sets) or "none" for sets in (first, second))
        raise ValueError(
            f"the runs can't be compared, because they have no test set in common (the first has "
            f"{ours}; the second has {theirs}). {way_out}"
        )
    for data, other in common:
        same = data.fingerprint == other.fingerprint and data.captions == other.captions
        if not same or any(
            not np.array_equal(rows, other.image_of[language])
            for language, rows in data.image_of.items()
        ):
            raise ValueError(
                f"the runs can't be compared, because their test sets {data.name} have other "
                f"photos or captions. {way_out}"
            )


def _grouped(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The heading of each group of languages, and its rows with the languages' names."""
    content = dict(rows)
    macro = content.pop(ZERO_SHOT, None)
    for group, members in languages.grouped(content).items():
        yield group, [(languages.name(code), content[code]) for code in members]
    if macro is not None:
        yield "All", [(MACRO, macro)]


def _percent(result: Mapping[str, Any], metric: str = "R@10") -> str:
    return f"{100 * result[metric]:.1f}"


def _interval(result: Mapping[str, Any]) -> str:
    low, high = result["intervals"]["R@10"]
    return f"{100 * low:.1f} to {100 * high:.1f}"
