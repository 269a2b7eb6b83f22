"""Charts as SVG: drawn at the size at which they are read, coloured by the page's style sheet.

A series has a colour and a shape of its own (the classes `s0` to `s7`, the symbols `#m0` to `#m7`), so that colour
alone never tells two apart; `other` is what has no series.
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
"""How many series have a colour and a shape of their own."""
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
    """The shapes, once for the whole page."""
    shapes = [
        element("symbol", element("path", d=shape), id=f"m{i}", overflow="visible") for i, shape in enumerate(_SHAPES)
    ]
    return element("svg", *shapes, width=0, height=0, aria_hidden="true", class_="symbols")


def series_class(series: int | None) -> str:
    return "other" if series is None else f"s{series}"


def legend(entries: Sequence[tuple[int | None, str]], dashes: Sequence[int] | None = None) -> Markup:
    """Which shape and colour stands for what, and which dashes where lines have some."""
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
    """A drawing area with two axes; what is drawn first lies lowest."""

    x: Axis
    y: Axis
    width: float = 400
    height: float = 280
    left: float = 46
    marks: list[Markup] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Boxes that labels must not cover: left, top, right, bottom."""
    shift: float = 0
    """Moves what is drawn to the right, so that series with the same x stand side by side."""

    TOP, RIGHT, BOTTOM = 26, 14, 44

    def px(self, value: float) -> float:
        return self.left + self.x.at(value) * (self.width - self.left - self.RIGHT) + self.shift

    def py(self, value: float) -> float:
        return self.TOP + (1 - self.y.at(value)) * (self.height - self.TOP - self.BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], class_: str, row: int | None = None) -> None:
        path = "".join(f"{'L' if i else 'M'}{self.px(x):.1f} {self.py(y):.1f}" for i, (x, y) in enumerate(points))
        self.marks.append(element("path", d=path, class_=f"line {class_}", data_row=row))

    def staircase(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """From left to right: each value holds until the next begins, the last to the chart's end."""
        path = ""
        for i, (x, y) in enumerate(points):
            path += f"H{self.px(x):.1f}V{self.py(y):.1f}" if i else f"M{self.px(x):.1f} {self.py(y):.1f}"
        self.marks.append(element("path", d=f"{path}H{self.width - self.RIGHT:.1f}", class_=f"line {class_}"))

    def dot(self, x: float, y: float, series: int | None, tip: str, row: int | None = None, class_: str = "") -> None:
        left, top = self.px(x), self.py(y)
        self.taken.append((left - 5, top - 5, left + 5, top + 5))
        self.marks.append(
            element(
                "use",
                element("title", tip),
                href=f"#m{series or 0}",
                x=round(left, 1),
                y=round(top, 1),
                class_=f"{series_class(series)} {class_}".strip(),
                data_row=row,
            )
        )

    def interval(self, x: float, low: float, high: float, class_: str, row: int | None = None) -> None:
        where, top, bottom = self.px(x), self.py(high), self.py(low)
        path = f"M{where:.1f} {top:.1f}V{bottom:.1f}M{where - 3.5:.1f} {top:.1f}h7M{where - 3.5:.1f} {bottom:.1f}h7"
        self.marks.append(element("path", d=path, class_=f"line {class_}", data_row=row))

    def name(self, x: float, y: float, words: str) -> None:
        """A label beside a point, where one fits that covers nothing; else none."""
        left, top, wide = self.px(x), self.py(y), len(words) * _CHARACTER
        for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 18, "middle")):
            begin = left + dx - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
            box = (begin, top + dy - 10, begin + wide, top + dy + 3)
            inside = box[0] >= self.left + 2 and box[2] <= self.width and box[1] >= self.TOP - 8
            own = (left - 5, top - 5, left + 5, top + 5)
            if inside and not any(_overlap(box, other) for other in self.taken if other != own):
                self.taken.append(box)
                self.marks.append(element("text", words, x=left + dx, y=top + dy, text_anchor=anchor, class_="label"))
                return

    def svg(self, description: Content, below: Sequence[Markup] = ()) -> Markup:
        """The chart as a picture that a screen reader calls by `description`."""
        return svg_image(join([*below, *self._frame(), *self.marks]), self.width, self.height, description)

    def _frame(self) -> list[Markup]:
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        made = [element("text", self.y.label, x=0, y=13, class_="axis")]
        made.append(element("text", self.x.label, x=right, y=self.height - 6, text_anchor="end", class_="axis"))
        grid = ""
        for value, words in self.y.ticks:
            grid += f"M{self.left:.1f} {self.py(value):.1f}H{right:.1f}"
            made.append(element("text", words, x=self.left - 7, y=self.py(value) + 4, text_anchor="end", class_="tick"))
        end = -1e9
        for value, words in self.x.ticks:
            where, half = self.px(value), len(words) * _CHARACTER / 2
            if where - half > end:
                made.append(element("text", words, x=where, y=bottom + 18, text_anchor="middle", class_="tick"))
                end = where + half + 4
        return [
            element("path", d=grid, class_="grid"),
            element("path", d=f"M{self.left} {bottom}H{right}", class_="base"),
            *made,
        ]


@dataclass(frozen=True)
class Mark:
    """A value on a lane, with an interval or without."""

    value: float
    series: int | None
    tip: str
    row: int | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Lane:
    name: str
    marks: list[Mark]


def draw_lanes(x: Axis, rows: Sequence[Lane], description: Content) -> Markup:
    """Named lanes one below the other, all with the same axis, on which 0 is marked."""
    width, step, top, right = 560.0, 30.0, 12.0, 14.0
    names = [lane.name if len(lane.name) <= _LONGEST else lane.name[: _LONGEST - 1] + "…" for lane in rows]
    left, bottom = 24 + 9.4 * max(map(len, names)), top + step * len(rows)

    def px(value: float) -> float:
        return left + x.at(value) * (width - left - right)

    drawn = [element("path", d="".join(f"M{px(value):.1f} {top}V{bottom}" for value, _ in x.ticks), class_="grid")]
    drawn.append(element("path", d=f"M{px(0):.1f} {top}V{bottom}", class_="zero"))
    for value, words in x.ticks:
        drawn.append(element("text", words, x=px(value), y=bottom + 18, text_anchor="middle", class_="tick"))
    drawn.append(element("text", x.label, x=width - right, y=bottom + 40, text_anchor="end", class_="axis"))
    for i, (lane, name) in enumerate(zip(rows, names, strict=True)):
        y = top + step * (i + 0.5)
        drawn.append(element("text", name, x=left - 14, y=y + 4, text_anchor="end", class_="label"))
        for mark in lane.marks:
            class_ = series_class(mark.series)
            if mark.interval:
                low, high = map(px, mark.interval)
                bar = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
                drawn.append(element("path", d=bar, class_=f"line {class_}", data_row=mark.row))
            place = {"x": round(px(mark.value), 1), "y": y}
            symbol = f"#m{mark.series or 0}"
            drawn.append(
                element("use", element("title", mark.tip), href=symbol, class_=class_, data_row=mark.row, **place)
            )
    return svg_image(join(drawn), width, bottom + 46, description)


def svg_image(content: Markup, width: float, height: float, description: Content, class_: str | None = None) -> Markup:
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
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
