"""The difference that scoring both orders of a pair makes, measured on the selection split of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.tokenization import scoring_table
from lora_bench.errors import UserError
from lora_bench.evaluation.scores import predict_labels
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from lora_bench.run.finished_run import FinishedRun

MAX_ROWS = 1000
"""Rows of the selection split that are scored at most."""


@dataclass(frozen=True)
class OrderEffect:
    """The difference between scores of one order of the texts and the mean of both orders."""

    rows: int
    max_difference: float
    mean_difference: float
    changed_labels: int | None
    """Rows whose predicted label differs, with threshold 0.5; None where numbers are predicted."""

    @classmethod
    def of_scores(
        cls, first_order: NDArray[np.float64], both_orders: NDArray[np.float64], *, is_regression: bool
    ) -> OrderEffect:
        """Compare scores (N,) or (N, C) of one order with the mean of both."""
        differences = np.abs(first_order - both_orders)
        changed = None if is_regression else int((predict_labels(first_order) != predict_labels(both_orders)).sum())
        return cls(len(first_order), float(differences.max()), float(differences.mean()), changed)

    def __str__(self) -> str:
        """Return the difference as a sentence."""
        labels = "" if self.changed_labels is None else f", and {self.changed_labels} predicted labels differ"
        return (
            f"on {self.rows:,} rows of the selection split, scores of one order differ from those of both by at most "
            f"{self.max_difference:.4f} and on average by {self.mean_difference:.4f}{labels}."
        )


def describe_order_effect(run: FinishedRun, console: Console) -> str:
    """Return a sentence on the difference that scoring one order makes to a run that scores both.

    At most `MAX_ROWS` rows of the run's selection split are scored. If its data cannot be read, or have changed, the
    sentence says so.

    Args:
        run: a finished run that scores both orders.
        console: shows what is computed.
    """
    try:
        _, selection = run.reload_splits()
    except UserError as error:
        return f"the difference was not measured: {str(error).rstrip('.')}."
    selection = selection.take(np.arange(min(len(selection), MAX_ROWS)))
    console.print(f"scoring {len(selection):,} rows of the selection split in both orders")
    data, batch_size = run.experiment.data, run.experiment.trainer.eval_batch_size
    table = scoring_table(selection, data, run.pack.backbone, both_orders=True, cached=False)
    assert table.reversed_view is not None
    first_order, reversed_order = (
        predict(run.pack, view, batch_size).mean(axis=0)
        for view in (replace(table, reversed_view=None), table.reversed_view)
    )
    both_orders = (first_order + reversed_order) / 2
    return str(OrderEffect.of_scores(first_order, both_orders, is_regression=run.form == "regression"))
