"""The table itself, as `compare` prints it, to be sorted and filtered on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column, cell, visible
from lora_bench.report.html import Markup, el, join, several

if TYPE_CHECKING:
    from lora_bench.analysis.table import Row, Table

VERDICT = Column("verdict", "text")


def leaderboard(table: Table) -> Markup | None:
    if not table.rows:
        return None
    columns = visible(table)
    if any(row.finding for row in table.rows):
        last = max((i for i, column in enumerate(columns) if column.kind in ("metric", "n", "interval")), default=0)
        columns.insert(last + 1, VERDICT)
    head = el("tr", *(_header(column) for column in columns))
    rows = [el("tr", *(_cell(row, column) for column in columns), data_row=n) for n, row in enumerate(table.rows)]
    caption = "Experiments, best first; the best of each metric on its data in bold"
    body = el("table", el("caption", caption), el("thead", head), el("tbody", *rows), class_="leaderboard")
    search = el(
        "input",
        type="search",
        id="filter",
        autocomplete="off",
        spellcheck="false",
        placeholder="lora  adapter.rank=8  mcc>0.5",
        aria_describedby="filter-help",
    )
    shown = el("span", several(len(table.rows), "experiment"), role="status", class_="count")
    hint = (
        "Words and key=value must all be found; metric>0.5 and cost<100 compare. "
        "Figures dim what is filtered away. A column's heading sorts by it."
    )
    controls = el("p", el("label", "Filter ", search), " ", shown, class_="controls script")
    note = el("p", hint, class_="note script", id="filter-help")
    region = el("div", body, class_="scroll tall", tabindex="0", role="region", aria_label="Leaderboard")
    return join([controls, note, region])


def _header(column: Column) -> Markup:
    number = None if column.kind in ("key", "text") else "number"
    return el("th", column.header, scope="col", class_=number, data_name=column.name)


def _cell(row: Row, column: Column) -> Markup:
    if column is VERDICT:
        verdict = row.finding.verdict if row.finding else ""
        return el("td", el("span", verdict, class_=f"verdict {verdict}") if verdict else "")
    shown = cell(row, column)
    if column.kind == "key":
        value = row.keys.get(column.name)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        return el("td", shown, data_value=None if number is None else repr(number))
    stat = row.stats.get(column.name)
    raw = str(row.n) if column.kind == "n" else None if stat is None else f"{stat.mean:.10g}"
    content = el("b", shown) if column.name in row.best else shown
    return el("td", content, class_="number", data_value=raw)
