"""The trials of a search as their records tell them: settings, scores, cost, and what the budget still allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_bench.config.recorded_task import main_metric
from lora_bench.files.untrusted import as_number
from lora_bench.records import metrics_log, run_folder, sweep_folder
from lora_bench.training.successive_halving import members_by_step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.config.schema import Packing, Search

TRIALS, REPEATS, FINAL = "trials", "repeats", "final"
"""The folders of the three stages below that of the search."""
JobT = TypeVar("JobT", bound="Sequence[str]")
UNREPORTED = "data.report=false"
"""The override of every trial that stands before its setting: the reported splits are not scored."""


def of_stage(jobs: Mapping[str, JobT], stage: str) -> dict[str, JobT]:
    """Return the jobs whose folders are below that of a stage."""
    return {name: job for name, job in jobs.items() if name.startswith(f"{stage}/")}


def setting_of(job: Sequence[str]) -> list[str]:
    """Return the overrides of a trial's job that set the searched keys: those after `UNREPORTED`, its seed left out."""
    start = max((i for i, text in enumerate(job) if text == UNREPORTED), default=len(job))
    return [text for text in job[start + 1 :] if not text.startswith(("hydra.", "seed="))]


@dataclass(frozen=True)
class Trial:
    """A trial of a search, as far as it has been trained."""

    setting: list[str]
    """The overrides that set the keys of the space."""
    status: str | None = None
    """Of its record; None without one."""
    score: float | None = None
    """Main metric on the selection split; None if the trial is not done."""
    ranked_by: float | None = None
    """AUROC on the selection split where the task has it, else the main metric; None if the trial is not done."""
    curve: tuple[tuple[float, float], ...] = ()
    """Step and the metric of `ranked_by` at each of its evaluations."""
    metric: str = ""
    """The name of the main metric."""
    flops: float = 0.0
    """FLOPs of its training so far."""
    steps: int = 0
    """Optimizer updates so far."""
    period: tuple[datetime, datetime] | None = None
    """Start and end of its training; None while it has not ended."""

    @property
    def has_ended(self) -> bool:
        """True if the trial is done, eliminated or diverged: its result does not change any more."""
        return self.status in (*sweep_folder.FINAL_STATUSES, "eliminated")


def read_trials(folder: Path, jobs: Mapping[str, list[str]]) -> list[Trial]:
    """Return the trials of a search in their order.

    Args:
        folder: of the search.
        jobs: overrides of each job, by its folder below that of the search.

    Raises:
        UserError: a record is damaged.
    """
    return _read_stage(folder, jobs, TRIALS)


def read_repeats(folder: Path, jobs: Mapping[str, list[str]]) -> list[Trial]:
    """Return the repeats of the best trials, like `read_trials`."""
    return _read_stage(folder, jobs, REPEATS)


def _read_stage(folder: Path, jobs: Mapping[str, list[str]], stage: str) -> list[Trial]:
    return [_read_trial(folder / name, setting_of(job)) for name, job in of_stage(jobs, stage).items()]


def _read_trial(folder: Path, setting: list[str]) -> Trial:
    """Return the trial whose run is in `folder`."""
    if not run_folder.holds_run(folder):
        return Trial(setting)
    record = run_folder.read(folder)
    metric, cost = main_metric(record), record["cost"] or {}
    metrics = (record["metrics"] or {}) if record["status"] == "done" else {}
    score, auroc = (as_number(metrics.get(f"selection/{name}")) for name in (metric, "auroc"))
    log = folder / run_folder.METRICS_FILE
    return Trial(
        setting,
        record["status"],
        score,
        score if auroc is None else auroc,
        tuple(metrics_log.selection_curve(log, "auroc") or metrics_log.selection_curve(log, metric)),
        metric,
        as_number(cost.get("train_flops")) or 0.0,
        int(as_number(cost.get("steps")) or 0),
        _period(record),
    )


def _period(record: Mapping[str, Any]) -> tuple[datetime, datetime] | None:
    """Return the start and the end of a recorded run; None if it has not ended or a time is not valid."""
    try:
        start, end = (datetime.fromisoformat(str(record[key])).astimezone(UTC) for key in ("created", "finished"))
    except (ValueError, OverflowError):
        return None
    return (start, end) if start <= end else None


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the done trial with the best score, the first of equals; None if none is done."""
    return next(iter(best_trials(trials, 1)), None)


def best_trials(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Return at most `count` done trials with the best scores, the best one first; of equals the first ones."""
    done = [trial for trial in trials if trial.score is not None]
    return sorted(done, key=lambda trial: trial.score or 0.0, reverse=True)[:count]


def best_repeated(trials: Sequence[Trial], repeats: Sequence[Trial]) -> Trial | None:
    """Return the best of the repeated trials, with the means of both seeds as its scores; None without one.

    That is the one with the best mean of the main metric. Of those that are no more than a standard error below it
    (Breiman et al. 1984, sec. 3.4.3), the best mean of `ranked_by` decides: it depends less on chance. A trial whose
    repeat diverged is not chosen.
    """
    first = {tuple(trial.setting): trial for trial in trials}
    pairs = [(first[tuple(repeat.setting)], repeat) for repeat in repeats if repeat.score is not None]
    if not pairs:
        return None
    scores = np.array([[trial.score for trial in pair] for pair in pairs], float)  # (N, 2)
    means, errors = scores.mean(1), abs(scores[:, 0] - scores[:, 1]) / 2  # the errors of means of two
    best = int(means.argmax())
    is_near = means[best] - means <= np.hypot(errors[best], errors)  # the best one is near itself
    ranks = np.array([[trial.ranked_by for trial in pair] for pair in pairs], float).mean(1)
    chosen = int(np.where(is_near, ranks, -np.inf).argmax())
    return replace(pairs[chosen][0], score=float(means[chosen]), ranked_by=float(ranks[chosen]))


def estimate_final_scores(trials: Sequence[Trial]) -> list[float]:
    """Return `ranked_by` of each trial, and of an eliminated one what it may have become.

    That is its last value and the mean of what the done trials gained after that step. A trial without a value, such as
    one that diverged, has minus infinity.
    """
    done = [(dict(trial.curve), trial.ranked_by) for trial in trials if trial.ranked_by is not None]
    estimates = []
    for trial in trials:
        if trial.ranked_by is not None:
            estimates.append(trial.ranked_by)
        elif trial.curve and trial.status == "eliminated":
            step, value = trial.curve[-1]
            gains = [final - curve[step] for curve, final in done if step in curve]
            estimates.append(value + (fmean(gains) if gains else 0.0))
        else:
            estimates.append(-math.inf)
    return estimates


def seconds_spent(trials: Sequence[Trial], began: datetime) -> float:
    """Return the seconds of the search: of this process, and of trials that had ended before it began.

    Trials of a pack overlap, and their time counts once. The time between two processes does not count.

    Args:
        trials: of the search.
        began: start of this process's work on the search, UTC.
    """
    earlier = sorted(trial.period for trial in trials if trial.period and trial.period[1] <= began)
    seconds, counted_until = 0.0, None
    for start, end in earlier:
        start = start if counted_until is None else max(start, counted_until)
        seconds += max(0.0, (end - start).total_seconds())
        counted_until = end if counted_until is None else max(end, counted_until)
    return seconds + (datetime.now(UTC) - began).total_seconds()


def full_flops(trials: Sequence[Trial]) -> float:
    """Return the mean FLOPs of a trial that trains to its end; an estimate from the other ones if none has; else 0."""
    done = [trial.flops for trial in trials if trial.score is not None and trial.flops]
    return fmean(done) if done else max((trial.flops for trial in trials), default=0.0)


def affordable(trials: Sequence[Trial], search: Search, packing: Packing, seconds: float) -> int:
    """Return the number of trials of the next pack: the largest one that is expected to stay within the budget.

    Args:
        trials: so far; without any the first pack is limited by the number of trials only.
        search: the budget, of which the repeats get their part.
        packing: the size of a pack, and whether trials are eliminated.
        seconds: spent so far.
    """
    assert packing.size is not None
    size = packing.size if search.trials is None else min(packing.size, search.trials - len(trials))
    spent, full = sum(trial.flops for trial in trials), full_flops(trials)
    reserved = full * search.repeated
    if not trials:
        return max(0, size)
    steps = max(1, *(trial.steps for trial in trials))
    for count in range(size, 0, -1):
        trained = sum(members_by_step(count, steps)) / steps if packing.halving else count
        expected = full * trained + reserved
        within_flops = search.flops is None or spent + expected <= search.flops
        expected_seconds = seconds * expected / spent if spent else 0.0
        within_time = search.minutes is None or seconds + expected_seconds <= 60 * search.minutes
        if within_flops and within_time:
            return count
    return 0
