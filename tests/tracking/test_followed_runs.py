"""What `train` tells a tracker through the whole of a run, beside what it writes into the run's folder."""

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
class Told:
    """What one run's following was told, in order."""

    folder: Path
    status: str
    config: dict[str, Any]
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    finished: list[tuple[str, dict[str, float]]] = field(default_factory=list)


TOLD: list[Told] = []


@dataclass(frozen=True)
class Stub(Tracker):
    package = "json"
    extra = "stub"
    breaks: bool

    def start(self, run: Run) -> TrackerSession:
        TOLD.append(Told(run.folder, run.record["status"], run.record["config"]))
        return StubSession(TOLD[-1], self.breaks)


class StubSession(TrackerSession):
    def __init__(self, told: Told, breaks: bool) -> None:
        self.told, self.breaks = told, breaks

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told.logged.append((step, dict(values)))
        if self.breaks:
            raise ConnectionError("gone")

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        self.told.finished.append((status, dict(values)))


ASKED = toy_run("trainer.max_steps=6", "trainer.eval_every=2", "+tracking.stub.breaks=false")


@pytest.fixture(autouse=True)
def told(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    monkeypatch.setitem(choices.TRACKERS, "stub", Stub)
    TOLD.clear()
    return TOLD


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


def as_told(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """What the run's own log says, as trackers get it."""
    found = []
    for line in lines(folder):
        values = {f"{line['split']}/{name}": value for name, value in line["metrics"].items() if value is not None}
        found.append((line["step"], values))
    return found


def without_loss(logged: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    return [(step, {k: v for k, v in values.items() if k != "train/loss"}) for step, values in logged]


def test_begin_every_evaluation_and_the_end(told: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    backward = Backward.__call__

    def noting(*arguments: Any) -> dict[int, float]:
        found = backward(*arguments)
        losses.append(found[0])
        return found

    monkeypatch.setattr(Backward, "__call__", noting)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 0
    (run,) = told
    found = record(run.folder)
    assert (run.folder, run.status, run.config) == (Path("run").absolute(), "running", found["config"])
    assert without_loss(run.logged) == as_told(run.folder)
    assert [(step, "selection/mcc" in values) for step, values in run.logged[:3]] == [(2, True), (4, True), (6, True)]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [values["train/loss"] for _, values in run.logged if "train/loss" in values] == pytest.approx(means)
    ((status, values),) = run.finished
    assert status == found["status"] == "done"
    expected = {f"{part}.{key}": value for part in ("params", "cost") for key, value in found[part].items()}
    assert values == {key: value for key, value in expected.items() if value is not None}
    assert values["cost.steps"] == 6


@pytest.mark.parametrize(("what", "status"), [("nan", "diverged"), ("error", "failed"), ("ctrl-c", "interrupted")])
def test_a_run_that_does_not_end_well(
    told: list[Told], monkeypatch: pytest.MonkeyPatch, what: str, status: str
) -> None:
    backward, calls = Backward.__call__, []

    def breaking(*arguments: Any) -> dict[int, float]:
        calls.append(what)
        if len(calls) < 4:
            return backward(*arguments)
        if what == "error":
            raise RuntimeError("a cable")
        if what == "ctrl-c":
            raise KeyboardInterrupt
        return dict.fromkeys(backward(*arguments), math.nan)

    monkeypatch.setattr(Backward, "__call__", breaking)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == (130 if what == "ctrl-c" else 1)
    (run,) = told
    assert [step for step, _ in run.logged] == [2]
    assert [ended for ended, _ in run.finished] == [status] == [record(run.folder)["status"]]


def test_what_goes_on_is_followed_from_where_it_went_on(told: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backward, "__call__", lambda *arguments: 1 / 0)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 1
    monkeypatch.undo()
    monkeypatch.setitem(choices.TRACKERS, "stub", Stub)
    monkeypatch.chdir(told[0].folder.parent)
    assert lora_bench("train", "resume=run").code == 0
    first, again = told
    assert ([status for status, _ in first.finished], first.logged) == (["failed"], [])
    assert without_loss(again.logged) == as_told(again.folder)
    assert [status for status, _ in again.finished] == ["done"]


def test_members_of_a_pack_are_followed_apart(told: list[Told]) -> None:
    assert lora_bench("train", "-m", *ASKED, "hydra.sweep.dir=sweep", "seed=0,1").code == 0
    assert [run.folder.name for run in told] == ["0", "1"]
    for run in told:
        assert without_loss(run.logged) == as_told(run.folder)
        assert [status for status, _ in run.finished] == ["done"]
    assert told[0].logged != told[1].logged


def test_a_tracker_that_breaks_is_left_behind(told: list[Told]) -> None:
    answer = lora_bench("train", *ASKED, "tracking.stub.breaks=true", "hydra.run.dir=run")
    assert answer.code == 0
    (line,) = (line for line in answer.out.splitlines() if line.startswith("note: tracking=stub "))
    assert "gone" in line
    (run,) = told
    assert (len(run.logged), run.finished) == (1, [])
    assert len(lines(run.folder)) == 4


def test_a_dry_run_is_followed_by_nobody(told: list[Told]) -> None:
    assert lora_bench("train", *ASKED, "dry_run=true").code == 0
    assert told == []
