"""Trackio: each run of lora-bench is a run of a project, in a local database, a Space of the hub or a server."""

from __future__ import annotations

import contextvars
import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_bench.tracking.base import Tracker, TrackerSession, display_name, hyperparameters, identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackio import Run as TrackioRun

    from lora_bench.records.run_folder import Run


@dataclass(frozen=True, kw_only=True)
class Trackio(Tracker):
    """A project of Trackio."""

    package: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    project: str
    """Name of the project; it is created where it does not exist."""
    space_id: str | None
    """Space of the Hugging Face hub that shows the project, `NAME/SPACE`; null: this machine, see `trackio show`."""

    def start(self, run: Run) -> TrackerSession:
        """Start a Trackio run with the config, or continue that of a resumed run, which has the same name.

        Raises:
            Exception: of trackio.
        """
        import trackio  # late: a second

        settings: dict[str, Any] = {
            "project": self.project,
            "name": f"{display_name(run)}-{identity(run)[:6]}",
            "space_id": self.space_id,
            "config": dict(hyperparameters(run.record["config"])),
            "resume": "allow",
            "embed": False,
            "auto_log_cpu": False,
            "auto_log_gpu": False,
        }
        with redirect_stdout(io.StringIO()):
            # Its own context: in the present one, a start ends the run before, and members of a pack run at a time.
            session = contextvars.copy_context().run(trackio.init, **settings)
        return _TrackioSession(session)


class _TrackioSession(TrackerSession):
    """One run of Trackio."""

    def __init__(self, session: TrackioRun) -> None:
        self.session = session
        self.step = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store the values of a step."""
        self.step = step
        self.session.log(dict(values), step=step)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Store the values and the status at the step of the last evaluation, and wait until all is written."""
        self.session.log({**values, "status": status}, step=self.step)
        with redirect_stdout(io.StringIO()):
            self.session.finish()
