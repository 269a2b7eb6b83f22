"""The progress of a run while it trains, in `progress.json` of its folder, for programs that watch it.

The file is written every few seconds, is of no use to the run itself, and is removed when the run ends. The file of a
run that was killed stays: it says how far the run had come.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from lora_bench.console.format import format_duration
from lora_bench.errors import UserError
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.records.run_folder import Run

PROGRESS_FILE = "progress.json"
WRITE_SECONDS = 2.0
"""Time from one version of the file to the next."""


@dataclass(frozen=True)
class LiveProgress:
    """The progress of a run; a value that is not known is None."""

    step: int
    steps: int
    """Number of its last step, unless it ends early."""
    epoch: float | None
    loss: float | None
    """Mean over the steps since the last version, and over the run's members."""
    pairs_per_second: float | None
    """Since the last version, evaluations included; pairs of each member count once."""
    seconds_left: float | None
    """Expected from the mean time of a step of this process, evaluations included."""

    @property
    def line(self) -> str:
        """The progress as one line of text; what is not known is left out."""
        parts = [f"step {self.step:,}/{self.steps:,}"]
        parts += [] if self.epoch is None else [f"epoch {self.epoch:.2f}"]
        parts += [] if self.loss is None else [f"loss {self.loss:.3f}"]
        parts += [] if self.pairs_per_second is None else [f"{self.pairs_per_second:,.0f} pairs/s"]
        parts += [] if self.seconds_left is None else [f"{format_duration(self.seconds_left)} left"]
        return "  ".join(parts)

    @classmethod
    def read(cls, folder: Path) -> LiveProgress | None:
        """Return the progress in a run's folder; None if there is none, or it is damaged: files are untrusted."""
        try:
            content = untrusted.read_json(folder / PROGRESS_FILE)
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict):
            return None
        numbers = {name: untrusted.as_number(content.get(name)) for name in cls.__dataclass_fields__}
        step, steps = numbers.pop("step"), numbers.pop("steps")
        if step is None or steps is None:
            return None
        return cls(int(step), int(steps), **numbers)


@dataclass
class ProgressWriter:
    """Writes the progress of one run: at its first step, and then at most every `WRITE_SECONDS`.

    Args:
        steps: number of the last step.
        steps_per_epoch: of the run.
    """

    steps: int
    steps_per_epoch: int
    first_step: int = 0
    """Number of the first step of this process; 0 before it."""
    started: float = 0.0
    """Time of the end of that step."""
    written: float = 0.0
    """Time of the last version."""
    losses: list[float] = field(default_factory=list)
    pairs: int = 0

    def stepped(self, run: Run, step: int, loss: float, pairs: int) -> None:
        """Note a step, and write the file if it is time to.

        A file that cannot be written, or a folder that is another run's by now, is left alone: the run meets the same
        error when it writes its record.

        Args:
            run: an open folder.
            step: number of the update.
            loss: of the step, mean over the run's members.
            pairs: of the step.
        """
        now = time.monotonic()
        self.losses.append(loss)
        self.pairs += pairs
        if not self.first_step:
            self.first_step, self.started = step, now
        elif now - self.written < WRITE_SECONDS:
            return
        timed_steps = step - self.first_step
        progress = LiveProgress(
            step=step,
            steps=self.steps,
            epoch=round(step / self.steps_per_epoch, 4),
            loss=sum(self.losses) / len(self.losses),
            pairs_per_second=self.pairs / (now - self.written) if timed_steps else None,
            seconds_left=(now - self.started) / timed_steps * (self.steps - step) if timed_steps else None,
        )
        with suppress(OSError, UserError):
            run.check()
            _replace(run.folder / PROGRESS_FILE, json.dumps(to_json(asdict(progress))))
        self.written, self.losses, self.pairs = now, [], 0


def remove(folder: Path) -> None:
    """Remove the file of a run that has ended; one that is absent, or cannot be removed, is no error."""
    with suppress(OSError):
        (folder / PROGRESS_FILE).unlink()


def _replace(path: Path, text: str) -> None:
    """Write a file in one go, without waiting for the disk: it matters only while the process lives."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text + "\n", encoding="ascii")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
