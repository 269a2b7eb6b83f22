"""The text that each token belongs to: the first, the second, or neither (special tokens and words of a template).

Exports for deployment contain `assign_texts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextPositions:
    """The assignment of the tokens of N examples to their texts."""

    spans: NDArray[np.int64] | None = None
    """(N, texts, 2) first character and end (exclusive) of each text in the one text that the tokenizer reads; None:
    the tokenizer reads the texts apart."""
    keeps_template: bool = False
    """Truncation shortens the texts only, and keeps every other token."""

    @property
    def key(self) -> bytes:
        """All that the positions depend on, beside the tokens: part of the key of cached tokens."""
        return f"text ids 1|{self.keeps_template}|".encode() + (b"" if self.spans is None else self.spans.tobytes())

    def text_ids(self, encoding: Any, example: int) -> NDArray[np.int8]:
        """Return the text of each token of the example with this number, as `assign_texts` does."""
        return assign_texts(encoding, None if self.spans is None else self.spans[example])


def assign_texts(encoding: Any, spans: Sequence[Sequence[int]] | NDArray[np.int64] | None) -> NDArray[np.int8]:
    """Return the text of each token of an example, (T,): 1 for the first, 2 for the second, 0 for neither.

    Args:
        encoding: the tokenizer's, with character offsets if there are spans.
        spans: first character and end (exclusive) of each text in the one text that the tokenizer reads; None: it reads
            the texts apart.
    """
    if spans is None:
        return np.array([0 if text is None else text + 1 for text in encoding.sequence_ids], np.int8)
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T  # (T,) each
    ids = np.zeros(len(starts), np.int8)
    for text, (start, end) in enumerate(spans, 1):
        # A token may begin with the space before its text; one that reaches beyond the end is the template's.
        ids[(starts >= start - 1) & (ends > start) & (ends <= end)] = text
    return ids
