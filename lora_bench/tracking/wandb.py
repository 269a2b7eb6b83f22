"""Weights & Biases: each run of lora-bench is a run of a project."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import urlsplit

from lora_bench.errors import Code, UserError, require_one_of
from lora_bench.tracking.base import Tracker, TrackerSession, display_name, hyperparameters, identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wandb import Run as WandbRun

    from lora_bench.records.run_folder import Run

MODES = ("online", "offline")


@dataclass(frozen=True, kw_only=True)
class WeightsAndBiases(Tracker):
    """A project of Weights & Biases."""

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    project: str
    """Name of the project; it is created where it does not exist."""
    entity: str | None
    """User or team that owns the project; null: your default."""
    mode: str | None
    """online, or offline: files in the run's folder, for `wandb sync`; null: the environment variable WANDB_MODE, or
    online."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            require_one_of("tracking.wandb.mode", self.mode, MODES)

    def check(self) -> None:
        """Check that the package is installed and, unless it works offline, that there is a key to log in with.

        Raises:
            UserError: one of them is missing.
        """
        super().check()
        mode = self.mode or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not _is_logged_in():
            raise UserError(
                "needs a key to log in with",
                key="tracking.wandb",
                remedy="Run `wandb login`, set the environment variable WANDB_API_KEY, or set "
                "tracking.wandb.mode=offline.",
                code=Code.MISSING,
            )

    def start(self, run: Run) -> TrackerSession:
        """Start a W&B run with the config, or continue that of a resumed run, which has the same id.

        Its files are in the run's folder `wandb`. Nothing is printed, and neither code nor console output is sent.

        Raises:
            Exception: of wandb, for example because the server cannot be reached within 20 seconds.
        """
        import wandb  # late: half a second

        session = wandb.init(
            project=self.project,
            entity=self.entity,
            id=identity(run)[:16],
            name=display_name(run),
            tags=run.record["config"].get("tags"),
            notes=run.record["config"].get("notes"),
            dir=str(run.folder.resolve()),
            config=dict(hyperparameters(run.record["config"])),
            mode=cast("Any", self.mode),
            resume=None if self.mode == "offline" else "allow",
            reinit="create_new",  # the members of a pack are runs at the same time
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, disable_code=True, init_timeout=20
            ),
        )
        return _WandbSession(session)


def _is_logged_in() -> bool:
    """Return whether a key of Weights & Biases is in the environment or in the netrc file of `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class _WandbSession(TrackerSession):
    """One W&B run."""

    def __init__(self, session: WandbRun) -> None:
        self.session = session

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step; those of one step are joined."""
        self.session.log(dict(values), step=step)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Add the values and the status to the summary, and end the W&B run: as failed unless it is done."""
        self.session.summary.update({**values, "status": status})
        self.session.finish(exit_code=int(status != "done"))
