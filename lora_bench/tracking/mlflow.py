"""MLflow: each run of lora-bench is a run of an experiment at a tracking server."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

from lora_bench.errors import Code, UserError
from lora_bench.tracking.base import Tracker, TrackerSession, hyperparameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient

    from lora_bench.records.run_folder import Run

_STATUS = {
    "done": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "interrupted": "KILLED",
    "eliminated": "KILLED",
}
"""MLflow's name of each status."""
_PARAMS_PER_REQUEST = 100  # MLflow's limits
_MAX_PARAM_LENGTH = 500
_TAG = "lora_bench.run"
"""The tag that identifies a run, so that a resumed run continues its MLflow run."""
# Defaults of environment variables: an absent server costs seconds instead of minutes, and no telemetry is sent.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True, kw_only=True)
class MLflow(Tracker):
    """An experiment at an MLflow tracking server."""

    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    uri: str | None
    """`http://localhost:5000`, or another tracking URI; null: the environment variable MLFLOW_TRACKING_URI."""
    experiment: str
    """Name of the experiment; it is created where it does not exist."""

    def check(self) -> None:
        """Check that the package is installed, and that `uri` or MLFLOW_TRACKING_URI is set.

        Raises:
            UserError: one of them is missing.
        """
        super().check()
        if not (self.uri or os.environ.get("MLFLOW_TRACKING_URI")):
            remedy = "Give the server's address, or set the environment variable MLFLOW_TRACKING_URI."
            raise UserError("is needed", key="tracking.mlflow.uri", remedy=remedy, code=Code.MISSING)

    def start(self, run: Run) -> TrackerSession:
        """Create an MLflow run with the config as parameters, or set that of a resumed run to RUNNING again.

        The earlier one is found by a tag made of the run's creation time and the folder's name. The experiment is
        created if it does not exist; values of parameters are cut to 500 characters. Timeouts are set as environment
        variables, unless they are set already.

        Raises:
            Exception: of MLflow, for example because the server cannot be reached.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # late: seconds, and it reads the environment

        client = mlflow.MlflowClient(self.uri)
        existing = client.get_experiment_by_name(self.experiment)
        experiment = existing.experiment_id if existing else client.create_experiment(self.experiment)
        identity = sha256(f"{run.record['created']} {run.folder.name}".encode()).hexdigest()
        earlier = client.search_runs([experiment], f"tags.`{_TAG}` = '{identity}'", max_results=1)
        if earlier:
            identifier = earlier[0].info.run_id
            client.update_run(identifier, "RUNNING")
            return _MLflowSession(client, identifier)
        name = run.record["config"].get("name") or "/".join(run.folder.resolve().parts[-2:])
        tags = {_TAG: identity, "lora_bench.folder": str(run.folder.resolve())}
        identifier = client.create_run(experiment, run_name=str(name), tags=tags).info.run_id
        params = [
            mlflow.entities.Param(key, str(value)[:_MAX_PARAM_LENGTH])
            for key, value in hyperparameters(run.record["config"])
        ]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            client.log_batch(identifier, params=params[first : first + _PARAMS_PER_REQUEST])
        return _MLflowSession(client, identifier)


class _MLflowSession(TrackerSession):
    """One MLflow run.

    Args:
        client: of the tracking server.
        identifier: MLflow's id of the run.
    """

    def __init__(self, client: MlflowClient, identifier: str) -> None:
        self.client = client
        self.identifier = identifier
        self.step = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values in one request, with the present time; the step is kept for `finish`."""
        from mlflow.entities import Metric

        self.step = step
        now = int(time.time() * 1000)
        metrics: list[Any] = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.identifier, metrics=metrics)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Send the values at the step of the last evaluation, and end the MLflow run with the status of `_STATUS`."""
        self.log(self.step, values)
        self.client.set_terminated(self.identifier, _STATUS[status])
