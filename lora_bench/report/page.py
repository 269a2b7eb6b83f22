"""The page: its sections in order, and a policy that lets nothing leave it. Sections without data are left out."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from lora_bench.analysis.significance import MARGIN
from lora_bench.report import appendix, disagreements, robustness, tradeoffs, training, verdicts
from lora_bench.report.charts import symbols
from lora_bench.report.html import Markup, element, join
from lora_bench.report.leaderboard import leaderboard
from lora_bench.report.series import group_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.analysis.table import Table
    from lora_bench.report.series import Block

DATA_SETS = 4
"""Data sets that have charts; the leaderboard has all."""


def page(table: Table, margin: float = MARGIN) -> str:
    """Return the table as one HTML page that needs no other file; its numbers are those of the other formats.

    Args:
        table: as `summarise` returns it.
        margin: the largest difference that counts as equivalent, for the summary.
    """
    visible_blocks = group_blocks(table)[:DATA_SETS]
    title = verdicts.headline(visible_blocks[0]) if visible_blocks else "No finished run yet"
    if len(visible_blocks) > 1:
        title = "Runs on different data"

    def per_block(make: Callable[[Block], Markup | None]) -> Markup | None:
        contents = [(block, content) for block in visible_blocks if (content := make(block)) is not None]
        sections = [join([element("h3", block.name) if block.name else "", content]) for block, content in contents]
        return join(sections) if sections else None

    def summary(block: Block) -> Markup:
        heading = element("p", element("strong", verdicts.headline(block)), class_="lead")
        return join([heading if len(visible_blocks) > 1 else "", verdicts.summary(block, margin)])

    sections = [
        ("summary", "Summary", per_block(summary)),
        ("leaderboard", "Leaderboard", leaderboard(table)),
        ("cost", "Quality against cost", per_block(tradeoffs.costs)),
        (
            "savings",
            "Saved against full fine-tuning",
            appendix.side_table(table.savings, "Shares of its FLOPs, by cause"),
        ),
        ("rank", "Rank", per_block(tradeoffs.by_rank)),
        ("rate", "Learning rate", per_block(tradeoffs.by_learning_rate)),
        ("curves", "Learning curves", per_block(training.curves)),
        ("calibration", "Calibration", per_block(lambda block: training.reliability(block, _split(block)))),
        ("allocation", "Where the ranks went", per_block(training.allocation)),
        ("robustness", "Robustness", per_block(robustness.robustness)),
        ("disagreements", "Disagreements", per_block(lambda block: disagreements.disagreements(block, _split(block)))),
        ("published", "Published results", appendix.side_table(table.published, "Of GLUE's QQP dev set")),
        ("configuration", "Configuration", appendix.differences(table)),
        ("environment", "Environment", appendix.environment(table)),
        ("missing", "Caveats and missing runs", appendix.missing(table)),
        ("folders", "Folders", appendix.folders(table)),
    ]
    filled = [(name, heading, content) for name, heading, content in sections if content is not None]
    return _document(title, appendix.description(table), filled)


def _split(block: Block) -> str:
    """Return the reported split of the block's main metric."""
    metrics = block.entries[0].runs[0][1]["metrics"]
    if "/" in block.main.name:
        return block.main.name.split("/")[0]
    return next((split for split in ("validation", "test") if f"{split}/{block.main.name}" in metrics), "validation")


def _document(title: str, description: str, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """Return the whole document, with a content security policy that allows only its own style and script."""
    style, script = (
        Markup(files(__package__).joinpath(name).read_text("utf-8")) for name in ("style.css", "script.js")
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{title} · lora-bench"),
        element("style", style),
    )
    links = [element("li", element("a", heading, href=f"#{name}")) for name, heading, _ in sections]
    body = [
        element("section", element("h2", heading, id=f"h-{name}"), content, id=name, aria_labelledby=f"h-{name}")
        for name, heading, content in sections
    ]
    top = element("div", element("p", "lora-bench compare", class_="eyebrow"), _switch(), class_="top")
    header = element("header", top, element("h1", title), element("p", description))
    content = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        symbols(),
        header,
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *body, id="content", tabindex="-1"),
        element("div", id="tip", role="presentation", hidden=True),
        element("script", script),
    )
    return f"<!DOCTYPE html>\n{element('html', head, content, lang='en')}\n"


def _switch() -> Markup:
    """Return the menu of light and dark colours, for a reader who does not want the system's."""
    choices = [element("option", theme or "as the system", value=theme) for theme in ("", "light", "dark")]
    select = element("select", *choices, id="theme", autocomplete="off")
    return element("p", element("label", "Colours ", select), class_="script theme")


def _hash(text: str) -> str:
    """Return the hash of a style or script for the content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
