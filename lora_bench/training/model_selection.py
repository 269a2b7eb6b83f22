"""Evaluation on the selection split, and the choice of each member's best state."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.errors import DivergedError
from lora_bench.evaluation.metrics import mean_metrics, score
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.member_run import diverge
from lora_bench.training.prediction import predict
from lora_bench.training.task_mixture import MEAN_OF_MAIN_METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Metric
    from lora_bench.training.member_run import MemberRun
    from lora_bench.training.task_mixture import TaskMixture


@dataclass(frozen=True)
class EvaluationResult:
    """Scores and labels of the selection split of each task that a member learns, and the seconds taken."""

    scores: dict[str, NDArray[np.float64]]
    labels: dict[str, NDArray[Any]]
    main_metrics: dict[str, str]
    """The metric of each task that chooses the best state."""
    seconds: float


def evaluate_members(
    pack: Pack,
    mixtures: Sequence[TaskMixture],
    members: Sequence[int],
    batch_size: int | None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[int, EvaluationResult]:
    """Evaluate these members, with their current weights, on the selection splits of all tasks that they learn.

    Returns:
        The result by member, in the order of `members`; its seconds are those of all members of its mixture together.
    """
    results = {}
    for mixture in mixtures:
        learners = [k for k in mixture.members if k in members]
        if not learners:
            continue
        began = time.perf_counter()
        with pack.only(learners):
            scores = {
                name: predict(pack, task.selection, batch_size, processes) for name, task in mixture.tasks.items()
            }
        seconds = time.perf_counter() - began
        labels = {name: t.selection.labels for name, t in mixture.tasks.items() if t.selection.labels is not None}
        main_metrics = {name: task.main_metric for name, task in mixture.tasks.items()}
        for i, k in enumerate(learners):
            own_scores = {name: rows[i] for name, rows in scores.items()}
            results[k] = EvaluationResult(own_scores, labels, main_metrics, seconds)
    return {k: results[k] for k in members}


def mean_of_tasks(
    by_task: Mapping[str, Mapping[str, float | None]], main_metrics: Mapping[str, str]
) -> dict[str, float | None]:
    """Return the mean over tasks of the metrics that all of them have.

    If their main metrics differ, the mean of each task's main metric is added as `main`.

    Args:
        by_task: metrics of each task; one task keeps its own.
        main_metrics: name of the main metric of each task.
    """
    shared = set.intersection(*map(set, by_task.values()))
    values = mean_metrics([{k: v for k, v in metrics.items() if k in shared} for metrics in by_task.values()])
    if len(set(main_metrics.values())) > 1:
        of_each = [{MEAN_OF_MAIN_METRICS: metrics[main_metrics[name]]} for name, metrics in by_task.items()]
        values |= mean_metrics(of_each)
    return values


def update_best(
    member: MemberRun,
    step: int,
    result: EvaluationResult,
    metrics: Mapping[str, Metric],
    target: float | None = None,
    *,
    may_choose: bool,
) -> dict[str, Any] | None:
    """Compute a member's selection metrics, and keep its state and scores if its main metric is above the best so far.

    Otherwise its count of evaluations without improvement is increased. Those in a row that reach `target` are counted.

    Args:
        member: still has the weights that were evaluated.
        step: the update after which it was evaluated.
        result: of the evaluation.
        metrics: further metrics beside the standard ones.
        target: a main metric; None: none is counted.
        may_choose: whether its state may be chosen; if not, neither its best state nor a count changes.

    Returns:
        The line for the log; None if the member's scores are not finite, which ends it. With several tasks, its metrics
        are their means, and `tasks` has the metrics of each task. `may_choose` is in the line only if it is False.
    """
    try:
        by_task = {name: score(scores, result.labels[name], metrics) for name, scores in result.scores.items()}
    except DivergedError as error:
        diverge(member.progress, step, str(error))
        return None
    values = mean_of_tasks(by_task, result.main_metrics)
    position = {"step": step, "epoch": round(step / member.schedule.steps_per_epoch, 4)}
    line = {**position, "split": "selection", "metrics": values, "seconds": round(result.seconds, 3)}
    progress = member.progress
    value = values[progress.main_metric]
    assert value is not None
    if may_choose and value > progress.best_value:
        progress.best, progress.state, progress.without_gain = line, member.pack.parts(member.index), 0
        progress.scores = result.scores
    elif may_choose:
        progress.without_gain += 1
    if may_choose:
        progress.at_target = progress.at_target + 1 if target is not None and value >= target else 0
    return line | ({"tasks": by_task} if len(by_task) > 1 else {}) | ({} if may_choose else {"may_choose": False})
