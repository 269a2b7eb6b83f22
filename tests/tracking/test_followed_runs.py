"""A tracker receives from `train` the evaluations and the end of each run, as the run folder records them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.tracking import choices
from lora_bench.tracking.base import Tracker, TrackerSession
from lora_bench.training.cuda_graphs import Backward
from tests.command_line import lora_bench, toy_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.records.run_folder import Run


@dataclass
class Received:
    """The calls that one session received, in order."""

    folder: Path
    status: str
    config: dict[str, Any]
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    finished: list[tuple[str, dict[str, float]]] = field(default_factory=list)


RECEIVED: list[Received] = []


@dataclass(frozen=True)
class Stub(Tracker):
    package = "json"
    extra = "stub"
    breaks: bool

    def start(self, run: Run) -> TrackerSession:
        RECEIVED.append(Received(run.folder, run.record["status"], run.record["config"]))
        return StubSession(RECEIVED[-1], self.breaks)


class StubSession(TrackerSession):
    def __init__(self, received: Received, breaks: bool) -> None:
        self.received, self.breaks = received, breaks

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.received.logged.append((step, dict(values)))
        if self.breaks:
            raise ConnectionError("gone")

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        self.received.finished.append((status, dict(values)))


ASKED = toy_run("trainer.max_steps=6", "trainer.eval_every=2", "+tracking.stub.breaks=false")


@pytest.fixture(autouse=True)
def received(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Received]:
    monkeypatch.setitem(choices.TRACKERS, "stub", Stub)
    RECEIVED.clear()
    return RECEIVED


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


def as_received(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the lines of a run's log in the form that trackers receive."""
    evaluations = []
    for line in lines(folder):
        values = {f"{line['split']}/{name}": value for name, value in line["metrics"].items() if value is not None}
        evaluations.append((line["step"], values))
    return evaluations


def without_loss(logged: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    return [(step, {k: v for k, v in values.items() if k != "train/loss"}) for step, values in logged]


def test_begin_every_evaluation_and_the_end(received: list[Received], monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    backward = Backward.__call__

    def noting(*arguments: Any) -> dict[int, float]:
        by_member = backward(*arguments)
        losses.append(by_member[0])
        return by_member

    monkeypatch.setattr(Backward, "__call__", noting)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 0
    (run,) = received
    run_record = record(run.folder)
    assert (run.folder, run.status, run.config) == (Path("run").absolute(), "running", run_record["config"])
    assert without_loss(run.logged) == as_received(run.folder)
    assert [(step, "selection/mcc" in values) for step, values in run.logged[:3]] == [(2, True), (4, True), (6, True)]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [values["train/loss"] for _, values in run.logged if "train/loss" in values] == pytest.approx(means)
    ((status, values),) = run.finished
    assert status == run_record["status"] == "done"
    expected = {
        f"{section}.{key}": value for section in ("params", "cost") for key, value in run_record[section].items()
    }
    assert values == {key: value for key, value in expected.items() if value is not None}
    assert values["cost.steps"] == 6


@pytest.mark.parametrize(("fault", "status"), [("nan", "diverged"), ("error", "failed"), ("ctrl-c", "interrupted")])
def test_a_run_that_does_not_end_well(
    received: list[Received], monkeypatch: pytest.MonkeyPatch, fault: str, status: str
) -> None:
    backward, calls = Backward.__call__, []

    def breaking(*arguments: Any) -> dict[int, float]:
        calls.append(fault)
        if len(calls) < 4:
            return backward(*arguments)
        if fault == "error":
            raise RuntimeError("a cable")
        if fault == "ctrl-c":
            raise KeyboardInterrupt
        return dict.fromkeys(backward(*arguments), math.nan)

    monkeypatch.setattr(Backward, "__call__", breaking)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == (130 if fault == "ctrl-c" else 1)
    (run,) = received
    assert [step for step, _ in run.logged] == [2]
    assert [ended for ended, _ in run.finished] == [status] == [record(run.folder)["status"]]


def test_what_goes_on_is_followed_from_where_it_went_on(
    received: list[Received], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backward, "__call__", lambda *arguments: 1 / 0)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 1
    monkeypatch.undo()
    monkeypatch.setitem(choices.TRACKERS, "stub", Stub)
    monkeypatch.chdir(received[0].folder.parent)
    assert lora_bench("train", "resume=run").code == 0
    first, again = received
    assert ([status for status, _ in first.finished], first.logged) == (["failed"], [])
    assert without_loss(again.logged) == as_received(again.folder)
    assert [status for status, _ in again.finished] == ["done"]


def test_members_of_a_pack_are_followed_apart(received: list[Received]) -> None:
    assert lora_bench("train", "-m", *ASKED, "hydra.sweep.dir=sweep", "seed=0,1").code == 0
    assert [run.folder.name for run in received] == ["0", "1"]
    for run in received:
        assert without_loss(run.logged) == as_received(run.folder)
        assert [status for status, _ in run.finished] == ["done"]
    assert received[0].logged != received[1].logged


def test_a_tracker_that_breaks_is_left_behind(received: list[Received]) -> None:
    answer = lora_bench("train", *ASKED, "tracking.stub.breaks=true", "hydra.run.dir=run")
    assert answer.code == 0
    (line,) = (line for line in answer.out.splitlines() if line.startswith("note: tracking=stub "))
    assert "gone" in line
    (run,) = received
    assert (len(run.logged), run.finished) == (1, [])
    assert len(lines(run.folder)) == 4


def test_a_dry_run_is_followed_by_nobody(received: list[Received]) -> None:
    assert lora_bench("train", *ASKED, "dry_run=true").code == 0
    assert received == []
