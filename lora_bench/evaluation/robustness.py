"""How answers hold when texts are perturbed: names and numbers from scores before and after.

A split's figures are `<transform>/<name>` for each transform and `perturbed/<name>` over all that keep labels:

    changed           share of rows that the transform changes
    accuracy f1 mcc   of the whole split, rows that are not changed as they were: mean over seeds
    …_worst           the worst of these over seeds (and over transforms, below `perturbed`)
    …_drop            (clean - perturbed) / clean
    flip_rate         share of changed rows whose answer is another: mean over seeds (and transforms)
    attack_success    of changed rows that were answered rightly, the share that some seed (or transform) makes wrong
    order_consistency of pairs, the share whose answer does not depend on the order of their texts (below `perturbed`)

Of a transform that changes labels there are changed, accuracy (with its worst and its drop) and attack_success, all
over the changed rows alone and with the new labels: there an answer that stays is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD, MAIN_METRICS
from lora_bench.evaluation.metrics import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Values = dict[str, float | None]


@dataclass(frozen=True)
class Trial:
    """What became of the M rows that one transform changed with one seed."""

    transform: str
    keeps_label: bool
    rows: NDArray[np.int64]  # (M,) their positions in the split
    labels: NDArray[np.int64]  # (M,) after the change
    scores: NDArray[np.float64]  # (M,) P(label 1) after the change


def robustness(scores: NDArray[np.float64], labels: NDArray[np.int64], trials: Sequence[Trial]) -> Values:
    """All figures of one split.

    Args:
        scores: (N,) P(label 1) of the split as it is.
        labels: (N,) 0 or 1.
        trials: those of one transform one after the other.

    Returns:
        The values by `<transform>/<name>` and `perturbed/<name>`; None where nothing was changed to judge by.

    Raises:
        DivergedError: a score is not a finite number.
    """
    clean = score(scores, labels, {})
    right = (scores >= DEFAULT_THRESHOLD) == (labels == 1)
    found: Values = {}
    kept: list[Values] = []
    attacked, fooled = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for (name, keeps_label), group in groupby(trials, key=lambda trial: (trial.transform, trial.keeps_label)):
        of_name = list(group)
        touched, wrong = _attack(of_name, right)
        values: Values = {"changed": float(np.mean([len(trial.rows) for trial in of_name]) / len(labels))}
        if keeps_label:
            values |= _kept(of_name, scores, labels, clean)
            kept.append(values)
            attacked |= touched
            fooled |= wrong
        else:
            values |= _changed(of_name, right)
        values["attack_success"] = _ratio(wrong.sum(), touched.sum())
        found |= {f"{name}/{key}": value for key, value in values.items()}
    if kept:
        overall = _overall(kept, clean)
        overall["attack_success"] = _ratio(fooled.sum(), attacked.sum())
        if found.get("order/flip_rate") is not None:
            overall["order_consistency"] = 1 - _number(found["order/flip_rate"])
        found |= {f"perturbed/{key}": value for key, value in overall.items()}
    return found


def _attack(trials: Sequence[Trial], right: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) each: rows answered rightly that some trial changes, and those of them that some trial makes wrong."""
    touched, wrong = np.zeros(len(right), bool), np.zeros(len(right), bool)
    for trial in trials:
        touched[trial.rows] = True
        wrong[trial.rows] |= (trial.scores >= DEFAULT_THRESHOLD) != (trial.labels == 1)
    return touched & right, wrong & touched & right


def _kept(trials: Sequence[Trial], scores: NDArray[np.float64], labels: NDArray[np.int64], clean: Values) -> Values:
    """A transform that keeps labels: the whole split's metrics, and how often answers flip."""
    seen, flips = [], []
    for trial in trials:
        after = scores.copy()
        after[trial.rows] = trial.scores
        seen.append(score(after, labels, {}))
        if len(trial.rows):
            flips.append(float(((after >= DEFAULT_THRESHOLD) != (scores >= DEFAULT_THRESHOLD))[trial.rows].mean()))
    values: Values = {name: float(np.mean([_number(each[name]) for each in seen])) for name in MAIN_METRICS}
    values |= {f"{name}_worst": min(_number(each[name]) for each in seen) for name in MAIN_METRICS}
    return values | _drops(values, clean) | {"flip_rate": float(np.mean(flips)) if flips else None}


def _changed(trials: Sequence[Trial], right: NDArray[np.bool_]) -> Values:
    """A transform that changes labels: accuracy on the rows that it changes, before and after."""
    trials = [trial for trial in trials if len(trial.rows)]
    if not trials:
        return dict.fromkeys(("accuracy", "accuracy_worst", "accuracy_drop"))
    seen = [float(((trial.scores >= DEFAULT_THRESHOLD) == (trial.labels == 1)).mean()) for trial in trials]
    before = float(np.mean([right[trial.rows].mean() for trial in trials]))
    values: Values = {"accuracy": float(np.mean(seen)), "accuracy_worst": min(seen)}
    return values | {"accuracy_drop": _ratio(before - float(np.mean(seen)), before)}


def _overall(kept: Sequence[Values], clean: Values) -> Values:
    """Over transforms that keep labels, each counting the same."""
    values: Values = {}
    for name in ("changed", *MAIN_METRICS):
        values[name] = float(np.mean([_number(each[name]) for each in kept]))
    values |= {f"{name}_worst": min(_number(each[f"{name}_worst"]) for each in kept) for name in MAIN_METRICS}
    flips = [_number(each["flip_rate"]) for each in kept if each["flip_rate"] is not None]
    return values | _drops(values, clean) | {"flip_rate": float(np.mean(flips)) if flips else None}


def _drops(values: Values, clean: Values) -> Values:
    before = {name: _number(clean[name]) for name in MAIN_METRICS}
    return {f"{name}_drop": _ratio(before[name] - _number(values[name]), before[name]) for name in MAIN_METRICS}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _number(value: float | None) -> float:
    assert value is not None
    return value
