"""Slips of the pen: typing errors, capitals, punctuation. Meaning and label stay.

Letters are changed inside words of four or more letters of a script with capitals (Latin, Greek, Cyrillic, …), never
the first or last of a run, so that combining marks stay on their letters; other scripts, whose signs are words or
syllables, are left as they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_bench.data.perturb.transform import Edit, Transform, apply_edits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

_RUN = re.compile(r"[^\W\d_]+")
_SHORTEST = 4
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ENDS = {"?": ("", "??", " ?"), ".": ("", "..", "!"), "!": ("", "!!", ".")}
_END = re.compile(r"[?.!](?=\s*$)|(?<![?.!])\?(?=\s)")


def _neighbours() -> dict[str, str]:
    """Of each letter, those beside it on a QWERTY keyboard: in its own row, and where the rows next to it touch it."""
    found: dict[str, str] = {}
    for r, row in enumerate(_ROWS):
        for c, letter in enumerate(row):
            # A lower row is shifted to the right by about half a key.
            touching = [(r, c - 1), (r, c + 1), (r - 1, c), (r - 1, c + 1), (r + 1, c - 1), (r + 1, c)]
            near = [_ROWS[i][j] for i, j in touching if 0 <= i < len(_ROWS) and 0 <= j < len(_ROWS[i])]
            found[letter] = "".join(near)
    return found


NEIGHBOURS = _neighbours()


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Where each word begins whose inner letters may be changed, and the word."""
    for match in _RUN.finditer(text):
        word = match.group()
        if len(word) >= _SHORTEST and all(letter.islower() or letter.isupper() for letter in word):
            yield match.start(), word


def _typo(text: str, random: Random) -> Iterator[Edit]:
    """An inner letter left out or doubled."""
    for start, word in _words(text):
        i = random.randrange(1, len(word) - 1)
        yield start + i, start + i + 1, random.choice(("", word[i] * 2))


def _keyboard(text: str, random: Random) -> Iterator[Edit]:
    """An inner letter replaced by a neighbour on a QWERTY keyboard."""
    for start, word in _words(text):
        places = [i for i in range(1, len(word) - 1) if word[i].lower() in NEIGHBOURS]
        if places:
            i = random.choice(places)
            near = random.choice(NEIGHBOURS[word[i].lower()])
            yield start + i, start + i + 1, near.upper() if word[i].isupper() else near


def _swap(text: str, random: Random) -> Iterator[Edit]:
    """Two neighbouring inner letters exchanged."""
    for start, word in _words(text):
        places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
        if places:
            i = random.choice(places)
            yield start + i, start + i + 2, word[i + 1] + word[i]


def _case(text: str, random: Random) -> Iterator[Edit]:
    """A word in capitals."""
    for match in _RUN.finditer(text):
        if match.group().upper() != match.group():
            yield match.start(), match.end(), match.group().upper()


def _punctuation(text: str, random: Random) -> Iterator[Edit]:
    """The mark that ends a sentence left out, doubled, set apart or exchanged; one that is all there is stays."""
    for match in _END.finditer(text):
        if text[: match.start()].strip():
            yield match.start(), match.end(), random.choice(_ENDS[match.group()])


TRANSFORMS = (
    Transform(name="typo", level="character", change=apply_edits(_typo)),
    Transform(name="keyboard", level="character", change=apply_edits(_keyboard)),
    Transform(name="swap", level="character", change=apply_edits(_swap)),
    Transform(name="case", level="character", change=apply_edits(_case), is_idempotent=True),
    Transform(name="punctuation", level="character", change=apply_edits(_punctuation)),
)
