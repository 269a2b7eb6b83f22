"""Published figures on QQP beside ours, and whether an (accuracy, F1, MCC) triple is possible on GLUE's dev set.

On a set of known size and share of positives, accuracy and F1 fix the four counts, and so MCC; a triple that no whole
counts give was not measured there. Figures are shown only beside runs that were scored on that very set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Column, Row, Table

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Range:
    """MCC of all counts that accuracy and F1 leave possible."""

    low: float
    high: float


def possible(
    accuracy: float, f1: float, *, digits: int, examples: int = 40_430, positives: int = 14_885
) -> Range | None:
    """The MCC that follows from accuracy and F1, rounded to so many decimals; None where no whole counts give both.

    Args:
        accuracy: between 0 and 1.
        f1: of the positive class, between 0 and 1.
        digits: decimals that the two were rounded to, as fractions (91.00 % has 4).
        examples: size of the set, of GLUE's QQP dev set unless said otherwise.
        positives: examples with label 1.
    """
    values = [_mcc(tp, wrong, examples, positives) for tp, wrong in _counts(accuracy, f1, digits, examples, positives)]
    return Range(min(values), max(values)) if values else None


def is_possible(accuracy: float, f1: float, mcc: float, *, digits: int, **sizes: int) -> bool:
    """Whether some whole counts give all three figures, rounded to so many decimals."""
    half = 0.5 * 10.0**-digits + 1e-12
    found = possible(accuracy, f1, digits=digits, **sizes)
    return found is not None and found.low - half <= mcc <= found.high + half


def _counts(accuracy: float, f1: float, digits: int, examples: int, positives: int) -> Iterator[tuple[int, int]]:
    """True positives and errors that round to both."""
    half = 0.5 * 10.0**-digits + 1e-12
    fewest = max(0, math.ceil((1 - accuracy - half) * examples))
    most = min(examples, math.floor((1 - accuracy + half) * examples))
    low, high = max(0.0, f1 - half), min(1.0, f1 + half)
    for wrong in range(fewest, most + 1):
        # F1 = 2 TP / (2 TP + errors); of the errors P - TP are misses, the others false alarms.
        least = max(positives - wrong, 0, math.ceil(low * wrong / (2 * (1 - low)) - 1e-9) if low < 1 else positives)
        top = math.floor(high * wrong / (2 * (1 - high)) + 1e-9) if high < 1 else positives
        top = min(positives, top, examples - wrong)
        yield from ((tp, wrong) for tp in range(least, top + 1) if wrong - (positives - tp) <= examples - positives)


def _mcc(tp: int, wrong: int, examples: int, positives: int) -> float:
    fn = positives - tp
    fp = wrong - fn
    tn = examples - positives - fp
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0


def with_anchors(table: Table) -> Table:
    """The table with published figures beside it, if its runs were scored on GLUE's QQP dev set."""
    known = load()
    size = (known["examples"], known["positives"])
    on_dev = [row for row in table.rows if _scored_on(table, row) == size]
    if not on_dev:
        note = f"no published figures: they are of GLUE's QQP dev set ({size[0]:,} pairs), and no run here is"
        return replace(table, notes=[*table.notes, note])
    rows = [Row(_texts(figure), {}, 1, []) for figure in known["figures"] if figure["split"] == "dev"]
    columns = [Column(name, "key" if name == "published" else "text") for name in _COLUMNS]
    columns[-1] = Column(_COLUMNS[-1], "key")
    notes = ["published: accuracy and F1 in per cent on GLUE's QQP dev set, often of the best epoch on it; MCC derived"]
    if len(on_dev) < len(table.rows):
        notes.append(f"{len(table.rows) - len(on_dev)} rows are of other data: not comparable with what was published")
    notes += _impossible(table, on_dev)
    return replace(table, anchors=Table(columns, rows), notes=table.notes + notes)


_COLUMNS = ("published", "accuracy", "f1", "mcc", "source")


def load() -> dict[str, Any]:
    """The published figures, with the size of the set they are of."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return content


def _texts(figure: dict[str, Any]) -> dict[str, str]:
    found = {"published": f"{figure['model']}, {figure['method']}", "source": figure["source"]}
    found |= {name: f"{figure[name]:.2f}" for name in ("accuracy", "f1") if name in figure}
    if "accuracy" in figure and "f1" in figure and (derived := derived_mcc(figure)):
        found["mcc"] = f"{(derived.low + derived.high) / 2:.3f}"
    return found


def derived_mcc(figure: dict[str, Any]) -> Range | None:
    """The MCC that follows from a figure's accuracy and F1, known to the decimals that its source gives."""
    places = max(len(str(figure[name]).partition(".")[2]) for name in ("accuracy", "f1"))
    return possible(figure["accuracy"] / 100, figure["f1"] / 100, digits=2 + places)


def _scored_on(table: Table, row: Row) -> tuple[Any, Any]:
    data = table.records[row.folders[0]]["data"]
    rows, positives = (data.get(name) for name in ("rows", "positives"))
    if data.get("source") is None or not isinstance(rows, dict) or not isinstance(positives, dict):
        return None, None
    return rows.get("validation"), positives.get("validation")


def _impossible(table: Table, rows: list[Row]) -> list[str]:
    """Runs of ours whose triple no counts give."""
    lines = []
    for folder in (folder for row in rows for folder in row.folders):
        metrics = table.records[folder]["metrics"]
        triple = [metrics.get(f"validation/{name}") for name in ("accuracy", "f1", "mcc")]
        if all(isinstance(x, int | float) for x in triple) and not is_possible(*triple, digits=6):
            lines.append(f"impossible on that set: accuracy, F1 and MCC of {folder}")
    return lines
