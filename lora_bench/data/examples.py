"""Labelled texts: the format in which every source returns its rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """N labelled rows of one split."""

    ids: NDArray[np.int64]  # (N,) row in the source, from 0
    texts: tuple[list[str], ...]  # one list per text column, each N long
    labels: NDArray[Any] | None  # (N,) class numbers, or numbers; None where there are none

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """Return the examples at these positions (not ids), in this order; a position may occur several times."""
        positions = rows.tolist()
        texts = tuple([column[position] for position in positions] for column in self.texts)
        return Examples(self.ids[rows], texts, None if self.labels is None else self.labels[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of texts and labels in order; lengths are hashed too, to tell any contents apart."""
        digest = hashlib.sha256(f"{len(self)} {len(self.texts)} {self.labels is not None}\n".encode())
        for column in self.texts:
            encoded = [text.encode() for text in column]
            digest.update(np.array([len(text) for text in encoded], dtype="<i8").tobytes())
            digest.update(b"".join(encoded))
        if self.labels is not None:
            digest.update(self.labels.astype("<f8" if self.labels.dtype.kind == "f" else "<i8").tobytes())
        return digest.hexdigest()
