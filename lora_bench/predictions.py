"""The predictions of a run on one split, read from its folder; `record.py` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_bench import stats

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

THRESHOLD = 0.5
"""A label is predicted 1 from this score on, in every metric of every run: nothing is tuned on a reported split."""


@dataclass(frozen=True)
class Predictions:
    """Of one split, by id: (N,) each; only rows with a label."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Which examples are labelled 1."""
        predicted: NDArray[np.bool_] = np.greater_equal(self.scores, THRESHOLD)
        return predicted

    @property
    def is_constant(self) -> bool:
        """Whether all examples are labelled alike."""
        return bool(self.predicted.all() or not self.predicted.any())

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which labels were predicted."""
        right: NDArray[np.bool_] = np.equal(self.predicted, self.labels == 1)
        return right

    @property
    def mcc(self) -> float:
        """Matthews correlation."""
        return self.value("mcc")

    def value(self, measure: str) -> float:
        """Of a measure of `stats.MEASURES`."""
        return float(stats.measure_of(stats.confusion(self.labels, self.predicted), measure))

    def same_examples(self, other: Predictions) -> bool:
        return np.array_equal(self.ids, other.ids) and np.array_equal(self.labels, other.labels)


def read(folder: Path, split: str) -> Predictions | None:
    """The predictions of a run on a split; None where there are none that can be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not memory-mapped: a file that is cut short meanwhile would end the process.
        with (folder / "predictions" / f"{split}.parquet").open("rb") as file:
            found = pq.read_table(file, columns=["id", "label", "score"], use_threads=False).drop_null()
        ids, labels, scores = (found[name].to_numpy() for name in ("id", "label", "score"))
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    usable = len(ids) and np.issubdtype(ids.dtype, np.integer) and np.issubdtype(scores.dtype, np.floating)
    if not usable or not np.isin(labels, (0, 1)).all() or not ((scores >= 0) & (scores <= 1)).all():
        return None
    order = np.argsort(ids, kind="stable")
    return Predictions(ids[order], labels[order].astype(np.int64), scores[order].astype(np.float64))
