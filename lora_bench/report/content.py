"""Contents of the page's sections: paragraphs, tables, charts and what holds them, without any HTML.

A section is a list of these. The templates render them; every text in them is escaped there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence


class Code(str):
    """A text to show as code: a path, a command, or a value as it is typed."""

    __slots__ = ()


class Verdict(str):
    """A verdict of a test."""

    __slots__ = ()


class Strong(str):
    """A text to show in bold."""

    __slots__ = ()


Cell: TypeAlias = "str | int | float | tuple[Cell, ...] | None"
"""A cell of a table: a float is shown with four decimals, a tuple as its items in a row."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str
    style: str = "note"
    """A class of the style sheet."""
    kind: str = "paragraph"


@dataclass(frozen=True)
class Heading:
    """The name of the data set that the contents after it are about."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class DataTable:
    """A table whose first column names its rows; it scrolls sideways in a region of its own."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = frozenset()
    """Numbers of the rows to highlight."""
    style: str = ""
    """A class of the style sheet."""
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A chart with its title and caption, and its numbers folded away."""

    title: str
    caption: str
    spec: dict[str, Any]
    """A Vega-Lite specification."""
    numbers: DataTable | None = None
    style: str = ""
    """A class of the style sheet: `wide`, `small`, or empty."""
    kind: str = "figure"

    @property
    def description(self) -> str:
        """The chart in words, for a screen reader."""
        return f"Chart: {self.title}. {self.caption}".strip()


@dataclass(frozen=True)
class Grid:
    """Small charts beside each other."""

    figures: Sequence[Figure]
    style: str = ""
    kind: str = "grid"


@dataclass(frozen=True)
class Fold:
    """Contents that are folded away."""

    summary: str
    contents: Sequence[Any]
    kind: str = "fold"


@dataclass(frozen=True)
class Widget:
    """Contents with controls, rendered by a template of their own."""

    template: str
    values: dict[str, Any] = field(default_factory=dict)
    """The values that the template reads."""
    kind: str = "widget"


Content: TypeAlias = "Paragraph | Heading | Bullets | DataTable | Figure | Grid | Fold | Widget"


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    id: str
    heading: str
    contents: Sequence[Content]
    hint: str = ""
    """The content in a few words, beside the heading of a folded section."""


def pluralise(n: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: `1 run`, `2 runs`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign; empty if it is None."""
    return "" if value is None else f"{value:+.{digits}f}"


def format_p_cell(p: float | None) -> str:
    """Return a p value as it stands in a table; empty if it is None."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
