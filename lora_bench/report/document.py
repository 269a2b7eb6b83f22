"""The document: templates, style and scripts as one HTML file, with a policy that lets nothing leave it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_bench.console.format import to_single_line
from lora_bench.report.content import Code, Strong, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.report.content import Section

LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-interpreter.min.js")
"""The charting library, in the order of loading (`vendor/VENDORED.md`)."""
SCRIPTS = ("charts.js", "settings.js", "tradeoffs.js", "disagreements.js", "page.js")


def render(
    title: str, description: str, top: Sequence[Section], details: Sequence[Section], refresh: int | None = None
) -> str:
    """Return the whole document.

    Args:
        title: of the page, its headline.
        description: what was compared, in one line.
        top: the sections that are always open.
        details: the folded sections.
        refresh: seconds after which the page loads itself again; None: it does not.
    """
    style, scripts = _asset("style.css"), [_asset(f"vendor/{name}") for name in LIBRARIES]
    scripts += [_asset(name) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src {' '.join(repr(_hash(s)) for s in scripts)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            description=description,
            top=top,
            details=details,
            refresh=refresh,
            policy=policy,
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
        )
    )


@cache
def _asset(name: str) -> str:
    """Return a file of this package as text, without the address of a source map, which a browser would load."""
    content = files(__package__).joinpath(name).read_text("utf-8")
    return re.sub(r"^//# sourceMappingURL=.*$", "", content, flags=re.MULTILINE)


def _hash(text: str) -> str:
    """Return the hash of a style or script for the content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    """Return the templates; whatever they print is escaped and on one line."""
    environment = Environment(
        loader=PackageLoader("lora_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show,
    )
    environment.filters["payload"] = payload
    environment.tests |= {"code": lambda cell: isinstance(cell, Code), "strong": lambda cell: isinstance(cell, Strong)}
    environment.tests |= {"verdict": lambda cell: isinstance(cell, Verdict), "items": lambda c: isinstance(c, tuple)}
    environment.tests["quantity"] = _is_quantity
    return environment


def show(content: Any) -> Any:
    """Return a value as the page shows it: markup unchanged; text on one line, with a proper minus sign.

    A terminal escape becomes \\\\x1b. A float has four decimals, a whole number separators of thousands.
    """
    if isinstance(content, Markup) or content is None:
        return content if content is not None else ""
    if isinstance(content, bool):
        return str(content).lower()
    if isinstance(content, int):
        content = f"{content:,}"
    if isinstance(content, float):
        content = f"{content:.4f}"
    text = to_single_line(str(content))
    return text if isinstance(content, Code) else use_minus(text)


def use_minus(text: str) -> str:
    """Return a text with the hyphens in front of numbers as minus signs; those in names and overrides stay."""
    return re.sub(r"(?<![^\s(\[])-(?=\.?\d)", "−", text)


def _is_quantity(cell: Any) -> bool:
    """Return whether a cell is aligned right: a number, or a text that begins with one."""
    if isinstance(cell, int | float):
        return True
    return isinstance(cell, str) and not isinstance(cell, Code) and bool(re.match(r"[<+−-]?\d", cell))


def payload(data: Any) -> Markup:
    """Return data as JSON for the inside of a script element, where only "</" and "<!--" have a meaning."""
    text = json.dumps(_with_minus(data), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _with_minus(data: Any) -> Any:
    """Return data whose tips have minus signs."""
    if isinstance(data, list):
        return [_with_minus(item) for item in data]
    if isinstance(data, dict):
        return {k: use_minus(v) if k == "tip" and isinstance(v, str) else _with_minus(v) for k, v in data.items()}
    return data
