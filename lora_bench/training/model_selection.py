"""A look at the selection split: what a member says of it, and what follows for its best state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.errors import DivergedError
from lora_bench.evaluation.metrics import mean_metrics, score
from lora_bench.training.training_state import diverge

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Metric
    from lora_bench.training.training_state import Outcome


@dataclass(frozen=True)
class Look:
    """P(label 1) and labels of the selection split of each task that a member learns, and the seconds taken."""

    scores: dict[str, NDArray[np.float64]]
    labels: dict[str, NDArray[np.int64]]
    seconds: float


def judge(
    pack: Pack,
    member: int,
    outcome: Outcome,
    look: Look,
    at: Mapping[str, Any],
    settled: bool,
    metrics: Mapping[str, Metric],
) -> dict[str, Any] | None:
    """Score one member on the selection split; remember its state where it is settled and the best so far.

    Args:
        at: step and epoch.
        settled: whether its state may be chosen.

    Returns:
        The line for the log, None where the member has diverged. Of several tasks its metrics are the means, and
        `tasks` has those of each.
    """
    try:
        of_tasks = {name: score(scores, look.labels[name], metrics) for name, scores in look.scores.items()}
    except DivergedError as error:
        diverge(outcome, at["step"], str(error))
        return None
    values = mean_metrics(list(of_tasks.values()))
    line = {**at, "split": "selection", "metrics": values, "seconds": round(look.seconds, 3)}
    best = outcome.best["metrics"]["mcc"] if outcome.best else -math.inf
    assert values["mcc"] is not None
    if settled and values["mcc"] > best:
        outcome.best, outcome.state, outcome.without_gain = line, pack.state(member), 0
    elif settled:
        outcome.without_gain += 1
    return line | ({"tasks": of_tasks} if len(of_tasks) > 1 else {})
