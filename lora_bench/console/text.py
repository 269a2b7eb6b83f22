"""Lines for the screen: untrusted names and values in them are shown without terminal escapes and secrets."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from lora_bench.console.format import to_single_line
from lora_bench.console.redaction import redact


def sanitise(text: object, style: str = "") -> Text:
    """Return a text as one line that is safe to print: control characters escaped, secrets hidden."""
    return Text(redact(to_single_line(str(text))), style=style)


def note(text: str) -> None:
    """Print `note: TEXT` to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(sanitise(f"note: {text}"))


def stdout_console() -> Console:
    """Return a console for standard output; lines are wrapped in a terminal only."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())
