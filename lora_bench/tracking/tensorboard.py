"""TensorBoard: event files in the run's own folder, so that `tensorboard --logdir outputs` shows every run there is."""

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
    """It has nothing to set."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def start(self, run: Run) -> TrackerSession:
        from torch.utils.tensorboard import SummaryWriter  # late: it imports torch and tensorboard

        return _Events(SummaryWriter(run.folder / FOLDER), run)


class _Events(TrackerSession):
    def __init__(self, writer: SummaryWriter, run: Run) -> None:
        self.writer = writer
        self.run = run
        self.newest: dict[str, float] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        self.newest.update(values)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        config = dict(hyperparameters(self.run.record["config"]))
        self.writer.add_hparams(config, {**self.newest, **values}, run_name=".")
        self.writer.add_text("status", status)
        self.writer.close()
