"""Each tracker is told what the record is told, and read back with its own tools."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from lora_bench.errors import Code
from lora_bench.records import run_folder
from lora_bench.records.run_folder import Run
from lora_bench.tracking import base
from lora_bench.tracking.base import Tracker, TrackerSession, track_run
from lora_bench.tracking.choices import build_trackers
from lora_bench.tracking.mlflow import MLflow
from lora_bench.tracking.tensorboard import TensorBoard
from lora_bench.tracking.trackio import Trackio
from lora_bench.tracking.wandb import WeightsAndBiases
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "adapter": {"rank": 8, "dropout": 0.1, "freeze_A": False, "target_modules": ["query", "value"], "alpha": None},
    "data": {"path": "https://me:horse-battery@host/pairs"},
    "seed": 3,
    "metric": {},
}
FLAT = {
    "adapter.rank": 8,
    "adapter.dropout": 0.1,
    "adapter.freeze_A": False,
    "adapter.target_modules": '["query", "value"]',
    "adapter.alpha": "null",
    "data.path": "https://***@host/pairs",
    "seed": 3,
    "metric": "{}",
}
LINES = [
    {"step": 5, "epoch": 1.0, "split": "selection", "metrics": {"mcc": 0.25, "nll": None}, "seconds": 1.0},
    {"step": 10, "epoch": 2.0, "split": "selection", "metrics": {"mcc": 0.5, "nll": 0.625}, "seconds": 1.0},
    {"step": 10, "epoch": 2.0, "split": "validation", "metrics": {"mcc": 0.375}, "seconds": 1.0},
]


def begin(folder: Path, trackers: Mapping[str, Tracker]) -> Run:
    run = Run.claim(folder, choices={"adapter": "lora"}, config=CONFIG, overrides=[])
    return track_run(run, trackers, Console(highlight=False, soft_wrap=True))


def end(run: Run, lines: list[dict[str, Any]] = LINES, status: str = "done") -> None:
    for line in lines:
        run.log(line)
    run.update(cost={"train_seconds": 1.5, "pairs_per_second": None}, params={"adapter": 64})
    run.finish(status)


def test_without_trackers_a_run_is_a_plain_one(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {})
    assert type(run) is Run
    end(run)


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    end(begin(tmp_path / "run", {"tensorboard": TensorBoard()}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["selection/mcc"][:2] == [(5, 0.25), (10, 0.5)]
    assert scalars["selection/nll"][:1] == [(10, 0.625)]
    assert scalars["validation/mcc"][:1] == [(10, 0.375)]
    assert scalars["cost.train_seconds"] == [(0, 1.5)]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    start = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert {name: value.number_value or value.string_value for name, value in start.hparams.items()} == {
        **FLAT,
        "adapter.freeze_A": "",
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def found_at(store: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.mark.parametrize(
    ("status", "theirs"),
    [
        ("done", "FINISHED"),
        ("failed", "FAILED"),
        ("diverged", "FAILED"),
        ("interrupted", "KILLED"),
        ("eliminated", "KILLED"),
    ],
)
def test_mlflow_run(tmp_path: Path, store: str, status: str, theirs: str) -> None:
    import mlflow

    end(begin(tmp_path / "run", {"mlflow": MLflow(uri=store, experiment="mine")}), status=status)
    (stored,) = found_at(store)
    assert stored.info.status == theirs
    assert stored.info.run_name.endswith("/run")
    assert stored.data.params == {name: str(value) for name, value in FLAT.items()}
    expected = {"selection/mcc": 0.5, "selection/nll": 0.625, "validation/mcc": 0.375}
    assert stored.data.metrics == expected | {"cost.train_seconds": 1.5, "params.adapter": 64}
    history = mlflow.MlflowClient(store).get_metric_history(stored.info.run_id, "selection/mcc")
    assert [(point.step, point.value) for point in history] == [(5, 0.25), (10, 0.5)]


def test_mlflow_goes_on_with_a_run_that_was_interrupted(tmp_path: Path, store: str) -> None:
    trackers = {"mlflow": MLflow(uri=store, experiment="mine")}
    end(begin(tmp_path / "run", trackers), LINES[:1], "interrupted")
    again = track_run(Run.reopen(tmp_path / "run"), trackers, Console())
    again.rewind(5)
    end(again, LINES[1:])
    (stored,) = found_at(store)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["validation/mcc"] == 0.375


def records_of(file: Path) -> list[Any]:
    """Return the records of a .wandb file: after 7 bytes, blocks of 32 KiB with chunks of crc, length and type."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            with contextlib.suppress(DecodeError):
                records.append(Record.FromString(parts))
            parts = b""
    return records


def test_runs_of_a_pack_at_weights_and_biases_and_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs at the same time in one process, offline; the second is interrupted and resumed."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    import trackio.utils

    for module in (trackio.utils, importlib.import_module("trackio.sqlite_storage")):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackers = {
        "wandb": WeightsAndBiases(project="mine", entity=None, mode="offline"),
        "trackio": Trackio(project="mine", space_id=None),
    }
    first, second = (begin(tmp_path / "runs" / name, trackers) for name in ("first", "second"))
    end(second, LINES[:1], "interrupted")
    end(first)
    again = track_run(Run.reopen(tmp_path / "runs" / "second"), {"trackio": trackers["trackio"]}, Console())
    again.rewind(5)
    end(again, LINES[1:])
    assert base.identity(again) == base.identity(second) != base.identity(first)
    assert capsys.readouterr().out == ""

    (file,) = (tmp_path / "runs" / "first" / "wandb").glob("offline-run-*/*.wandb")
    records = records_of(file)
    (started,) = (record.run for record in records if record.HasField("run"))
    assert (started.project, started.display_name) == ("mine", "runs/first")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert {name: config[name] for name in FLAT} == FLAT
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["selection/mcc"]) for row in rows] == [(5, 0.25), (10, 0.5)]
    assert rows[1]["validation/mcc"] == 0.375
    assert started.run_id == base.identity(first)[:16]

    stored = {run.name[:-7]: run for run in trackio.Api().runs("mine")}
    assert set(stored) == {"runs/first", "runs/second"}
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    for run in stored.values():
        logs = storage.get_logs("mine", run.name)
        assert [(row["step"], row["selection/mcc"]) for row in logs if "selection/mcc" in row] == [(5, 0.25), (10, 0.5)]
        assert (logs[-1]["status"], logs[-1]["cost.train_seconds"]) == ("done", 1.5)
        assert {name: run.config[name] for name in FLAT} == FLAT


def test_a_key_for_weights_and_biases_is_required_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracker = WeightsAndBiases(project="mine", entity=None, mode=None)
    with refuses(Code.MISSING, key="tracking.wandb"):
        tracker.check()
    WeightsAndBiases(project="mine", entity=None, mode="offline").check()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    tracker.check()
    with refuses(Code.UNKNOWN_CHOICE, key="tracking.wandb.mode"):
        WeightsAndBiases(project="mine", entity=None, mode="of")


def test_a_server_that_is_away_costs_a_note_and_no_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        uri = f"http://me:horse-battery@127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        end(begin(tmp_path / "run", {"mlflow": MLflow(uri=uri, experiment="mine")}))
        assert time.monotonic() - began < 30
    out = capsys.readouterr().out
    assert out.startswith("note: tracking=mlflow ")
    assert out.count("\n") == 1
    assert "horse-battery" not in out
    assert run_folder.read(tmp_path / "run")["status"] == "done"


class Failing(Tracker):
    """Fails at the moment that it is made for."""

    def __init__(self, moment: str, calls: list[str]) -> None:
        self.moment, self.calls = moment, calls

    def start(self, run: Run) -> TrackerSession:
        self._at("begin")
        return _FailingSession(self)

    def _at(self, moment: str) -> None:
        self.calls.append(moment)
        if moment == self.moment:
            raise ConnectionError("no\nanswer from sk-abcdefgh12345678")


class _FailingSession(TrackerSession):
    def __init__(self, owner: Failing) -> None:
        self.owner = owner

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.owner._at("log")

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        self.owner._at("finish")


@pytest.mark.parametrize(
    ("moment", "calls"),
    [("begin", ["begin"]), ("log", ["begin", "log"]), ("finish", ["begin", "log", "log", "log", "finish"])],
)
def test_a_failure_is_noted_once_and_stops_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], moment: str, calls: list[str]
) -> None:
    failing: list[str] = []
    sound: list[str] = []
    end(begin(tmp_path / "run", {"a": Failing(moment, failing), "b": Failing("never", sound)}))
    assert failing == calls
    assert sound == ["begin", "log", "log", "log", "finish"]
    out = capsys.readouterr().out
    assert out.startswith("note: tracking=a ")
    assert "no answer from ***" in out
    assert out.count("\n") == 1
    assert run_folder.read(tmp_path / "run")["status"] == "done"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_line_without_a_step_counts_as_the_first(tmp_path: Path) -> None:
    steps: list[int] = []

    class Steps(_FailingSession):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            steps.append(step)

    run = begin(tmp_path / "run", {})
    followed = base.TrackedRun(run.folder, run.record, run.lock, {"a": Steps(Failing("never", []))}, None)
    followed.log({"step": None, "epoch": None, "split": "validation", "metrics": {"mcc": 1.0}})
    assert steps == [0]


# -- what is asked for --


def test_choices() -> None:
    assert build_trackers(None) == {}
    assert build_trackers(OmegaConf.create({})) == {}
    node = OmegaConf.create({"mlflow": {"uri": None, "experiment": "mine"}, "tensorboard": {}})
    assert build_trackers(node) == {"mlflow": MLflow(uri=None, experiment="mine"), "tensorboard": TensorBoard()}


@pytest.mark.parametrize(
    ("node", "code", "key", "named"),
    [
        ({"mlfow": {}}, Code.UNKNOWN_CHOICE, "tracking.mlfow", "Did you mean mlflow?"),
        ({"mlflow": {"uri": None, "experiment": "x", "url": "y"}}, Code.UNKNOWN_KEY, "tracking.mlflow.url", "uri"),
        ({"tensorboard": {"folder": "x"}}, Code.UNKNOWN_KEY, "tracking.tensorboard.folder", ""),
    ],
)
def test_wrong_choices(node: dict[str, Any], code: Code, key: str, named: str) -> None:
    with refuses(code, key=key) as caught:
        build_trackers(OmegaConf.create(node))
    assert named in str(caught.value)


def test_what_is_missing_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    trackers = {
        "tensorboard": TensorBoard(),
        "mlflow": MLflow(uri="http://x", experiment="x"),
        "wandb": WeightsAndBiases(project="x", entity=None, mode=None),
        "trackio": Trackio(project="x", space_id=None),
    }
    for name, tracker in trackers.items():
        with refuses(Code.MISSING_PACKAGE, key="tracking") as caught:
            tracker.check()
        assert caught.value.value == name
        assert f"pip install 'lora-bench[{name}]'" in str(caught.value)
    monkeypatch.setattr(base, "find_spec", importlib.util.find_spec)
    if importlib.util.find_spec("mlflow"):
        with refuses(Code.MISSING, key="tracking.mlflow.uri") as caught:
            MLflow(uri=None, experiment="x").check()
        assert "MLFLOW_TRACKING_URI" in str(caught.value)
        MLflow(uri="http://x", experiment="x").check()
