"""Transforms of characters: typing errors, capitals, punctuation. Meaning and label stay the same.

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
    """Return for each letter (a to z) the adjacent letters on a QWERTY keyboard, in its row and the rows next to it."""
    neighbours: dict[str, str] = {}
    for r, row in enumerate(_ROWS):
        for c, letter in enumerate(row):
            # A lower row is shifted to the right by about half a key.
            touching = [(r, c - 1), (r, c + 1), (r - 1, c), (r - 1, c + 1), (r + 1, c - 1), (r + 1, c)]
            near = [_ROWS[i][j] for i, j in touching if 0 <= i < len(_ROWS) and 0 <= j < len(_ROWS[i])]
            neighbours[letter] = "".join(near)
    return neighbours


NEIGHBOURS = _neighbours()


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the start and the text of each word whose inner letters may be changed."""
    for match in _RUN.finditer(text):
        word = match.group()
        if len(word) >= _SHORTEST and all(letter.islower() or letter.isupper() for letter in word):
            yield match.start(), word


def _typo(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each word: leave out or double a random inner letter."""
    for start, word in _words(text):
        i = random.randrange(1, len(word) - 1)
        yield start + i, start + i + 1, random.choice(("", word[i] * 2))


def _keyboard(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each word: replace a random inner letter by a neighbour on a QWERTY keyboard, in the same case.

    Words without such a letter are passed over.
    """
    for start, word in _words(text):
        indices = [i for i in range(1, len(word) - 1) if word[i].lower() in NEIGHBOURS]
        if indices:
            i = random.choice(indices)
            near = random.choice(NEIGHBOURS[word[i].lower()])
            yield start + i, start + i + 1, near.upper() if word[i].isupper() else near


def _swap(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each word: swap two different inner letters that stand side by side, if there are such."""
    for start, word in _words(text):
        indices = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
        if indices:
            i = random.choice(indices)
            yield start + i, start + i + 2, word[i + 1] + word[i]


def _case(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each word, of any length and script, that is not in capitals yet: write it in capitals."""
    for match in _RUN.finditer(text):
        if match.group().upper() != match.group():
            yield match.start(), match.end(), match.group().upper()


def _punctuation(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for the mark (. ? !) that ends the text, and for each question mark before white space.

    It leaves the mark out, doubles it, sets it apart or replaces it. Marks that only white space precedes are passed
    over.
    """
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
