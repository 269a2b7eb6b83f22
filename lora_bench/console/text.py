"""Lines for the screen: names and values in them may come from anywhere, so no terminal escape and no secret passes."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lora_bench.console.format import to_single_line
from lora_bench.console.redaction import redact


def sanitise(text: object, style: str = "") -> Text:
    """One line as it may be shown; what a terminal would act upon is spelt out."""
    return Text(redact(to_single_line(str(text))), style=style)


def note(text: str) -> None:
    """Print a line about what the user should know to the standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(sanitise(f"note: {text}"))
