"""Callbacks: they follow runs in training, stop them early, and leave a record that can be resumed if they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench import api
from lora_bench.errors import Code
from tests.command_line import TOY_RUN, files_below, refuses, toy_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOY = toy_run("trainer.max_steps=4", "trainer.eval_every=2")
pytestmark = pytest.mark.usefixtures("in_tmp")


class Listener(api.Callback):
    """Notes every call, tries to change what it is given, and acts at one step."""

    def __init__(self, step: int = 0, *, error: Exception | None = None) -> None:
        self.at, self.error = step, error
        self.steps: list[tuple[str, int, int, int]] = []
        self.lines: list[tuple[str, str, int]] = []
        self.ends: list[tuple[str, str]] = []

    def on_step(self, run: api.ActiveRun, step: int, losses: Sequence[float], pairs: int) -> None:
        self.steps.append((run.folder.name, step, len(losses), pairs))
        run.record["config"].clear()
        if step == self.at and self.error is not None:
            raise self.error
        run.should_stop = step == self.at

    def on_evaluation(self, run: api.ActiveRun, member: str, line: Mapping[str, Any]) -> None:
        assert run.record["config"]["trainer"]["eval_every"] == 2
        self.lines.append((run.folder.name, member, line["step"]))
        line["metrics"].clear()

    def on_end(self, run: api.TrainedRun) -> None:
        self.ends.append((run.folder.name, run.record["status"]))
        assert json.loads((run.folder / "run.json").read_text()) == run.record
        run.record.clear()


def test_hooks_follow_a_run_and_change_nothing_in_its_record() -> None:
    listener = Listener()
    run = api.train(*TOY, "ensemble.members=2", folder="run", callbacks=[listener], quiet=True)
    assert listener.steps == [("run", step, 2, pairs) for step, pairs in zip((1, 2, 3, 4), (32, 4, 32, 4), strict=True)]
    assert listener.lines == [("run", member, step) for step in (2, 4) for member in ("member_0", "member_1")]
    assert listener.ends == [("run", "done")]
    assert run.metrics == api.train(*TOY, "ensemble.members=2", quiet=True).metrics


@pytest.mark.parametrize(("adapter", "stop", "end"), [("lora", 1, 1), ("adalora", 1, 3)])
def test_a_run_that_is_stopped_is_evaluated_and_done(adapter: str, stop: int, end: int) -> None:
    listener = Listener(stop)
    listener.on_evaluation = lambda *_: None  # type: ignore[method-assign]
    run = api.train(*TOY, f"adapter={adapter}", callbacks=[listener], quiet=True)
    assert (run.record["status"], run.record["cost"]["steps"]) == ("done", end)
    assert run.record["selection"]["step"] == end
    assert run.metrics["validation/mcc"] is not None


def test_a_run_whose_callback_fails_is_resumed() -> None:
    error = ValueError("nothing to plot")
    with pytest.raises(ValueError, match="nothing to plot") as caught:
        api.train(*TOY, folder="run", callbacks=[Listener(3, error=error)], quiet=True)
    assert caught.value is error
    assert "kept up to step 2. Resume it with: lora-bench train resume=" in error.__notes__[0]
    record = json.loads(Path("run/run.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", "a callback raised ValueError: nothing to plot")
    listener = Listener()
    resumed = api.train(resume="run", callbacks=[listener], quiet=True)
    assert [step for _, step, _, _ in listener.steps] == [3, 4]
    assert resumed.metrics == api.train(*TOY, quiet=True).metrics


def test_a_failure_at_the_end_of_a_run_leaves_it_done() -> None:
    class AtEnd(api.Callback):
        def on_end(self, run: api.TrainedRun) -> None:
            raise RuntimeError(run.record["status"])

    with pytest.raises(RuntimeError, match="done"):
        api.train(*TOY_RUN, folder="run", callbacks=[AtEnd()], quiet=True)
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"


def test_a_search_whose_callback_fails_is_resumed() -> None:
    request = [*toy_run("trainer.max_steps=4", "pack.size=2"), "trainer.eval_every=2", "adapter=lora"]
    request += ["adapter.rank=1,2,3", "optimizer.lr=1e-3", "pack.halving=false"]
    request += ["search.trials=3", "search.repeats=0", "search.final_seeds=1"]

    class InThirdTrial(Listener):
        def on_evaluation(self, run: api.ActiveRun, member: str, line: Mapping[str, Any]) -> None:
            if run.folder.parts[-2:] == ("trials", "2"):
                raise OSError("the server is gone")

    with pytest.raises(OSError, match="server is gone") as caught:
        api.search(*request, folder="search", callbacks=[InThirdTrial()], quiet=True)
    assert "2 of 3 jobs are done" in caught.value.__notes__[0]
    listener = Listener()
    result = api.search(resume="search", callbacks=[listener], quiet=True)
    assert [run.record["status"] for run in result.trials] == ["done"] * 3
    assert listener.ends == [("2", "done"), ("0", "done")]  # the trial that was interrupted, and the final run


def test_wrong_requests_are_refused() -> None:
    with refuses(Code.INVALID_VALUE, key="callbacks"):
        api.train(*TOY_RUN, callbacks=[Listener])  # type: ignore[list-item]
    with refuses(Code.INVALID_VALUE, key="callbacks"):
        api.train(*TOY_RUN, callbacks=[print])  # type: ignore[list-item]
    with refuses(Code.CONFLICT, key="pack.workers"):
        api.sweep(*TOY_RUN, "seed=0,1", "pack.workers=2", callbacks=[Listener()])
    assert not files_below(Path.cwd())


def test_processes_that_cannot_call_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0"]
    with refuses(Code.CONFLICT, key="hydra/launcher"):
        api.sweep(*TOY_RUN, "seed=0,1", *slurm, callbacks=[Listener()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses(Code.UNSUPPORTED, key="callbacks"):
        api.train(*TOY_RUN, callbacks=[Listener()])
    assert not files_below(Path.cwd())
