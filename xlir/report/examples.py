"""The section with examples: the best and worst queries, and photos that divide the languages."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from xlir.report import findings, languages
from xlir.report.markup import Markup, join, note, tag
from xlir.report.pictures import Pictures
from xlir.report.scores import Scored

# Nearest photos of an example.
SHOWN = 5
# Queries of each kind, over all languages; photos about which languages disagree.
QUERIES, DIVIDED = 40, 8
# Characters of a caption, and of a photo's description.
LONGEST, DESCRIPTION = 300, 120
KINDS = {"worst": "worst", "best": "best", "divided": "languages disagree"}


class Examples:
    """Writes the examples of a test set.

    Args:
      of: the test set.
      pictures: collects their photos.
      share: the part of a page's examples, 0 to 1, that this set may take.
    """

    def __init__(self, of: Scored, pictures: Pictures, share: float):
        self._of, self._pictures = of, pictures
        self._languages = languages.ordered(of.texts)
        self._each = max(1, round(QUERIES * share / len(self._languages)))
        self._divided = max(2, round(DIVIDED * share))
        self._ranks = of.ranks

    def write(self) -> Markup:
        """The examples, and a form that filters them by kind, language and text."""
        rounds = itertools.zip_longest(*self._extremes(), self._disagreements())
        items = [item for one_of_each in rounds for item in one_of_each if item]
        told = (
            "The captions of each language that find their photo at the highest and at the lowest "
            "rank, and photos that one language finds and another does not. Beside a caption's own "
            f"photo are the {SHOWN} photos nearest to the caption; a frame marks its own."
        )
        form = _form(self._languages)
        return join([note(told), form, tag("ul", *items, class_="examples"), _END])

    def _extremes(self) -> Iterator[list[Markup]]:
        """The worst queries of each language, and the best ones."""
        for code in self._languages:
            text, of = self._of.texts[code], self._of.data.image_of[code]
            margins = findings.margins(text, self._of.images, of)
            worst, best = findings.extremes(self._ranks[code], margins, self._each)
            for kind, rows in (("worst", worst), ("best", best)):
                yield [_item(kind, [code], self._query(code, int(row))) for row in rows]

    def _disagreements(self) -> list[Markup]:
        """Photos with the caption that finds them best, and the one that finds them worst."""
        photos, rows = findings.disagreements(
            self._ranks, self._of.data.image_of, len(self._of.images)
        )
        items = []
        for place in range(min(self._divided, len(photos))):
            own = {code: int(found[place]) for code, found in rows.items() if found[place] >= 0}
            ranks = {code: self._ranks[code][row] for code, row in own.items()}
            order = sorted(own, key=ranks.__getitem__)
            parts = [self._query(code, own[code]) for code in (order[0], order[-1])]
            told = ", ".join(f"{code} {ranks[code]:,.4g}" for code in order)
            foot = tag("p", f"Its rank in all languages: {told}", class_="foot")
            items.append(_item("divided", order, *parts, foot))
        return items

    def _query(self, code: str, row: int) -> Markup:
        """A caption, its photo, and the photos nearest to it."""
        of = self._of
        right, rank = int(of.data.image_of[code][row]), self._ranks[code][row]
        near = findings.nearest(of.texts[code][row : row + 1], of.images, SHOWN)[0]
        tiles = [show(self._pictures, of, right, "its photo")]
        for one in map(int, near):
            shown = show(self._pictures, of, one)
            tiles.append(tag("span", shown, class_="right") if one == right else shown)
        caption = clipped(of.data.captions[code][row], LONGEST)
        return tag(
            "div",
            tag("p", caption, class_="query", dir="auto", lang=code),
            tag("p", f"{languages.name(code)}: its photo has rank {rank:,.4g}", class_="foot"),
            tag("div", *tiles, class_="photos"),
        )


def show(pictures: Pictures, of: Scored, row: int, note: str = "") -> Markup:
    """A photo of a test set; its first caption, English if there is one, tells what it shows."""
    label = f"photo {row}"
    for code in sorted(of.data.captions, key=lambda code: code != "en"):
        found = np.flatnonzero(of.data.image_of[code] == row)
        if len(found):
            label = clipped(of.data.captions[code][int(found[0])], DESCRIPTION)
            break
    return pictures.show((of.data.name, row), of.data.images[row], label, note)


def clipped(text: str, longest: int) -> str:
    """The text in one line, cut if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _item(kind: str, codes: Sequence[str], *parts: Markup) -> Markup:
    mark = tag("p", KINDS[kind], class_=f"kind kind-{kind}")
    return tag("li", mark, *parts, data_kind=kind, data_languages=" ".join(codes))


def _form(codes: Sequence[str]) -> Markup:
    """The filters. They need the script, which also makes them visible."""
    kinds = [tag("option", name, value=kind) for kind, name in KINDS.items()]
    names = [tag("option", languages.name(code), value=code) for code in codes]
    every = tag("option", "all", value="")
    return tag(
        "form",
        tag("label", "Examples ", tag("select", every, *kinds, name="kind")),
        tag("label", "Language ", tag("select", every, *names, name="language")),
        tag("label", "Text ", _TEXT),
        tag("output", class_="count"),
        class_="filter",
        hidden=True,
    )


_TEXT = Markup('<input name="text" type="search" dir="auto" autocomplete="off">')
_END = Markup(
    '<p class="nothing" hidden>No example fits.</p>'
    '<button class="more" type="button" hidden>Show all</button>'
)
