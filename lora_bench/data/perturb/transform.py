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

LabelRule = dict[int, int]
"""The new label of rows with each label; a row whose label is not in it has no known new label, and is not changed."""
BREAKS: LabelRule = {1: 0}
"""Of two classes: a duplicate becomes a non-duplicate."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A named change of texts with its label rule."""

    name: str
    level: str
    """`character`, `word` or `sentence`."""
    change: Change
    labels: LabelRule | None = None
    """None: rows keep their label, a class or a number."""
    relations: tuple[str, ...] | None = None
    """Values of `data.relation` with which the label rule holds; None: all but `form`, which transforms change."""
    is_random: bool = True
    """True if the change depends on the random stream; otherwise every seed gives the same texts."""
    is_idempotent: bool = False
    """True if a second application at full intensity changes nothing."""
    texts: int = 1
    """The least number of texts of a row."""

    @property
    def keeps_label(self) -> bool:
        return self.labels is None

    def has_rule(self, relation: str | None) -> bool:
        """Return whether the label of a changed row is known with this value of `data.relation`."""
        return relation != "form" if self.relations is None else relation in self.relations


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
