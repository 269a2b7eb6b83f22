"""The transfer sweeper: how well does an adapter of one task serve another task?

train/    each task as a single run, and optionally all tasks in one adapter; each run is scored zero-shot on the others
few/      each task from few examples, initialised from each other task's adapter, from that of all, and from none
"""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import open_dict

from lora_bench.analysis.table import Table
from lora_bench.config.keys import key_of
from lora_bench.errors import Code, DivergedError, UserError, quoted
from lora_bench.hydra_plugins.lora_bench_grid_sweeper import (
    SUBDIR_KEY,
    GridSweeper,
    GridSweeperConf,
    in_subfolders,
    to_overrides,
)
from lora_bench.records.sweep_folder import read
from lora_bench.records.task_folders import task_folder
from lora_bench.sweeps import transfer_matrix
from lora_bench.sweeps.transfer_matrix import ALL_TASKS, data_overrides, source_of, task_of


@dataclass
class TransferSweeperConf(GridSweeperConf):
    _target_: str = "hydra_plugins.lora_bench_transfer_sweeper.TransferSweeper"
    shots: list[int] = field(default_factory=list)
    few: dict[str, Any] = field(default_factory=dict)
    together: bool = False


ConfigStore.instance().store(group="hydra/sweeper", name="transfer", node=TransferSweeperConf, provider="lora_bench")


class TransferSweeper(GridSweeper):
    """A grid sweep over data sets in two stages; the jobs of both are checked before the first one starts.

    Args:
        shots: numbers of training examples of the target task in the second stage.
        few: settings that differ in the second stage, nested as in the configuration.
        together: add runs of the first stage that learn all tasks.
        grid: settings of `GridSweeper`.
    """

    def __init__(self, shots: Sequence[int], few: dict[str, Any], together: bool, **grid: Any) -> None:
        super().__init__(**grid)
        self.shots = list(shots)
        self.few = to_overrides(few)
        self.together = together
        self.combinations: list[list[str]] = []
        """The jobs of the first stage: first those of one task, then those of all tasks."""
        self.scored: set[tuple[str, str]] = set()
        """Pairs of a run's folder and a task that were tried in this process."""

    def _first_stage(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the jobs of the first stage, in folders below `train`.

        Raises:
            UserError: there is one task only, two tasks have one name, or `pack.halving` is set.
        """
        self.combinations = jobs
        self._refuse_halving()
        tasks = {task_of(job): data_overrides(job) for job in jobs}
        for job in jobs:
            if data_overrides(job) != tasks[task_of(job)]:
                raise UserError(
                    "two tasks have one name",
                    key="data",
                    value=task_of(job),
                    remedy="Rename one.",
                    code=Code.CONFLICT,
                )
        if len(tasks) < 2:
            remedy = "Give data several values."
            raise UserError(
                "has one task, so there is no transfer to measure", key="data", remedy=remedy, code=Code.CONFLICT
            )
        if self.together:
            self.combinations = [*jobs, *self._of_all(jobs)]
        return in_subfolders(self.combinations, "train")

    @staticmethod
    def _of_all(jobs: list[list[str]]) -> Iterator[list[str]]:
        """Yield the job that learns all tasks, for each combination of the other settings.

        Raises:
            UserError: a task is given by `data.path`.
        """
        if any("data.path" in data_overrides(job) for job in jobs):
            remedy = "Write a YAML for each task, and give --config-dir=DIR data=one,other."
            raise UserError(
                "needs tasks that are choices of data, not folders",
                key="hydra.sweeper.together",
                remedy=remedy,
                code=Code.CONFLICT,
            )
        settings: dict[tuple[str, ...], list[str]] = {}
        for job in jobs:
            rest = tuple(text for text in job if key_of(text) != "data")
            settings.setdefault(rest, []).append(task_of(job))
        for rest, names in settings.items():
            yield [*rest, f"data.tasks=[{','.join(names)}]"]

    def _later_stages(self, jobs: list[list[str]]) -> list[list[str]]:
        folder = Path(self.config.hydra.sweep.dir) if self.config else Path()
        return in_subfolders(self._from_few(folder, range(len(self.combinations))), "few")

    def _next_stage(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """Score the finished runs on the other tasks; return the few-shot jobs that are new."""
        from lora_bench.records import run_folder

        done = []
        for number in range(len(self.combinations)):
            run = folder / f"train/{number}"
            if (run / "run.json").exists() and run_folder.read(run)["status"] == "done":
                done.append(number)
                self._score_zero_shot(run, self.combinations[number])
        older = [_without_folders(job) for name, job in jobs.items() if name.startswith("few/")]
        new = [job for job in self._from_few(folder, done) if _without_folders(job) not in older]
        return in_subfolders(new, "few", len(older))

    def _from_few(self, folder: Path, sources: Sequence[int]) -> Iterator[list[str]]:
        """Yield the jobs of the second stage: each task and number of examples, without a source and from each source.

        Args:
            folder: of the sweep.
            sources: numbers of the first stage's jobs that adapters are taken from.
        """
        replaced = {key_of(text) for text in self.few} | {"data.train_size"}
        for job in self.combinations:
            if task_of(job) == ALL_TASKS:
                continue
            settings = [text for text in job if key_of(text) not in replaced]
            fitting = [k for k in sources if _differ_in_task(self.combinations[k], job)]
            runs = {k: (folder / f"train/{k}").absolute() for k in fitting}
            multitask = [k for k in fitting if task_of(self.combinations[k]) == ALL_TASKS]
            runs |= {k: task_folder(runs[k], task_of(job)) for k in multitask}
            initialisations = [[], *([f"adapter.init_from={quoted(run)}"] for run in runs.values())]
            for shots in self.shots:
                for initialisation in initialisations:
                    yield [*settings, *self.few, f"data.train_size={shots}", *initialisation]

    def _score_zero_shot(self, run: Path, job: list[str]) -> None:
        """Score a run of one task on each other task of the sweep, unless its folder holds those results.

        Only combinations that differ in the task alone count. What cannot be scored is printed and not tried again.
        """
        if task_of(job) == ALL_TASKS:
            return
        from rich.console import Console

        from lora_bench.config.compose import compose
        from lora_bench.config.groups import conf_folder
        from lora_bench.evaluate import run_eval  # torch: late
        from lora_bench.run.evaluation_request import EvaluationRequest

        for other in self.combinations:
            name = task_of(other)
            if name == ALL_TASKS or not _differ_in_task(job, other) or (str(run), name) in self.scored:
                continue
            self.scored.add((str(run), name))
            if (run / f"evaluations/{name}.json").exists():
                continue
            overrides = [
                text for text in other if key_of(text).split(".")[0] == "data" and "augment" not in key_of(text)
            ]
            cfg = compose(conf_folder(), "eval", overrides, read(run.parent.parent).config_dir)
            with open_dict(cfg):
                cfg.pop("hydra")
            cfg.run, cfg.name = str(run), name
            try:
                run_eval(EvaluationRequest.read(cfg, name), console=Console(quiet=True))
            except UserError as error:
                print(f"{task_of(job)} cannot be scored on {name}: {error}")

    def _is_expected(self, job: Sequence[str], error: Exception) -> bool:
        return isinstance(error, DivergedError)  # an empty cell of the matrix

    def _conclude(self, folder: Path, table: Table) -> None:
        print()
        print(transfer_matrix.write(folder))


def _without_folders(job: Sequence[str]) -> list[str]:
    """Return a key of a job of the second stage that does not depend on the sweep's path."""
    sources = [source_of(text.partition("=")[2].strip("'")) for text in job if key_of(text) == "adapter.init_from"]
    rest = [text for text in job if key_of(text) not in (SUBDIR_KEY, "adapter.init_from")]
    return [*rest, *map(str, sources)]


def _differ_in_task(source: Sequence[str], target: Sequence[str]) -> bool:
    """Return whether two combinations differ in their task and in nothing else."""

    def rest(job: Sequence[str]) -> list[str]:
        return [text for text in job if key_of(text).split(".")[0] != "data"]

    return rest(source) == rest(target) and data_overrides(source) != data_overrides(target)
