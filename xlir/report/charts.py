"""Charts as SVG. Colours and fonts come from the page's style, so that a dark page has dark charts.

A chart is one picture to screen readers, with a title and a description; small bars in a table are
hidden from them, because the next cells hold their numbers.
"""

import math
from collections.abc import Mapping, Sequence

from xlir.report.markup import Markup, tag

# Units of a chart's own coordinates, and its margins for labels.
WIDTH, HEIGHT = 340, 215
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 40
# A bar in a cell of a table.
CELL_WIDTH, CELL_HEIGHT = 150, 18
# Roughly the number of labels along an axis.
LABELS = 4

Number = int | float
Points = Sequence[tuple[Number, Number]]


def lines(title: str, description: str, series: Mapping[str, Points], x_label: str) -> Markup:
    """Curves over a common axis; the other axis begins at 0, or below.

    Args:
      title: a short name of the chart.
      description: what it shows, in words.
      series: name -> points (x, y), by ascending x; at least one point in all.
      x_label: the name of the x axis.
    """
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    down = _Axis(min(0.0, *ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = _frame(across, down, x_label)
    for place, points in enumerate(series.values()):
        path = " ".join(f"{across.at(x):.1f},{down.at(y):.1f}" for x, y in points)
        parts.append(tag("polyline", points=path, class_=f"line line-{place}"))
        if len(points) <= 40:
            parts += [_dot(across.at(x), down.at(y), 3, place) for x, y in points]
    return _chart(title, description, parts)


def bars(
    title: str, description: str, edges: Sequence[Number], counts: Sequence[Number], x_label: str
) -> Markup:
    """A histogram.

    Args:
      title: a short name of the chart.
      description: what it shows, in words.
      edges: the bounds of the bars, one more than there are bars.
      counts: the height of each bar.
      x_label: the name of the x axis.
    """
    across = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    down = _Axis(0.0, max(counts), HEIGHT - BOTTOM, TOP)
    parts = _frame(across, down, x_label)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        top, left = down.at(count), across.at(low)
        width = max(across.at(high) - left - 1, 0.5)
        parts.append(_rect(left, top, width, HEIGHT - BOTTOM - top, "bar"))
    return _chart(title, description, parts)


def share(value: Number, interval: tuple[Number, Number] | None = None) -> Markup:
    """A bar for a cell: a share from 0 to 1, and the interval that it lies in."""
    scale = CELL_WIDTH - 2
    parts = [_rect(1, 4, scale, CELL_HEIGHT - 8, "track")]
    parts.append(_rect(1, 4, scale * value, CELL_HEIGHT - 8, "bar"))
    if interval:
        parts += _whisker(1 + scale * interval[0], 1 + scale * interval[1])
    return _cell(parts)


def difference(value: Number, interval: tuple[Number, Number], most: Number) -> Markup:
    """A bar for a cell, left or right of the middle: a difference, and its interval.

    Args:
      value: the difference.
      interval: its ends.
      most: the largest absolute value of all rows, where the cell ends.
    """
    middle, scale = CELL_WIDTH / 2, (CELL_WIDTH / 2 - 2) / (most or 1)
    left, width = middle + scale * min(value, 0), scale * abs(value)
    parts = [_rect(left, 4, width, CELL_HEIGHT - 8, "bar")]
    parts.append(tag("line", x1=middle, x2=middle, y1=0, y2=CELL_HEIGHT, class_="axis"))
    parts += _whisker(*(middle + scale * end for end in interval))
    return _cell(parts)


def dots(values: Sequence[Number], target: Number, most: Number) -> Markup:
    """Marks for a cell, on a scale from 0 to `most`; the line is where they should be."""
    scale = (CELL_WIDTH - 12) / (most or 1)
    at = 6 + scale * target
    parts = [tag("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=0, y2=CELL_HEIGHT, class_="axis")]
    for place, value in enumerate(values):
        parts.append(_dot(6 + scale * value, CELL_HEIGHT / 2, 4.5, place))
    return _cell(parts)


class _Axis:
    """Maps values to coordinates; its ends are values that have a label."""

    def __init__(self, low: Number, high: Number, start: Number, end: Number):
        span = high - low or abs(high) or 1.0
        raw = span / LABELS
        power = 10.0 ** math.floor(math.log10(raw))
        self.step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw * 0.999)
        self._low = math.floor(low / self.step + 1e-9) * self.step
        self._high = max(math.ceil(high / self.step - 1e-9) * self.step, self._low + self.step)
        self._start, self._end = start, end

    def at(self, value: Number) -> Number:
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def labels(self) -> list[tuple[Number, str]]:
        """Coordinates, and the numbers to write there."""
        count = round((self._high - self._low) / self.step)
        values = [self._low + place * self.step for place in range(count + 1)]
        return [(self.at(value), f"{round(value, 12):,.10g}") for value in values]


def _frame(across: _Axis, down: _Axis, x_label: str) -> list[Markup]:
    """The lines and labels of both axes."""
    parts = []
    bottom = HEIGHT - BOTTOM
    for y, label in down.labels():
        at = f"{y:.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", class_="end"))
    for x, label in across.labels():
        parts.append(tag("text", label, x=f"{x:.1f}", y=bottom + 16, class_="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 6, class_="middle"))
    return parts


def _chart(title: str, description: str, parts: Sequence[Markup]) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {description}",
        class_="chart",
    )


def _cell(parts: Sequence[Markup]) -> Markup:
    box = {"viewBox": f"0 0 {CELL_WIDTH} {CELL_HEIGHT}", "preserveAspectRatio": "none"}
    return tag("svg", *parts, **box, aria_hidden="true", class_="cell")


def _rect(x: Number, y: Number, width: Number, height: Number, kind: str) -> Markup:
    sides = {"x": x, "y": y, "width": width, "height": height}
    return tag("rect", **{name: f"{side:.1f}" for name, side in sides.items()}, class_=kind)


def _dot(x: Number, y: Number, radius: Number, series: int) -> Markup:
    kind = f"dot dot-{series}"
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=kind)


def _whisker(low: Number, high: Number) -> list[Markup]:
    """A horizontal line with upright ends."""
    middle = CELL_HEIGHT / 2
    low_at, high_at = f"{low:.1f}", f"{high:.1f}"
    ends = [(low_at, high_at, middle, middle)]
    ends += [(at, at, middle - 4, middle + 4) for at in (low_at, high_at)]
    return [tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="whisker") for x1, x2, y1, y2 in ends]
