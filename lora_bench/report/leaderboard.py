"""The table itself, as `compare` prints it, to be sorted and filtered on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column, format_cell, visible_columns
from lora_bench.report.html import Markup, element, join, pluralise

if TYPE_CHECKING:
    from lora_bench.analysis.table import Row, Table

VERDICT = Column("verdict", "text")


def leaderboard(table: Table) -> Markup | None:
    if not table.rows:
        return None
    columns = visible_columns(table)
    if any(row.finding for row in table.rows):
        last = max((i for i, column in enumerate(columns) if column.format in ("metric", "n", "interval")), default=0)
        columns.insert(last + 1, VERDICT)
    head = element("tr", *(_header(column) for column in columns))
    rows = [
        element("tr", *(_format_cell(row, column) for column in columns), data_row=n)
        for n, row in enumerate(table.rows)
    ]
    caption = "Experiments, best first; the best of each metric on its data in bold"
    body = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *rows), class_="leaderboard"
    )
    search = element(
        "input",
        type="search",
        id="filter",
        autocomplete="off",
        spellcheck="false",
        placeholder="lora  adapter.rank=8  mcc>0.5",
        aria_describedby="filter-help",
    )
    shown = element("span", pluralise(len(table.rows), "experiment"), role="status", class_="count")
    hint = (
        "Words and key=value must all be found; metric>0.5 and cost<100 compare. "
        "Figures dim what is filtered away. A column's heading sorts by it."
    )
    controls = element("p", element("label", "Filter ", search), " ", shown, class_="controls script")
    note = element("p", hint, class_="note script", id="filter-help")
    region = element("div", body, class_="scroll tall", tabindex="0", role="region", aria_label="Leaderboard")
    return join([controls, note, region])


def _header(column: Column) -> Markup:
    number = None if column.format in ("key", "text") else "number"
    return element("th", column.header, scope="col", class_=number, data_name=column.name)


def _format_cell(row: Row, column: Column) -> Markup:
    if column is VERDICT:
        verdict = row.finding.verdict if row.finding else ""
        return element("td", element("span", verdict, class_=f"verdict {verdict}") if verdict else "")
    shown = format_cell(row, column)
    if column.format == "key":
        value = row.keys.get(column.name)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        return element("td", shown, data_value=None if number is None else repr(number))
    stat = row.stats.get(column.name)
    raw = str(row.n) if column.format == "n" else None if stat is None else f"{stat.mean:.10g}"
    content = element("b", shown) if column.name in row.best else shown
    return element("td", content, class_="number", data_value=raw)
