"""Charts as SVG, drawn at the size at which they are read and coloured by the page's style sheet.

A series has its own colour and shape (the classes `s0` to `s7`, the symbols `#m0` to `#m7`), so that colour is not the
only difference between two series. Class `other` is for marks that belong to no series.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_bench.report.html import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.report.axes import Axis
    from lora_bench.report.html import Content

SERIES = 8
"""Number of series with their own colour and shape."""
_SHAPES = (
    "M4.2 0A4.2 4.2 0 1 1-4.2 0A4.2 4.2 0 1 1 4.2 0Z",  # circle
    "M-3.8-3.8H3.8V3.8H-3.8Z",  # square
    "M0-4.8L4.6 3.5H-4.6Z",  # triangle
    "M0-5.4L5.4 0L0 5.4L-5.4 0Z",  # diamond
    "M0 4.8L4.6-3.5H-4.6Z",  # triangle on its tip
    "M-1.6-4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",  # plus
    "M0-5L4.8-1.5L2.9 4.1H-2.9L-4.8-1.5Z",  # pentagon
    "M-4.6-4.4H4.6L-4.6 4.4H4.6Z",  # hourglass
)
_LONGEST = 26  # characters of a lane's name
_CHARACTER = 6.4  # width of an average character of a label, in the chart's units


def symbols() -> Markup:
    """Return the shapes that the page's charts refer to."""
    shapes = [
        element("symbol", element("path", d=shape), id=f"m{i}", overflow="visible") for i, shape in enumerate(_SHAPES)
    ]
    return element("svg", *shapes, width=0, height=0, aria_hidden="true", class_="symbols")


def series_class(series: int | None) -> str:
    """Return the class of a series, which gives its colour."""
    return "other" if series is None else f"s{series}"


def legend(entries: Sequence[tuple[int | None, str]], dashes: Sequence[int] | None = None) -> Markup:
    """Return the legend of shapes and colours, with a dashed line for each entry if `dashes` is given."""
    items = []
    for i, (series, name) in enumerate(entries):
        width = 16 if dashes is None else 40
        drawn = [element("use", href=f"#m{series or 0}", x=width / 2, y=8, class_=series_class(series))]
        if dashes is not None:
            drawn.insert(0, element("path", d="M0 8H40", class_=f"line {series_class(series)} dash{dashes[i]}"))
        items.append(element("li", element("svg", *drawn, width=width, height=16, aria_hidden="true"), name))
    return element("ul", *items, class_="legend")


@dataclass
class Chart:
    """A drawing area with two axes; later marks cover earlier ones."""

    x: Axis
    y: Axis
    width: float = 400
    height: float = 280
    margin_left: float = 46
    marks: list[Markup] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Boxes that labels must not cover: left, top, right, bottom."""
    shift: float = 0
    """Offset of marks to the right, so that series with equal x stand side by side."""

    TOP, RIGHT, BOTTOM = 26, 14, 44

    def px(self, value: float) -> float:
        """Return the horizontal position of a value in the chart's units."""
        return self.margin_left + self.x.position(value) * (self.width - self.margin_left - self.RIGHT) + self.shift

    def py(self, value: float) -> float:
        """Return the vertical position of a value in the chart's units."""
        return self.TOP + (1 - self.y.position(value)) * (self.height - self.TOP - self.BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], class_: str, row: int | None = None) -> None:
        """Draw a line through points; `row` is the row of the table that it belongs to."""
        path = "".join(f"{'L' if i else 'M'}{self.px(x):.1f} {self.py(y):.1f}" for i, (x, y) in enumerate(points))
        self.marks.append(element("path", d=path, class_=f"line {class_}", data_row=row))

    def staircase(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """Draw steps from left to right: a value holds until the next point, the last one to the end of the chart."""
        path = ""
        for i, (x, y) in enumerate(points):
            path += f"H{self.px(x):.1f}V{self.py(y):.1f}" if i else f"M{self.px(x):.1f} {self.py(y):.1f}"
        self.marks.append(element("path", d=f"{path}H{self.width - self.RIGHT:.1f}", class_=f"line {class_}"))

    def dot(self, x: float, y: float, series: int | None, tip: str, row: int | None = None, class_: str = "") -> None:
        """Draw a marker with a text that is shown under the pointer."""
        x_center, y_center = self.px(x), self.py(y)
        self.taken.append((x_center - 5, y_center - 5, x_center + 5, y_center + 5))
        self.marks.append(
            element(
                "use",
                element("title", tip),
                href=f"#m{series or 0}",
                x=round(x_center, 1),
                y=round(y_center, 1),
                class_=f"{series_class(series)} {class_}".strip(),
                data_row=row,
            )
        )

    def interval(self, x: float, low: float, high: float, class_: str, row: int | None = None) -> None:
        """Draw a vertical bar with caps."""
        x_center, top, bottom = self.px(x), self.py(high), self.py(low)
        caps = "".join(f"M{x_center - 3.5:.1f} {y:.1f}h7" for y in (top, bottom))
        path = f"M{x_center:.1f} {top:.1f}V{bottom:.1f}{caps}"
        self.marks.append(element("path", d=path, class_=f"line {class_}", data_row=row))

    def label_point(self, x: float, y: float, words: str) -> None:
        """Draw a label beside a point, where it covers nothing; none if there is no such position."""
        x_center, y_center, text_width = self.px(x), self.py(y), len(words) * _CHARACTER
        for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 18, "middle")):
            x_start = x_center + dx - {"start": 0, "end": text_width, "middle": text_width / 2}[anchor]
            box = (x_start, y_center + dy - 10, x_start + text_width, y_center + dy + 3)
            inside = box[0] >= self.margin_left + 2 and box[2] <= self.width and box[1] >= self.TOP - 8
            marker = (x_center - 5, y_center - 5, x_center + 5, y_center + 5)
            if inside and not any(_overlap(box, other) for other in self.taken if other != marker):
                self.taken.append(box)
                self.marks.append(
                    element("text", words, x=x_center + dx, y=y_center + dy, text_anchor=anchor, class_="label")
                )
                return

    def svg(self, description: Content, below: Sequence[Markup] = ()) -> Markup:
        """Return the chart as an SVG picture; a screen reader reads its `description`."""
        return svg_image(join([*below, *self._frame(), *self.marks]), self.width, self.height, description)

    def _frame(self) -> list[Markup]:
        """Return axes, grid and ticks; a tick label that would cover the previous one is left out."""
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        drawn = [element("text", self.y.label, x=0, y=13, class_="axis")]
        drawn.append(element("text", self.x.label, x=right, y=self.height - 6, text_anchor="end", class_="axis"))
        grid = ""
        for value, words in self.y.ticks:
            grid += f"M{self.margin_left:.1f} {self.py(value):.1f}H{right:.1f}"
            drawn.append(
                element("text", words, x=self.margin_left - 7, y=self.py(value) + 4, text_anchor="end", class_="tick")
            )
        free_from = -1e9
        for value, words in self.x.ticks:
            half_width = len(words) * _CHARACTER / 2
            x_center = min(self.px(value), self.width - half_width)
            if x_center - half_width > free_from:
                drawn.append(element("text", words, x=x_center, y=bottom + 18, text_anchor="middle", class_="tick"))
                free_from = x_center + half_width + 4
        return [
            element("path", d=grid, class_="grid"),
            element("path", d=f"M{self.margin_left} {bottom}H{right}", class_="base"),
            *drawn,
        ]


@dataclass(frozen=True)
class Mark:
    """A value in a lane, with or without an interval."""

    value: float
    series: int | None
    tip: str
    row: int | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Lane:
    """A named row of marks."""

    name: str
    marks: list[Mark]


def draw_lanes(x: Axis, rows: Sequence[Lane], description: Content) -> Markup:
    """Return named lanes below one another that share an axis, on which 0 is marked."""
    width, step, top, right = 560.0, 30.0, 12.0, 14.0
    names = [lane.name if len(lane.name) <= _LONGEST else lane.name[: _LONGEST - 1] + "…" for lane in rows]
    margin_left, bottom = 24 + 9.4 * max(map(len, names)), top + step * len(rows)

    def px(value: float) -> float:
        return margin_left + x.position(value) * (width - margin_left - right)

    drawn = [element("path", d="".join(f"M{px(value):.1f} {top}V{bottom}" for value, _ in x.ticks), class_="grid")]
    drawn.append(element("path", d=f"M{px(0):.1f} {top}V{bottom}", class_="zero"))
    for value, words in x.ticks:
        drawn.append(element("text", words, x=px(value), y=bottom + 18, text_anchor="middle", class_="tick"))
    drawn.append(element("text", x.label, x=width - right, y=bottom + 40, text_anchor="end", class_="axis"))
    for i, (lane, name) in enumerate(zip(rows, names, strict=True)):
        y = top + step * (i + 0.5)
        drawn.append(element("text", name, x=margin_left - 14, y=y + 4, text_anchor="end", class_="label"))
        for mark in lane.marks:
            class_ = series_class(mark.series)
            if mark.interval:
                low, high = map(px, mark.interval)
                bar = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
                drawn.append(element("path", d=bar, class_=f"line {class_}", data_row=mark.row))
            position = {"x": round(px(mark.value), 1), "y": y}
            symbol = f"#m{mark.series or 0}"
            drawn.append(
                element("use", element("title", mark.tip), href=symbol, class_=class_, data_row=mark.row, **position)
            )
    return svg_image(join(drawn), width, bottom + 46, description)


def svg_image(content: Markup, width: float, height: float, description: Content, class_: str | None = None) -> Markup:
    """Return SVG content as a picture of a size; a screen reader reads its `description`."""
    return element(
        "svg",
        content,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=str(description),
        class_=class_,
    )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Return whether two boxes (left, top, right, bottom) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
