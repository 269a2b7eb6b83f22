"""TensorBoard: event files in each run's folder, so that `tensorboard --logdir outputs` shows all runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_bench.tracking.base import Tracker, TrackerSession, hyperparameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.tensorboard import SummaryWriter

    from lora_bench.records.run_folder import Run

FOLDER = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracker):
    """TensorBoard's event files; there are no settings."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def start(self, run: Run) -> TrackerSession:
        """Return a session with an event file in the run's folder `tensorboard`; a resumed run adds a file to it."""
        from torch.utils.tensorboard import SummaryWriter  # late: it imports torch and tensorboard

        return _TensorBoardSession(SummaryWriter(run.folder / FOLDER), run)


class _TensorBoardSession(TrackerSession):
    """The event files of one run.

    Args:
        writer: of the event files.
        run: gives the hyperparameters.
    """

    def __init__(self, writer: SummaryWriter, run: Run) -> None:
        self.writer = writer
        self.run = run
        self.newest: dict[str, float] = {}  # the last value of each metric

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar for each value, and flush the file."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        self.newest.update(values)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Write the config as hyperparameters, the last metrics and these values, and the status; close the file."""
        config = dict(hyperparameters(self.run.record["config"]))
        self.writer.add_hparams(config, {**self.newest, **values}, run_name=".")
        self.writer.add_text("status", status)
        self.writer.close()
