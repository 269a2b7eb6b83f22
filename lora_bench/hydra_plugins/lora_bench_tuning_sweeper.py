"""The sweeper of the fair comparison: each method's rate is chosen first, on the selection split, from the same values.

tune/     each combination, but for seeds, with few pairs and one seed, and no look at the reported split
report/   each of them at its best rate, with all seeds
"""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from lora_bench.config.keys import key_of, split_override
from lora_bench.errors import Code, DivergedError, UserError
from lora_bench.hydra_plugins.lora_bench_grid_sweeper import PLACE, GridSweeper, GridSweeperConf, overrides_of, placed

CHOSEN, REPEATED = "optimizer.lr", "seed"


@dataclass
class TunedSweeperConf(GridSweeperConf):
    _target_: str = "hydra_plugins.lora_bench_tuning_sweeper.TunedSweeper"
    tune: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="tuned", node=TunedSweeperConf, provider="lora_bench")


class TunedSweeper(GridSweeper):
    """The grid in two stages.

    Args:
        tune: what is otherwise in the jobs that choose, nested as in the config.
    """

    def __init__(self, tune: dict[str, Any], **grid: Any) -> None:
        super().__init__(**grid)
        self.tune = overrides_of(tune)
        self.replaced = {key_of(override) for override in self.tune}
        self.combinations: list[list[str]] = []
        self.telling: set[str] = set()
        """Keys that tell a combination from others, but for what is chosen, repeated or only of one stage."""
        self.told: set[str] = set()
        """What has been said of these is not said again."""

    def _first(self, jobs: list[list[str]]) -> list[list[str]]:
        self.combinations = jobs
        keys = {key_of(text) for job in jobs for text in job}
        varying = {key for key in keys if len({_value(job, key) for job in jobs}) > 1}
        self.telling = varying - self.replaced - {CHOSEN, REPEATED}
        self._refuse_halving()
        rates = {_value(job, CHOSEN) for job in jobs}
        for rate in rates:
            with suppress(ValueError):
                float(rate)
                continue
            raise UserError(
                "is not a number",
                key=CHOSEN,
                value=rate,
                remedy="All methods get the same values.",
                code=Code.INVALID_VALUE,
            )
        if len(rates) < 2:
            remedy = f"Give {CHOSEN} several values, or take a sweep without choosing."
            raise UserError(
                "has one value, so there is nothing to choose", key=CHOSEN, remedy=remedy, code=Code.CONFLICT
            )
        left_out = self.replaced | {REPEATED}
        tuning = [[text for text in job if key_of(text) not in left_out] + self.tune for job in jobs]
        distinct = list({tuple(job): job for job in tuning}.values())
        return placed(distinct, "tune")

    def _later(self, jobs: list[list[str]]) -> list[list[str]]:
        """The combinations at any one rate."""
        any_rate = _value(jobs[0], CHOSEN)
        return placed((job for job in jobs if _value(job, CHOSEN) == any_rate), "report")

    def _next(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """Each combination, with all seeds, at the rate whose run has the best selection MCC.

        One of whose rates some have yet to be tried, because their runs failed, is left for when the sweep is resumed.
        """
        from lora_bench.records import run_folder, sweep_folder

        reported = [job for name, job in jobs.items() if name.startswith("report/")]
        scores: dict[str, dict[str, float | None]] = {}
        lacking: set[str] = set()
        for name, job in jobs.items():
            if name.startswith("tune/"):
                kind = self._kind(job)
                found = run_folder.read(folder / name) if (folder / name / "run.json").exists() else None
                if found is None or found["status"] not in sweep_folder.ENDED:
                    lacking.add(kind)
                mcc = found["metrics"].get("selection/mcc") if found and found["status"] == "done" else None
                scores.setdefault(kind, {})[_value(job, CHOSEN)] = mcc
        best: dict[str, str | None] = {}
        self.told |= {self._kind(job) for job in reported}
        for kind, of_kind in scores.items():
            if kind in self.told:
                continue
            self.told.add(kind)
            if kind in lacking:
                print(f"{kind or 'all'}: {CHOSEN} is not chosen yet, as runs that try it failed")
            else:
                best[kind] = self._choose(kind, of_kind)
        kept = [job for job in self.combinations if best.get(self._kind(job)) == _value(job, CHOSEN)]
        return placed(kept, "report", len(reported))

    def _expected(self, job: Sequence[str], error: Exception) -> bool:
        """A rate that is too high for choosing is told by its absence from the choice."""
        return isinstance(error, DivergedError) and any(text.startswith(f"{PLACE}=tune/") for text in job)

    def _kind(self, job: Sequence[str]) -> str:
        """What tells a job from others."""
        return " ".join(text for text in job if key_of(text) in self.telling)

    def _choose(self, kind: str, scores: dict[str, float | None]) -> str | None:
        told = ", ".join(f"{rate}: {'no result' if mcc is None else f'{mcc:.4f}'}" for rate, mcc in scores.items())
        worked = {rate: mcc for rate, mcc in scores.items() if mcc is not None}
        name = kind or "all"
        if not worked:
            print(f"{name}: none of the rates gave a result, so it is not reported ({told})")
            return None
        best = max(worked, key=worked.__getitem__)
        rates = sorted(scores, key=float)
        edge = " It is at the edge of the grid: another beyond may be better." if best in (rates[0], rates[-1]) else ""
        print(f"{name}: {CHOSEN}={best} is best on the selection split ({told}).{edge}")
        return best


def _value(job: Sequence[str], key: str) -> str:
    return next((split_override(text)[1] for text in reversed(job) if key_of(text) == key), "")
