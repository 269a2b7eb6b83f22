"""The interface of trackers, and a run that sends its metrics to them.

A tracker is a convenience: the run's folder is the record. A tracker that fails is dropped with a note, and the run
continues. Trackers receive the config as it is in `run.json`, where secrets are hidden.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from hashlib import sha256
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
    """A tracking server or viewer; the fields of a subclass are its keys below `tracking.NAME`."""

    package: ClassVar[str]
    """The package that must be installed."""
    extra: ClassVar[str]
    """The extra of lora-bench that installs the package."""

    def check(self) -> None:
        """Check, before anything runs, that the tracker can work; its server is not contacted.

        Raises:
            UserError: the package or a setting is missing.
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
    def start(self, run: Run) -> TrackerSession:
        """Start a session for a run; a resumed run continues its earlier session. Any exception is allowed."""


class TrackerSession(ABC):
    """One run at one tracker. Any exception of its methods ends the session, and nothing else."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one evaluation.

        Args:
            step: the update after which it was made.
            values: finite numbers, named as in `run.json`: `selection/mcc`.
        """

    @abstractmethod
    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Close the session.

        Args:
            status: how the run ended, one of `run_folder.STATUSES`.
            values: finite numbers of its cost: `cost.train_seconds`, `params.adapter`.
        """


@dataclass
class TrackedRun(Run):
    """A run that also sends its metrics to trackers."""

    sessions: dict[str, TrackerSession] = field(default_factory=dict)
    """Sessions by the name of the tracker; one that fails is removed."""
    console: Console | None = None
    """The console for notes on failures; None: no notes."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last evaluation."""

    def stepped(self, loss: float) -> None:
        """Take the loss of an update into the mean `train/loss`, which is sent with the next evaluation."""
        self.losses.append(loss)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append the line as `Run.log` does, then send its finite metrics and the mean `train/loss` to the trackers.

        A line without a step is sent as step 0. If it cannot be written, the error is raised and nothing is sent.
        """
        super().log(line)
        values = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
        if self.losses:
            values["train/loss"] = sum(self.losses) / len(self.losses)
            self.losses.clear()
        self._send(lambda session: session.log(line["step"] or 0, _finite(values)))

    def finish(self, status: str, error: str | None = None) -> None:
        """End the run as `Run.finish` does, then close the sessions with the finite numbers of `params` and `cost`.

        If the record cannot be written, the error is raised and the sessions stay open.
        """
        super().finish(status, error)
        sections = {name: self.record[name] for name in ("params", "cost")}
        values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        self._send(lambda session: session.finish(status, _finite(values)))

    def _send(self, call: Callable[[TrackerSession], None]) -> None:
        """Make a call to every session; drop sessions that raise an exception, with a note."""
        for name, session in list(self.sessions.items()):
            try:
                call(session)
            except Exception as error:
                del self.sessions[name]
                note_failure(self.console, name, error)


def track_run(run: Run, trackers: Mapping[str, Tracker], console: Console) -> Run:
    """Return a run that sends its metrics to these trackers; without trackers, the run itself.

    It has the folder, record and claim of the given run, which is not used any more. A tracker that fails to start is
    left out with a note.
    """
    if not trackers:
        return run
    sessions = {}
    for name, tracker in trackers.items():
        try:
            sessions[name] = tracker.start(run)
        except Exception as error:
            note_failure(console, name, error)
    return TrackedRun(run.folder, run.record, run.lock, sessions, console)


def note_failure(console: Console | None, name: str, error: Exception) -> None:
    """Print one line: the run continues without this tracker; nothing without a console."""
    if console is not None:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
        console.print(sanitise(f"note: tracking={name} failed: {reason}. The run continues; its record is complete."))


def identity(run: Run) -> str:
    """Return a hexadecimal digest of the run's creation time and the folder's name: equal for a resumed run."""
    return sha256(f"{run.record['created']} {run.folder.name}".encode()).hexdigest()


def display_name(run: Run) -> str:
    """Return the run's name, or the last two names of its folder: `2026-11-30/07-43-24-339437-b49726`."""
    return str(run.record["config"].get("name") or "/".join(run.folder.resolve().parts[-2:]))


def hyperparameters(config: dict[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield (dotted key, value) of a config; lists, nulls and empty groups become JSON text."""
    for key, value in flatten(config):
        yield key, value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among values as floats: True is 1.0, while texts and None are left out."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
