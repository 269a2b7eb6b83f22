"""HTML out of plain values: what is no `Markup` is escaped, since anyone may have written a run folder."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, TypeAlias

from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | None"


def text(content: Content) -> Markup:
    """`content` as HTML: markup as it is; other text escaped, on one line, a terminal escape shown as \\x1b."""
    if isinstance(content, Markup):
        return content
    return Markup("" if content is None else escape(to_single_line(str(content))))


def join(parts: Iterable[Content], between: str = "") -> Markup:
    return Markup(text(between).join(text(part) for part in parts))


def el(tag: str, /, *children: Content, **attributes: str | float | bool | None) -> Markup:
    """An element. An attribute that is None or False is left out, True stands alone; `class_` is class."""
    written = ""
    for name, value in attributes.items():
        if value is not None and value is not False:
            written += f" {name.rstrip('_').replace('_', '-')}"
            written += "" if value is True else f'="{text(_number(value))}"'
    inside = join(children)
    return Markup(f"<{tag}{written}>" if tag in _VOID else f"<{tag}{written}>{inside}</{tag}>")


_VOID = ("meta", "input", "link", "br")


def _number(value: str | float) -> str | float:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def table(caption: Content, header: Sequence[Content], rows: Iterable[Sequence[Content]], **attributes: str) -> Markup:
    """A table whose first column names its rows, in a region that scrolls sideways and can be reached by keyboard.

    A float is shown with four decimals; numbers stand to the right.
    """
    head = el("tr", *(el("th", cell, scope="col") for cell in header))
    body = []
    for first, *rest in rows:
        body.append(el("tr", el("th", first, scope="row"), *(_cell(cell) for cell in rest)))
    made = el("table", el("caption", caption), el("thead", head), el("tbody", *body), **attributes)
    return el("div", made, class_="scroll", tabindex="0", role="region", aria_label=str(caption))


def _cell(cell: Content) -> Markup:
    if isinstance(cell, int | float):
        return el("td", f"{cell:.4f}" if isinstance(cell, float) else f"{cell:,}", class_="number")
    return el("td", cell)


def figure(
    chart: Markup, caption: Content, data: Markup | None = None, *, title: Content = None, class_: str | None = None
) -> Markup:
    """A chart with its heading above, and below it what it shows in words and, folded away, in numbers."""
    folded = el("details", el("summary", "The numbers"), data) if data else ""
    said = el("figcaption", el("strong", title), " " if title and caption else "", caption) if title or caption else ""
    return el("figure", said, chart, folded, class_=class_)


def several(n: int, one: str, many: str | None = None) -> str:
    """`1 run`, `2 runs`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
