"""The leaderboard: the table that `compare` prints, to be sorted and filtered on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column, format_cell, visible_columns
from lora_bench.report.html import Markup, element, join, pluralise

if TYPE_CHECKING:
    from lora_bench.analysis.table import Row, Table

VERDICT = Column("verdict", "text")


def leaderboard(table: Table) -> Markup | None:
    """Return the section with the table and its filter; None if it has no rows."""
    if not table.rows:
        return None
    columns = visible_columns(table)
    if any(row.finding for row in table.rows):
        last = max((i for i, column in enumerate(columns) if column.format in ("metric", "n", "interval")), default=0)
        columns.insert(last + 1, VERDICT)
    head = element("tr", *(_header(column) for column in columns))
    rows = [element("tr", *(_cell(row, column) for column in columns), data_row=n) for n, row in enumerate(table.rows)]
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
    count_line = element("span", pluralise(len(table.rows), "experiment"), role="status", class_="count")
    hint = (
        "Rows that match all words, key=value, metric>0.5 or cost<100 remain. "
        "Charts dim the other rows. Click a column's heading to sort by it."
    )
    controls = element("p", element("label", "Filter ", search), " ", count_line, class_="controls script")
    note = element("p", hint, class_="note script", id="filter-help")
    region = element("div", body, class_="scroll tall", tabindex="0", role="region", aria_label="Leaderboard")
    return join([controls, note, region])


def _header(column: Column) -> Markup:
    """Return the header of a column."""
    number = None if column.format in ("key", "text") else "number"
    return element("th", column.header, scope="col", class_=number, data_name=column.name)


def _cell(row: Row, column: Column) -> Markup:
    """Return a cell with the raw value that the page sorts and filters by."""
    if column is VERDICT:
        verdict = row.finding.verdict if row.finding else ""
        return element("td", element("span", verdict, class_=f"verdict {verdict}") if verdict else "")
    cell_text = format_cell(row, column)
    if column.format == "key":
        value = row.keys.get(column.name)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        return element("td", cell_text, data_value=None if number is None else repr(number))
    stat = row.stats.get(column.name)
    sort_value = str(row.n) if column.format == "n" else None if stat is None else f"{stat.mean:.10g}"
    content = element("b", cell_text) if column.name in row.best else cell_text
    return element("td", content, class_="number", data_value=sort_value)
