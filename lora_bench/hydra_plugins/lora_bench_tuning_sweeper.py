"""The tuning sweeper: it first chooses each method's learning rate, from equal values, on the selection split.

tune/     each combination with one seed and few pairs, without an evaluation of the reported split
report/   each combination at its best learning rate, with all seeds
"""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from lora_bench.config.keys import key_of
from lora_bench.config.recorded_task import main_metric
from lora_bench.errors import Code, DivergedError, UserError
from lora_bench.hydra_plugins.lora_bench_grid_sweeper import (
    SUBDIR_KEY,
    GridSweeper,
    GridSweeperConf,
    in_subfolders,
    to_overrides,
)

TUNED_KEY, SEED_KEY = "optimizer.lr", "seed"


@dataclass
class TunedSweeperConf(GridSweeperConf):
    _target_: str = "hydra_plugins.lora_bench_tuning_sweeper.TunedSweeper"
    tune: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="tuned", node=TunedSweeperConf, provider="lora_bench")


class TunedSweeper(GridSweeper):
    """A grid sweep in two stages: tuning runs, then reported runs.

    Args:
        tune: settings that differ in the tuning runs, nested as in the configuration.
    """

    def __init__(self, tune: dict[str, Any], **grid: Any) -> None:
        super().__init__(**grid)
        self.tune = to_overrides(tune)
        self.replaced = {key_of(override) for override in self.tune}
        self.combinations: list[list[str]] = []
        self.method_keys: set[str] = set()
        """Keys that vary between methods: varying keys except the tuned key, the seed and the settings of one stage."""
        self.reported_methods: set[str] = set()
        """Methods whose choice was printed."""

    def _first_stage(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the tuning runs, in folders below `tune`: each combination with the `tune` settings, for one seed.

        Raises:
            UserError: there are fewer than two learning rates, one is not a number, or `pack.halving` is set.
        """
        self.combinations = jobs
        keys = {key_of(text) for job in jobs for text in job}
        varying = {key for key in keys if len({_value(job, key) for job in jobs}) > 1}
        self.method_keys = varying - self.replaced - {TUNED_KEY, SEED_KEY}
        self._refuse_halving()
        rates = {_value(job, TUNED_KEY) for job in jobs}
        for rate in rates:
            with suppress(ValueError):
                float(rate)
                continue
            raise UserError(
                "is not a number",
                key=TUNED_KEY,
                value=rate,
                remedy="Give learning rates; all methods try the same ones.",
                code=Code.INVALID_VALUE,
            )
        if len(rates) < 2:
            remedy = f"Give {TUNED_KEY} several values, or use a sweep without tuning."
            raise UserError(
                "has one value, so there is nothing to choose", key=TUNED_KEY, remedy=remedy, code=Code.CONFLICT
            )
        omitted = self.replaced | {SEED_KEY}
        tuning = [[text for text in job if key_of(text) not in omitted] + self.tune for job in jobs]
        distinct = list({tuple(job): job for job in tuning}.values())
        return in_subfolders(distinct, "tune")

    def _later_stages(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the reported runs at one learning rate, since the best one is not known yet."""
        any_value = _value(jobs[0], TUNED_KEY)
        return in_subfolders((job for job in jobs if _value(job, TUNED_KEY) == any_value), "report")

    def _next_stage(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """Return each combination with all seeds at its best learning rate on selection; print each choice, once.

        The best is that of the highest main metric.

        A method with a failed tuning run is omitted until the sweep is resumed, one without any result for good.
        """
        from lora_bench.records import run_folder, sweep_folder

        reported = [job for name, job in jobs.items() if name.startswith("report/")]
        scores: dict[str, dict[str, float | None]] = {}
        untried: set[str] = set()
        for name, job in jobs.items():
            if name.startswith("tune/"):
                method = self._method(job)
                run = run_folder.read(folder / name) if (folder / name / "run.json").exists() else None
                if run is None or run["status"] not in sweep_folder.FINAL_STATUSES:
                    untried.add(method)
                is_done = run is not None and run["status"] == "done"
                score = run["metrics"].get(f"selection/{main_metric(run)}") if run and is_done else None
                scores.setdefault(method, {})[_value(job, TUNED_KEY)] = score
        best: dict[str, str | None] = {}
        self.reported_methods |= {self._method(job) for job in reported}
        for method, scores_by_value in scores.items():
            if method in self.reported_methods:
                continue
            self.reported_methods.add(method)
            if method in untried:
                print(f"{method or 'all'}: {TUNED_KEY} is not chosen yet, because tuning runs failed")
            else:
                best[method] = self._choose(method, scores_by_value)
        chosen = [job for job in self.combinations if best.get(self._method(job)) == _value(job, TUNED_KEY)]
        return in_subfolders(chosen, "report", len(reported))

    def _is_expected(self, job: Sequence[str], error: Exception) -> bool:
        """Return whether a tuning run diverged: its learning rate is then not chosen."""
        return isinstance(error, DivergedError) and any(text.startswith(f"{SUBDIR_KEY}=tune/") for text in job)

    def _method(self, job: Sequence[str]) -> str:
        """Return the overrides that identify a job's method."""
        return " ".join(text for text in job if key_of(text) in self.method_keys)

    def _choose(self, method: str, scores: dict[str, float | None]) -> str | None:
        """Return the value of best score, the first of equals, or None if no run is done, and print the choice.

        Args:
            method: its overrides; empty if there is one method.
            scores: main metric on the selection split by value; None for a run that is not done.
        """
        results = ", ".join(
            f"{rate}: {'no result' if score is None else f'{score:.4f}'}" for rate, score in scores.items()
        )
        finished = {rate: score for rate, score in scores.items() if score is not None}
        name = method or "all"
        if not finished:
            print(f"{name}: no learning rate gave a result, so it is not reported ({results})")
            return None
        best = max(finished, key=finished.__getitem__)
        rates = sorted(scores, key=float)
        edge = (
            " It is at the edge of the grid: a value beyond it may be better." if best in (rates[0], rates[-1]) else ""
        )
        print(f"{name}: {TUNED_KEY}={best} is best on the selection split ({results}).{edge}")
        return best


def _value(job: Sequence[str], key: str) -> str:
    """Return the value that a job's last override of this key sets; empty without one."""
    return next((text.partition("=")[2] for text in reversed(job) if key_of(text) == key), "")
