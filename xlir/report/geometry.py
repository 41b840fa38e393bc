"""The sections about the space of embeddings: hubs, and where languages part."""

import numpy as np
from jaxtyping import Int

from xlir.report import charts, findings, languages
from xlir.report.examples import show
from xlir.report.markup import Markup, join, note, table, tag
from xlir.report.pictures import Pictures
from xlir.report.scores import Scored

# Photos shown as hubs, and the largest number of bars of the histogram.
HUBS, BARS = 10, 24
# Captions of a language whose neighbours are computed, evenly spaced.
MOST_QUERIES = 5_000


class Geometry:
    """Writes both sections of a test set.

    Args:
      of: the test set.
      pictures: collects the photos of the sections.
    """

    def __init__(self, of: Scored, pictures: Pictures):
        self._of, self._pictures = of, pictures
        self._neighbours, self._image_of = {}, {}
        for code in languages.ordered(of.texts):
            text = of.texts[code]
            rows = np.arange(len(text))
            if len(text) > MOST_QUERIES:
                rows = np.linspace(0, len(text) - 1, MOST_QUERIES).astype(int)
            self._neighbours[code] = findings.nearest(text[rows], of.images)
            self._image_of[code] = of.data.image_of[code][rows]

    def hubs(self) -> Markup:
        """Which photos are near many captions, how many are near none, how uneven this is."""
        images = len(self._of.images)
        found = {
            languages.name(code): findings.occurrences(neighbours, images)
            for code, neighbours in self._neighbours.items()
        }
        together = sum(found.values())
        if len(found) > 1:
            found["All languages"] = together
        rows = [
            (
                name,
                f"{findings.skewness(counts):.2f}",
                f"{counts.max():,}",
                f"{counts.mean():.1f}",
                f"{100 * np.mean(counts == 0):.1f}",
            )
            for name, counts in found.items()
        ]
        told = (
            "A hub is a photo that is among the ten nearest photos of many captions, whatever they "
            "say. N_10 counts the captions that have a photo among their ten nearest. The larger "
            "its skewness, the stronger the hubs (Radovanović et al. 2010)."
        )
        head = ("Language", "Skewness of N_10", "Largest", "Mean", "Photos near no caption, %")
        numbers = table("Hubs by language", head, rows, "numbers")
        beside = tag("div", _histogram(together), numbers, class_="beside")
        return join([note(told), tag("div", *self._largest(together), class_="tiles"), beside])

    def _largest(self, counts: Int[np.ndarray, " images"]) -> list[Markup]:
        """The largest hubs."""
        queries = sum(map(len, self._neighbours.values()))
        return [
            show(self._pictures, self._of, int(row), f"near {100 * counts[row] / queries:.1f}%")
            for row in np.argsort(-counts, kind="stable")[:HUBS]
        ]

    def parting(self) -> Markup:
        """A matrix: the share of the ten nearest photos that two languages have in common."""
        shares = findings.overlaps(self._neighbours, self._image_of)
        rows = []
        for code, line in zip(self._neighbours, shares, strict=True):
            cells = [
                tag("span", "–" if np.isnan(one) else f"{100 * one:.0f}", class_=_heat(one))
                for one in line
            ]
            rows.append((languages.name(code), *cells))
        chance = 100 * min(1.0, findings.NEAREST / len(self._of.images))
        told = (
            "The captions of the same photo in two languages: the mean share, in percent, of their "
            "ten nearest photos that both have. In test sets that were translated line by line, "
            "the two captions are the same sentence. 100 means that both languages find the same "
            f"photos; two random lists share {chance:.2g}."
        )
        head = ("Language", *self._neighbours)
        return join([note(told), table("Nearest photos in common", head, rows, "matrix")])


def _histogram(counts: Int[np.ndarray, " images"]) -> Markup:
    width = -(-(int(counts.max()) + 1) // BARS)
    edges = np.arange(0, int(counts.max()) + 1 + width, width)
    heights, _ = np.histogram(counts, bins=edges)
    title = "Photos by N_10, all languages together"
    told = (
        f"Half of the photos have an N_10 of at most {np.median(counts):,.4g}, 95% one of at most "
        f"{np.quantile(counts, 0.95):,.4g}; the largest is {counts.max():,}."
    )
    chart = charts.bars(title, told, edges.tolist(), heights.tolist(), "N_10")
    return tag("figure", tag("figcaption", title), chart, note(told))


def _heat(share: float) -> str | None:
    return None if np.isnan(share) else f"heat-{min(int(10 * share), 9)}"
