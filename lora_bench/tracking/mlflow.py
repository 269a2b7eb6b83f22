"""MLflow: a run of ours is a run of an experiment at a tracking server."""

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
_PARAMS_PER_REQUEST = 100  # MLflow's limits
_LONGEST_PARAM = 500
_TAG = "lora_bench.run"
# Unless the user says otherwise: a server that is away costs seconds, not minutes, and nobody is told that we run.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True, kw_only=True)
class MLflow(Tracker):
    """Where MLflow keeps runs."""

    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    uri: str | None
    """`http://localhost:5000`, or what else MLflow takes; null: the environment variable MLFLOW_TRACKING_URI."""
    experiment: str
    """Made where it is not there yet."""

    def check(self) -> None:
        super().check()
        if not (self.uri or os.environ.get("MLFLOW_TRACKING_URI")):
            remedy = "Give the server's address, or put it into the environment variable MLFLOW_TRACKING_URI."
            raise UserError("is needed", key="tracking.mlflow.uri", remedy=remedy, code=Code.MISSING)

    def start(self, run: Run) -> TrackerSession:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # late: seconds, and it reads the environment

        client = mlflow.MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        identity = sha256(f"{run.record['created']} {run.folder.name}".encode()).hexdigest()
        before = client.search_runs([experiment], f"tags.`{_TAG}` = '{identity}'", max_results=1)
        if before:
            identifier = before[0].info.run_id
            client.update_run(identifier, "RUNNING")
            return _Remote(client, identifier)
        name = "/".join(run.folder.resolve().parts[-2:])
        tags = {_TAG: identity, "lora_bench.folder": str(run.folder.resolve())}
        identifier = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [
            mlflow.entities.Param(key, str(value)[:_LONGEST_PARAM])
            for key, value in hyperparameters(run.record["config"])
        ]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            client.log_batch(identifier, params=params[first : first + _PARAMS_PER_REQUEST])
        return _Remote(client, identifier)


class _Remote(TrackerSession):
    def __init__(self, client: MlflowClient, identifier: str) -> None:
        self.client = client
        self.identifier = identifier
        self.step = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        self.step = step
        now = int(time.time() * 1000)
        metrics: list[Any] = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.identifier, metrics=metrics)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        self.log(self.step, values)
        self.client.set_terminated(self.identifier, _STATUS[status])
