"""The sweeper of the transfer matrix: what is learned of one task, how well does it serve another?

train/    each task by itself, and all in one adapter where asked for; then every run is scored on the others as it is
few/      each task from few examples, from every other task's adapter, from that of all and from none
"""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from lora_bench.config.keys import key_of, split_override
from lora_bench.errors import Code, DivergedError, UserError, quoted
from lora_bench.hydra_plugins.lora_bench_grid_sweeper import PLACE, GridSweeper, GridSweeperConf, overrides_of, placed
from lora_bench.records.sweep_folder import read
from lora_bench.records.task_folders import folder_of
from lora_bench.sweeps import transfer_matrix
from lora_bench.sweeps.transfer_matrix import EVERYTHING, source_of, task_of, told_of


@dataclass
class TransferSweeperConf(GridSweeperConf):
    _target_: str = "hydra_plugins.lora_bench_transfer_sweeper.TransferSweeper"
    shots: list[int] = field(default_factory=list)
    few: dict[str, Any] = field(default_factory=dict)
    together: bool = False


ConfigStore.instance().store(group="hydra/sweeper", name="transfer", node=TransferSweeperConf, provider="lora_bench")


class TransferSweeper(GridSweeper):
    """The grid, whose combinations differ in their data, in two stages.

    Args:
        shots: examples of the second task that are trained on, each in runs of its own.
        few: what is otherwise in those runs, nested as in the config.
        together: whether all tasks are also learned together.
    """

    def __init__(self, shots: Sequence[int], few: dict[str, Any], together: bool, **grid: Any) -> None:
        super().__init__(**grid)
        self.shots = list(shots)
        self.few = overrides_of(few)
        self.together = together
        self.combinations: list[list[str]] = []
        """The runs of the first stage: those of one task, and behind them those of all."""
        self.scored: set[tuple[str, str]] = set()

    def _first(self, jobs: list[list[str]]) -> list[list[str]]:
        self.combinations = jobs
        self._refuse_halving()
        tasks = {task_of(job): told_of(job) for job in jobs}
        for job in jobs:
            if told_of(job) != tasks[task_of(job)]:
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
                "there is one task, so nothing to transfer to", key="data", remedy=remedy, code=Code.CONFLICT
            )
        if self.together:
            self.combinations = [*jobs, *self._of_all(jobs)]
        return placed(self.combinations, "train")

    @staticmethod
    def _of_all(jobs: list[list[str]]) -> Iterator[list[str]]:
        """For each setting of whatever else varies, the run that learns all its tasks."""
        if any("data.path" in told_of(job) for job in jobs):
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

    def _later(self, jobs: list[list[str]]) -> list[list[str]]:
        folder = Path(self.config.hydra.sweep.dir) if self.config else Path()
        return placed(self._from_few(folder, range(len(self.combinations))), "few")

    def _next(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """What was trained is scored on the other tasks; then each task from few examples, as far as it is not yet."""
        from lora_bench.records import run_folder

        done = []
        for number in range(len(self.combinations)):
            place = folder / f"train/{number}"
            if (place / "run.json").exists() and run_folder.read(place)["status"] == "done":
                done.append(number)
                self._score_elsewhere(place, self.combinations[number])
        known = [_without_place(job) for name, job in jobs.items() if name.startswith("few/")]
        new = [job for job in self._from_few(folder, done) if _without_place(job) not in known]
        return placed(new, "few", len(known))

    def _from_few(self, folder: Path, sources: Sequence[int]) -> Iterator[list[str]]:
        """The jobs of the second stage: of each task and number of examples, from none and from each source."""
        replaced = {key_of(text) for text in self.few} | {"data.train_size"}
        for job in self.combinations:
            if task_of(job) == EVERYTHING:
                continue
            own = [text for text in job if key_of(text) not in replaced]
            others = [k for k in sources if _fits(self.combinations[k], job)]
            places = {k: (folder / f"train/{k}").absolute() for k in others}
            several = [k for k in others if task_of(self.combinations[k]) == EVERYTHING]
            places |= {k: folder_of(places[k], task_of(job)) for k in several}
            starts = [f"adapter.init_from={quoted(place)}" for place in places.values()]
            for shots in self.shots:
                for start in ([], *([start] for start in starts)):
                    yield [*own, *self.few, f"data.train_size={shots}", *start]

    def _score_elsewhere(self, place: Path, job: list[str]) -> None:
        """Score a run of one task on each other task of the sweep, where that has not been done."""
        if task_of(job) == EVERYTHING:
            return
        from rich.console import Console

        from lora_bench.config.compose import compose
        from lora_bench.config.groups import conf_folder
        from lora_bench.evaluate import run_eval  # torch: late

        for other in self.combinations:
            name = task_of(other)
            if name == EVERYTHING or not _fits(job, other) or (str(place), name) in self.scored:
                continue
            self.scored.add((str(place), name))
            if (place / f"evaluations/{name}.json").exists():
                continue
            asked = [text for text in other if key_of(text).split(".")[0] == "data" and "augment" not in key_of(text)]
            cfg = compose(conf_folder(), "eval", asked, read(place.parent.parent).config_dir)
            cfg.run, cfg.name = str(place), name
            try:
                run_eval(cfg, data_choice=name, console=Console(quiet=True))
            except UserError as error:
                print(f"{task_of(job)} is not scored on {name}: {error}")

    def _expected(self, job: Sequence[str], error: Exception) -> bool:
        return isinstance(error, DivergedError)  # an empty place in the matrix

    def _conclude(self, folder: Path) -> None:
        print()
        print(transfer_matrix.write(folder))


def _without_place(job: Sequence[str]) -> list[str]:
    """What tells jobs of the second stage apart, wherever the sweep's folder lies."""
    starts = [source_of(split_override(text)[1].strip("'")) for text in job if key_of(text) == "adapter.init_from"]
    rest = [text for text in job if key_of(text) not in (PLACE, "adapter.init_from")]
    return [*rest, *map(str, starts)]


def _fits(source: Sequence[str], target: Sequence[str]) -> bool:
    """Whether two combinations differ in their task and in nothing else."""

    def rest(job: Sequence[str]) -> list[str]:
        return [text for text in job if key_of(text).split(".")[0] != "data"]

    return rest(source) == rest(target) and told_of(source) != told_of(target)
