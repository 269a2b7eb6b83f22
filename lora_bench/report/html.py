"""HTML from plain values. Everything that is no `Markup` is escaped, because anyone may have written a run folder."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, TypeAlias

from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | None"


def text(content: Content) -> Markup:
    r"""Return content as HTML: markup unchanged; other text escaped, on one line, a terminal escape as \\x1b."""
    if isinstance(content, Markup):
        return content
    return Markup("" if content is None else escape(to_single_line(str(content))))


def join(contents: Iterable[Content], between: str = "") -> Markup:
    """Return contents as HTML, with `between` between them."""
    return Markup(text(between).join(text(content) for content in contents))


def element(tag: str, /, *children: Content, **attributes: str | float | bool | None) -> Markup:
    """Return an HTML element.

    An attribute that is None or False is left out, one that is True has no value; `class_` is written class.
    """
    attribute_text = ""
    for name, value in attributes.items():
        if value is not None and value is not False:
            attribute_text += f" {name.rstrip('_').replace('_', '-')}"
            attribute_text += "" if value is True else f'="{text(_number(value))}"'
    content = join(children)
    return Markup(f"<{tag}{attribute_text}>" if tag in _VOID else f"<{tag}{attribute_text}>{content}</{tag}>")


_VOID = ("meta", "input", "link", "br")


def _number(value: str | float) -> str | float:
    """Return a float with at most two decimals; any other value unchanged."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def table(caption: Content, header: Sequence[Content], rows: Iterable[Sequence[Content]], **attributes: str) -> Markup:
    """Return a table whose first column names its rows, in a region that scrolls sideways and is reached by keyboard.

    A float is shown with four decimals; numbers are aligned right.
    """
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = []
    for first, *rest in rows:
        body.append(element("tr", element("th", first, scope="row"), *(_cell(cell) for cell in rest)))
    element_ = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), **attributes
    )
    return element("div", element_, class_="scroll", tabindex="0", role="region", aria_label=str(caption))


def _cell(cell: Content) -> Markup:
    """Return a cell; a number has the class that aligns it right."""
    if isinstance(cell, int | float):
        return element("td", f"{cell:.4f}" if isinstance(cell, float) else f"{cell:,}", class_="number")
    return element("td", cell)


def figure(
    chart: Markup, caption: Content, data: Markup | None = None, *, title: Content = None, class_: str | None = None
) -> Markup:
    """Return a chart with its title and caption above, and its numbers folded away below."""
    numbers = element("details", element("summary", "The numbers"), data) if data else ""
    caption_line = (
        element("figcaption", element("strong", title), " " if title and caption else "", caption)
        if title or caption
        else ""
    )
    return element("figure", caption_line, chart, numbers, class_=class_)


def pluralise(n: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: `1 run`, `2 runs`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
