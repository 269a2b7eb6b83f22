"""Transforms: small, pure changes of a row's texts, each with a rule for the row's label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

Texts = tuple[str, ...]
Change = Callable[[Texts, Random, float], Texts]
"""A function of texts, a random stream and an intensity in (0, 1] that returns new texts, or the same ones."""
Edit = tuple[int, int, str]
"""Start, end (exclusive), and the new text of the span."""

LabelRule = tuple[int | None, int | None]
"""The new label of rows with label 0 and with label 1; None: unknown, so rows with that label are not changed."""
KEEPS: LabelRule = (0, 1)
BREAKS: LabelRule = (None, 0)
"""A duplicate becomes a non-duplicate; the new label of a non-duplicate is unknown."""

PARAPHRASE_TASKS = ("qqp", "mrpc")
"""Tasks whose label 1 means that two texts have the same meaning, in either order."""
FORM_TASKS = ("cola",)
"""Tasks whose label depends on the form of the text, which every transform changes."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A named change of texts with its label rule."""

    name: str
    level: str
    """`character`, `word` or `sentence`."""
    change: Change
    labels: LabelRule = KEEPS
    paraphrases_only: bool = False
    """True if the label rule holds only in `PARAPHRASE_TASKS`."""
    is_random: bool = True
    """True if the change depends on the random stream; otherwise every seed gives the same texts."""
    is_idempotent: bool = False
    """True if a second application at full intensity changes nothing."""
    texts: int = 1
    """The least number of texts of a row."""

    @property
    def keeps_label(self) -> bool:
        return self.labels == KEEPS

    def has_rule(self, task: str) -> bool:
        """Return whether the label of a changed row is known in this task."""
        return task in PARAPHRASE_TASKS if self.paraphrases_only else task not in FORM_TASKS


def apply_edits(propose: Callable[[str, Random], Iterable[Edit]]) -> Change:
    """Return a change that applies a random share of the proposed edits: `intensity` of them, rounded up.

    The share is of the edits of all texts of a row together. Texts without edits are returned unchanged.

    Args:
        propose: yields edits of one text, in order and without overlap, each of which changes the text.
    """

    def change(texts: Texts, random: Random, intensity: float) -> Texts:
        """Return the texts after a random share of their edits."""
        edits = [(column, edit) for column, text in enumerate(texts) for edit in propose(text, random)]
        chosen = random.sample(range(len(edits)), share(intensity, len(edits)))
        written = list(texts)
        for index in sorted(chosen, reverse=True):  # from the end, so that earlier positions stay valid
            column, (start, end, new) = edits[index]
            written[column] = written[column][:start] + new + written[column][end:]
        return tuple(written)

    return change


def share(intensity: float, count: int) -> int:
    """Return `intensity` times `count`, rounded up."""
    return math.ceil(round(intensity * count, 9))  # 0.1 of 30 is 3, not 3.0000000000000004
