"""The search: trials out of sight of the reported split, eliminated in packs, and the winner with fresh seeds."""

from __future__ import annotations

import importlib.util
import json
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench import api
from lora_bench.errors import Code
from lora_bench.records import sweep_folder
from lora_bench.training import loop
from tests.command_line import files_below, interrupt_and_resume, lora_bench, refused, signalled, toy_run

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = ["adapter=lora,bitfit", "adapter.rank=1,2", "optimizer.lr=tag(log,interval(1e-3,1e-1))"]
TASK = toy_run("trainer.max_steps=4", "pack.size=2", "seed=7")
REQUEST = [*TASK, *SPACE, "search.trials=4", "search.final_seeds=2"]
FOLDER = "hydra.sweep.dir=sweep"
in_empty_folder = pytest.mark.usefixtures("in_tmp")


def records(sweep: Path, stage: str) -> list[dict[str, Any]]:
    paths = sorted(Path(sweep, stage).glob("*/run.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


def results(sweep: Path, stage: str) -> list[tuple[Any, ...]]:
    """Return method, rank, learning rate, seed, status and selection MCC of each run of a stage."""
    return [
        (
            record["choices"]["adapter"],
            record["config"]["adapter"].get("rank"),
            record["config"]["optimizer"]["lr"],
            record["config"]["seed"],
            record["status"],
            record["metrics"].get("selection/mcc"),
        )
        for record in records(sweep, stage)
    ]


@contextmanager
def learning_rate_as_score() -> Iterator[None]:
    """Make the selection MCC of a run its learning rate."""
    update_best = loop.update_best

    def by_rate(member: Any, *arguments: Any, **options: Any) -> Any:
        line = update_best(member, *arguments, **options)
        line["metrics"]["mcc"] = member.settings.lr
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update_best", by_rate)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> api.SearchResult:
    """A search that was not interrupted: two packs of two trials, two repeats and two final runs."""
    with learning_rate_as_score():
        return api.search(*REQUEST, folder=tmp_path_factory.mktemp("search") / "whole", quiet=True)


def test_the_best_trial_on_selection_is_trained_again_and_reported(whole: api.SearchResult) -> None:
    trials = results(whole.folder, "trials")
    assert [row[:4] for row in trials[:2]] == [("lora", 2, 1e-3, 7), ("bitfit", None, 1e-3, 7)]  # nearest to defaults
    assert sorted(row[4] for row in trials) == ["done", "done", "eliminated", "eliminated"]
    assert all(run.record["config"]["data"]["report"] is False for run in whole.trials)
    assert not any("validation" in key for run in whole.trials for key in run.metrics)
    done = sorted((row for row in trials if row[4] == "done"), key=lambda row: -row[5])
    assert [row[:4] for row in results(whole.folder, "repeats")] == [(*row[:3], 10) for row in done]
    assert not any("validation" in key for run in whole.repeats for key in run.metrics)
    best = done[0]
    assert [row[:4] for row in results(whole.folder, "final")] == [(*best[:3], 8), (*best[:3], 9)]
    assert whole.best["adapter"] == best[0]
    assert (whole.best.get("adapter.rank"), whole.best["optimizer.lr"]) == best[1:3]
    assert all("validation/mcc" in run.metrics and run.record["cost"]["pack_size"] == 2 for run in whole.final)
    assert all("search" not in run.record["config"] for run in [*whole.trials, *whole.final])
    frame = api.compare(whole.folder)
    assert list(frame["n"]) == [2]
    assert "6 runs that only chose a setting (data.report=false) are not shown" in frame.attrs["notes"]


@in_empty_folder
def test_a_killed_search_resumes_without_losing_a_trial(
    whole: api.SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with learning_rate_as_score():
        answers = interrupt_and_resume(
            monkeypatch, ["sweep=search", *REQUEST, FOLDER], (2, 7, 9)
        )  # in a pack, in a repeat, in a final run
    assert [answer.code for answer in answers] == [130, 130, 130, 0]
    assert "4 trials: 2 done, 2 eliminated" in answers[-1].out
    assert f"of a grid of {2 * 4 + 4} settings" in answers[-1].out
    for stage in ("trials", "repeats", "final"):
        assert results(Path("sweep"), stage) == results(whole.folder, stage)
    before = files_below(Path("sweep/trials"))
    assert lora_bench("search", "resume=sweep").code == 0
    assert files_below(Path("sweep/trials")) == before


@in_empty_folder
def test_a_search_that_was_killed_between_packs_is_the_last_unfinished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    request = [*TASK, "adapter.rank=1,2", "search.trials=2", "search.repeats=0", "search.final_seeds=1"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep_folder, "extend", signalled(signal.SIGTERM))
        assert lora_bench("search", *request).code == 143
    answer = lora_bench("train", "resume=last")
    assert answer.code == 0, answer
    assert "3/3  job 2: final/0" in answer.out
    assert lora_bench("train", "resume=last").code == 2  # nothing is left


@in_empty_folder
def test_a_search_without_a_trial_that_ends_well_fails() -> None:
    wild = ["optimizer.lr=1e37,1e38", "optimizer.grad_clip_norm=null", "optimizer.warmup=0"]
    answer = lora_bench("search", *TASK, "adapter.rank=2", *wild, "search.trials=4", FOLDER)
    assert answer.code == 1
    assert {record["status"] for record in records(Path("sweep"), "trials")} == {"diverged"}
    assert answer.error is not None
    assert answer.error.code == Code.UNFINISHED


@in_empty_folder
def test_a_dry_run_estimates_and_leaves_nothing() -> None:
    answer = lora_bench("search", *TASK, "adapter.rank=1,2", "optimizer.lr=1e-3", "search.trials=2", "dry_run=true")
    assert (answer.code, answer.err) == (0, "")
    assert "final runs" in answer.out
    assert not files_below(Path.cwd())


@in_empty_folder
@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        (SPACE, Code.MISSING, "search.trials"),
        ([*SPACE, "search.trials=0"], Code.INVALID_VALUE, "search.trials"),
        ([*SPACE, "search.flops=0"], Code.INVALID_VALUE, "search.flops"),
        ([*SPACE, "search.trials=5", "search.repeats=-1"], Code.INVALID_VALUE, "search.repeats"),
        ([*SPACE, "search.minutes=-1"], Code.INVALID_VALUE, "search.minutes"),
        ([*SPACE, "search.trails=5"], Code.UNKNOWN_KEY, "search.trails"),
        ([*SPACE, "search.trials=5", "pack.size=null"], Code.INVALID_VALUE, "pack.size"),
        (["search.trials=5", "adapter.rnak=1,2"], Code.UNKNOWN_KEY, "adapter.rnak"),
        (["search.trials=5", "adapter=lora,lroa"], Code.UNKNOWN_CHOICE, "adapter"),
        (["search.trials=5", "adapter.rank=0,2"], Code.INVALID_VALUE, "adapter.rank"),
        (["search.trials=5", "optimizer.lr=interval(-1,1)"], Code.INVALID_VALUE, "optimizer.lr"),
        (["search.trials=5", "optimizer.lr=interval(1,1)"], Code.EMPTY, "optimizer.lr"),
        (["search.trials=5", "seed=0,1"], Code.UNSUPPORTED, "seed"),
        (["search.trials=5", "adapter.rank=2", "optimizer.lr=1e-3"], Code.MISSING, "search"),
        (["search.trials=5", "sweep=rank"], Code.CONFLICT, "sweep"),
        (
            ["search.trials=5", "hydra.sweeper.variants=['','adapter.rank=2']"],
            Code.UNSUPPORTED,
            "hydra.sweeper.variants",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_wrong_request_is_refused(arguments: list[str], code: Code, key: str) -> None:
    error = refused("search", *(text for text in toy_run() if text != "pack.size=16"), *arguments)
    assert (error.code, error.key) == (code, key)


@in_empty_folder
def test_without_optuna_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find_spec(name, *rest)
    )
    assert refused("search", *REQUEST).code == Code.MISSING_PACKAGE


@in_empty_folder
def test_the_sweeper_needs_its_settings() -> None:
    assert refused("train", "-m", *TASK, *SPACE, "hydra/sweeper=search").key == "hydra/sweeper"
