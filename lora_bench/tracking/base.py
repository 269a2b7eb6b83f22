"""What every tracker does, and the run that tells them.

A tracker is a convenience: the run's folder is the record. One that fails is left behind with a note, and the run goes
on. Trackers get the config as `run.json` has it, where secrets are hidden.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from lora_bench.config.keys import flatten
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.records.run_folder import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console


class Tracker(ABC):
    """Where a run can be followed; its fields are the keys below `tracking.NAME`."""

    package: ClassVar[str]
    """What has to be importable."""
    extra: ClassVar[str]
    """The extra of lora-bench that installs it."""

    def check(self) -> None:
        """Refuse what cannot work, before anything runs.

        Raises:
            UserError: a package is missing, or a setting.
        """
        if find_spec(self.package) is None:
            remedy = f"Install it: pip install 'lora-bench[{self.extra}]'."
            raise UserError(
                f"needs the package {self.package}",
                key="tracking",
                value=self.extra,
                remedy=remedy,
                code=Code.MISSING_PACKAGE,
            )

    @abstractmethod
    def begin(self, run: Run) -> Following:
        """Begin to follow a run, or go on with it where it was followed before."""


class Following(ABC):
    """One run as one tracker follows it. Any exception of its methods ends the following, and nothing else."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of one evaluation, named as `run.json` names its metrics: `selection/mcc`."""

    @abstractmethod
    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """The run has ended with this status; what it cost (`cost.train_seconds`, `params.adapter`)."""


@dataclass
class TrackedRun(Run):
    """A run whose record is also told to trackers."""

    trackers: dict[str, Following] = field(default_factory=dict)
    """By the name of the choice; one that failed is taken out."""
    console: Console | None = None
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last evaluation."""

    def stepped(self, loss: float) -> None:
        """An update was made; its loss goes into the mean `train/loss` that is told with the next evaluation."""
        self.losses.append(loss)

    def log(self, line: Mapping[str, Any]) -> None:
        super().log(line)
        values = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
        if self.losses:
            values["train/loss"] = sum(self.losses) / len(self.losses)
            self.losses.clear()
        self._tell(lambda each: each.log(line["step"] or 0, _finite(values)))

    def finish(self, status: str, error: str | None = None) -> None:
        super().finish(status, error)
        sections = {name: self.record[name] for name in ("params", "cost")}
        values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        self._tell(lambda each: each.finish(status, _finite(values)))

    def _tell(self, what: Callable[[Following], None]) -> None:
        for name, each in list(self.trackers.items()):
            try:
                what(each)
            except Exception as error:
                del self.trackers[name]
                note_failure(self.console, name, error)


def follow(run: Run, trackers: Mapping[str, Tracker], console: Console) -> Run:
    """The run as it is told to `trackers` from now on; those that cannot begin are left out with a note."""
    if not trackers:
        return run
    following = {}
    for name, tracker in trackers.items():
        try:
            following[name] = tracker.begin(run)
        except Exception as error:
            note_failure(console, name, error)
    return TrackedRun(run.folder, run.record, run.lock, following, console)


def note_failure(console: Console | None, name: str, error: Exception) -> None:
    """One line on the screen: the run goes on without this tracker."""
    if console is not None:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
        console.print(sanitise(f"note: tracking={name} has stopped: {reason}. The run goes on; its record is whole."))


def hyperparameters(config: dict[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """A config's keys as the shell spells them, with values that a table of hyperparameters can hold."""
    for key, value in flatten(config):
        yield key, value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
