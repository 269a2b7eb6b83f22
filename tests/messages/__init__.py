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
    (re.compile(r"(/[^\s:'\",;]*)?/pytest-of-[^/\s]+/pytest-\d+(/popen-gw\d+)?/[^/\s:'\",;]+"), "TMP"),
    (re.compile(r"\b[0-9a-f]{40,64}\b"), "HASH"),
    (re.compile(r"(?<=127\.0\.0\.1:|localhost:)\d+"), "PORT"),
    (re.compile(r"(?<=\bport: )\d+"), "PORT"),
    (re.compile(r"(?<!\d\.)\b\d+\.\d+\.\d+(\+\w+)?\b(?!\.\d)"), "VERSION"),  # an address has four numbers
    (re.compile(r"\b\d{4}-\d\d-\d\d([T /]\d\d[-:]\d\d[-:]\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?)?"), "DATE"),
)
"""What differs from machine to machine and from run to run."""


def check(command: str, text: str) -> None:
    """Assert that a message stands in the golden file of its command, or add it with `LORA_BENCH_UPDATE_MESSAGES`."""
    line = normalised(text)
    path = FOLDER / f"{command}.txt"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line in known:
        return
    assert os.environ.get(UPDATE), f"a new message; run the test with {UPDATE}=1 to add it to {path}: {line}"
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = sorted({*file.read().splitlines(), line})
        file.truncate(0)
        file.write("\n".join(lines) + "\n")


def normalised(text: str) -> str:
    """Return a message as one line of ASCII without what differs from one execution to the next."""
    line = text.strip()
    for pattern, replacement in REPLACEMENTS:
        line = pattern.sub(replacement, line)
    return line.encode("unicode_escape").decode("ascii") if not line.isascii() or not line.isprintable() else line
