"""HTML and SVG as text. What is not `Markup` is escaped, so that no caption becomes an element."""

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is already HTML or SVG, and is not escaped again."""


def join(parts: Iterable[str]) -> Markup:
    """The parts in a row, each escaped unless it is `Markup`."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(part) for part in parts)
    )


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element.

    Args:
      name: its name.
      children: texts, which are escaped, and `Markup`.
      attributes: values of attributes. In a name, `_` stands for `-`, and one at the end is
        dropped (`class_`). True gives an attribute without a value; None and False leave it out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> Markup:
    """A table that scrolls sideways if it is too wide; the first cell of a row names the row.

    Args:
      caption: what the table shows, for screen readers.
      head: the names of the columns.
      rows: the cells of each row. A row of one cell is the heading of the rows below it.
      kind: its class in the style: "numbers" or "words".
    """
    body = []
    for first, *cells in rows:
        if not cells:
            body.append(tag("tr", tag("th", first, colspan=len(head), scope="colgroup")))
            continue
        named = tag("th", first, scope="row", dir="auto")
        body.append(tag("tr", named, *(tag("td", cell, dir="auto") for cell in cells)))
    content = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
        tag("tbody", *body),
        class_=kind,
    )
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def note(text: str) -> Markup:
    """A paragraph that explains what is below it."""
    return tag("p", text, class_="note")
