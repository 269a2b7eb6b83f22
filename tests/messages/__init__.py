"""The full text of every refusal that a test provokes, one golden file a command: the one place to improve wording.

Tests assert the code, the key and the value of an error; its text only has to be a line of the command's file. With
`LORA_BENCH_UPDATE_MESSAGES=1` a text that is not there is added in place of failing: delete a file, run the whole suite
once with it, and read the difference.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent
UPDATE = "LORA_BENCH_UPDATE_MESSAGES"
REPLACEMENTS = (
    (re.compile(re.escape(str(FOLDER.parents[1]))), "REPOSITORY"),
    (re.compile(r"(/[^\s:'\",;]*)?/pytest-of-[^/\s]+/pytest-\d+(/popen-gw\d+)?/[^/\s:'\",;]*[^/\s:'\",;.]"), "TMP"),
    (re.compile(r"/[^\s:'\",;]*/site-packages(?=/)"), "SITE-PACKAGES"),
    (re.compile(r"\b[0-9a-f]{40,64}\b|\b[0-9a-f]{12}(?=…)"), "HASH"),
    (re.compile(r"(?<=\(choose from )[^)]*"), "CHOICES"),  # each Python quotes them in its own way
    (re.compile(r"(loaded from there|in the local cache|absent or damaged) \(.*?\)(?=\.( |$))"), r"\1 (LIBRARY)"),
    (re.compile(r"(?<=127\.0\.0\.1:|localhost:)\d+"), "PORT"),
    (re.compile(r"(?<=\bport: )\d+"), "PORT"),
    (re.compile(r"(?<!\d\.)\b\d+\.\d+\.\d+(\+\w+)?\b(?!\.\d)"), "VERSION"),  # an address has four numbers
    (re.compile(r"\b\d{4}-\d\d-\d\d([T /]\d\d[-:]\d\d[-:]\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?)?"), "DATE"),
    (re.compile(r"(?<=on short texts \().*?(?=\)\.( |$))"), "LIBRARY"),
    (re.compile(r"(?<=loaded from the hub: ).*(?=\. Without network)"), "LIBRARY"),
    (re.compile(r"(?<=is not valid Parquet: ).*"), "LIBRARY."),
    (re.compile(r"(column '[^']*' cannot be read: ).*"), r"\1LIBRARY."),
    (re.compile(r"(?<=\.safetensors: is damaged: ).*(?=\. (Copy|Delete))"), "LIBRARY"),
    (re.compile(r"maximum recursion depth exceeded[^.]*"), "LIBRARY"),
)
"""What differs from machine to machine, from run to run, and between versions of Python and the libraries."""


def check(command: str, text: str) -> None:
    """Assert that a message stands in the golden file of its command, or add it with `LORA_BENCH_UPDATE_MESSAGES`."""
    line = normalised(text)
    path = FOLDER / f"{command}.txt"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line in known:
        return
    assert os.environ.get(UPDATE), f"a new message; run the test with {UPDATE}=1 to add it to {path}: {line}"
    with (FOLDER / "__init__.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        whole = path.with_suffix(".part")
        whole.write_text("\n".join(sorted({*known, line})) + "\n", encoding="utf-8")
        os.rename(whole, path)  # tests of full disks replace os.replace


def normalised(text: str) -> str:
    """Return a message as one line of ASCII without what differs from one execution to the next."""
    line = text.strip()
    for pattern, replacement in REPLACEMENTS:
        line = pattern.sub(replacement, line)
    return line.encode("unicode_escape").decode("ascii") if not line.isascii() or not line.isprintable() else line
