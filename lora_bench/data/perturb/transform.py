"""What a transform is: a small, pure change of a row's texts, and what it does to the row's label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

Texts = tuple[str, ...]
Change = Callable[[Texts, Random, float], Texts]
"""Texts, a stream to draw from and an intensity in (0, 1] to new texts; the same texts where there is nothing to do."""
Edit = tuple[int, int, str]
"""From, to (exclusive), and what to write there."""

LabelRule = tuple[int | None, int | None]
"""What becomes of label 0 and of label 1; None: not known, so rows with that label are left alone."""
KEEPS: LabelRule = (0, 1)
BREAKS: LabelRule = (None, 0)
"""A duplicate is one no more; a pair that was none may become anything."""

PARAPHRASE_TASKS = ("qqp", "mrpc")
"""Tasks whose label 1 says that two texts mean the same, whichever comes first."""
FORM_TASKS = ("cola",)
"""Tasks whose label is about the form of the text, which every transform changes."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A change of texts with its label rule."""

    name: str
    level: str
    """`character`, `word` or `sentence`."""
    change: Change
    labels: LabelRule = KEEPS
    paraphrases_only: bool = False
    """Whether the label rule holds only in `PARAPHRASE_TASKS`."""
    is_random: bool = True
    """Whether the change depends on the random stream; if not, every seed gives the same texts."""
    is_idempotent: bool = False
    """Whether it changes nothing more when it is done again at full intensity (idempotent)."""
    texts: int = 1
    """How many texts a row must have."""

    @property
    def keeps_label(self) -> bool:
        return self.labels == KEEPS

    def has_rule(self, task: str) -> bool:
        """Whether the label of a changed row is known in this task."""
        return task in PARAPHRASE_TASKS if self.paraphrases_only else task not in FORM_TASKS


def apply_edits(find: Callable[[str, Random], Iterable[Edit]]) -> Change:
    """A change that makes a share `intensity`, rounded up, of the edits that `find` proposes over a row's texts.

    Args:
        find: proposes edits of one text, in order and without overlap, each of which changes it.
    """

    def change(texts: Texts, random: Random, intensity: float) -> Texts:
        edits = [(column, edit) for column, text in enumerate(texts) for edit in find(text, random)]
        chosen = random.sample(range(len(edits)), share(intensity, len(edits)))
        written = list(texts)
        for place in sorted(chosen, reverse=True):  # from the end, so that places before stay where they are
            column, (start, end, new) = edits[place]
            written[column] = written[column][:start] + new + written[column][end:]
        return tuple(written)

    return change


def share(intensity: float, count: int) -> int:
    """`intensity` of `count`, rounded up."""
    return math.ceil(round(intensity * count, 9))  # 0.1 of 30 is 3, not 3.0000000000000004
