"""A run that has ended, as the Python interface returns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - for get_type_hints of the interface
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_bench.run.finished_run import FinishedRun


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended: its folder and its record."""

    folder: Path
    record: dict[str, Any]
    """The content of `run.json`."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """Results by `<split>/<metric>`, as `validation/mcc`, or `validation/spearman` of a regression."""
        metrics: dict[str, float | None] = self.record["metrics"]
        return metrics

    def load(self, *, device: str = "auto") -> FinishedRun:
        """Load the run's backbone, adapter and head for prediction (`lora_bench.load`), anew in each call.

        Its `predict` returns (N,) P(label 1) of two classes, (N, C) probabilities of more, or (N,) numbers.

        Args:
            device: `cpu`, `cuda` or `auto`.

        Raises:
            UserError: the backbone cannot be loaded or has changed, or the run is not done or has several tasks.
        """
        from lora_bench.run.finished_run import FinishedRun  # torch: late

        return FinishedRun.load(self.folder, device=device)
