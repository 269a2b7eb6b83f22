#!/usr/bin/env python3
"""Simulate whole sweeps and count how often a method is called better, rightly and falsely.

    python experiments/simulate_sweeps.py --sweeps 2000

A sweep has 4 methods, 12 settings each and 3 seeds. The first method is the baseline. Each method is represented by
the setting that the package's `choose_setting` takes on the selection split. These settings are tested against the
baseline on 1,000 other examples, with the package's tests, Holm's correction and verdicts.

An example is classified correctly if its margin is above 0. The margin is the sum of normal parts: the ease of the
example for all models; what is common to a method, to a setting and to a seed's model; and the quality of the setting
and of its seed. The variances of the parts follow from `Data`, which real predictions determine:
`--calibrate SWEEP` prints them for a sweep.

For each scenario a line of `key=value` pairs is printed. `falsely_better` is the share of sweeps in which a method that
is not better gets the verdict `better`; `rejected` counts `worse` as well. `detected` is the share of sweeps in which
the leading method gets `better`. The `pairwise` test takes the variance over seeds from each pair alone, the `pooled`
one is that of the package. `known` is the z test with the true standard errors: no valid test detects more.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.analysis import statistics
from lora_bench.analysis.settings import RecordedRun, choose_setting
from lora_bench.evaluation.confusion import compute_metric, confusion_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

POSITIVE = 0.37
"""Share of label 1, as in QQP."""
GAPS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.2, 0.3)
"""MCC that each setting is below the best one of its method."""
_FOLDER = Path()
TESTS = ("pairwise", "pooled", "known")


@dataclass(frozen=True)
class Data:
    """How well models do on a task, and how often two of them predict different labels for an example."""

    accuracy: float
    by_seed: float
    """Share of examples on which two seeds of one setting differ."""
    by_setting: float
    """The same for two settings of one method."""
    by_method: float


DATA = {
    "hard": Data(0.77, 0.15, 0.155, 0.17),
    "medium": Data(0.83, 0.09, 0.095, 0.105),
    "easy": Data(0.90, 0.04, 0.042, 0.048),
}
"""Hard: MiniLM after one epoch of 2,000 QQP pairs (`--calibrate`). Medium: 8,000 pairs. Easy: RoBERTa on all of QQP."""


@dataclass(frozen=True)
class Scenario:
    """What a sweep is like."""

    data: str = "medium"
    lead: float = 0.0
    """MCC by which the second method is truly ahead of the others."""
    spread: float = 0.005
    """Standard deviation of a seed's true MCC."""
    noisy: str = ""
    """`baseline` or `rival`: its seeds spread four times as much."""
    common_luck: float = 0.0
    """Share of that variance that a seed gives to all methods alike."""
    seeds: int = 3
    examples: int = 1000
    methods: int = 4
    selection: int = 1000
    tuned_baseline: bool = True
    """False: the baseline has one setting, the best one."""


def simulate(scenario: Scenario, sweeps: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the shares of sweeps by test: `falsely_better`, `rejected`, and `detected` where there is a lead."""
    rng = np.random.default_rng(seed)
    parts = _Parts(scenario)
    differences, p_values = [], []
    for _ in range(sweeps):
        labels, predicted = parts.draw_sweep(rng)
        tests = [statistics.crossed_test(labels, rival, predicted[0]) for rival in predicted[1:]]
        pool = statistics.pool_seed_variance([_by_seed(labels, one) for one in predicted])
        pooled = [test if pool is None else test.with_pooled_seeds(pool) for test in tests]
        differences.append([test.difference for test in tests])
        p_values.append([[test.p for test in of_kind] for of_kind in (tests, pooled)])
    difference = np.array(differences)  # (sweeps, rivals)
    p = np.array(p_values)  # (sweeps, 2, rivals)
    p = np.concatenate([p, _normal_p(difference / difference.std(0))[:, None]], 1)
    return {name: _shares(difference, p[:, i], scenario.lead) for i, name in enumerate(TESTS)}


def _shares(difference: Floats, p: Floats, lead: float) -> dict[str, float]:
    """Return the shares of sweeps for one test, whose p values are (sweeps, rivals)."""
    adjusted = [statistics.holm(list(row)) for row in p]
    verdicts = np.array(
        [
            [statistics.choose_verdict(*pair, 1.0) for pair in zip(*row, strict=True)]
            for row in zip(difference, adjusted, strict=True)
        ]
    )
    equal = verdicts[:, 1:] if lead else verdicts
    shares = {
        "falsely_better": float((equal == "better").any(1).mean()),
        "rejected": float(np.isin(equal, ("better", "worse")).any(1).mean()),
    }
    return shares | ({"detected": float((verdicts[:, 0] == "better").mean())} if lead else {})


class _Parts:
    """The parts of a margin, computed once for a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        from scipy.special import ndtr, ndtri

        data = DATA[scenario.data]
        grid = np.linspace(0, 4, 4001)
        mcc = _mcc_at(ndtr(grid))
        best = float(_mcc_at(np.array(data.accuracy)))
        self.scenario, rivals = scenario, scenario.methods
        target = best - np.tile(GAPS, (rivals, 1))
        target[1] += scenario.lead
        self.quality: Floats = np.interp(target, mcc, grid)  # (methods, settings)
        spread = np.full(rivals, scenario.spread)
        spread[:2] *= np.where(np.array(["baseline", "rival"]) == scenario.noisy, 4, 1)
        slope = 1 / float(np.interp(ndtri(data.accuracy), grid, np.gradient(mcc, grid)))
        self.spread = slope * spread
        # Two models with correlated margins differ more often the lower the correlation is.
        method, setting, model = (
            _correlation(data.accuracy, x) for x in (data.by_method, data.by_setting, data.by_seed)
        )
        self.deviations = np.sqrt([method, setting - method, model - setting, 1 - model]).astype(np.float32)

    def draw_sweep(self, rng: np.random.Generator) -> tuple[Bools, list[Bools]]:
        """Return the labels of the reported examples and the predictions (seeds, N) of each method's chosen setting."""
        scenario = self.scenario
        methods, settings = self.quality.shape
        shape = (methods, settings, scenario.seeds)
        own, common = rng.standard_normal(shape), rng.standard_normal(scenario.seeds)
        luck = np.sqrt(1 - scenario.common_luck) * own + np.sqrt(scenario.common_luck) * common
        quality = (self.quality[:, :, None] + self.spread[:, None, None] * luck).astype(np.float32)
        labels, predicted = self._draw_split(rng, quality, scenario.selection)
        scores = compute_metric(confusion_counts(labels, predicted))  # (methods, settings, seeds)
        chosen = np.array([choose_setting([_runs(setting) for setting in method]) for method in scores], int)
        if not scenario.tuned_baseline:
            chosen[0] = 0
        labels, predicted = self._draw_split(rng, quality[np.arange(methods), chosen][:, None], scenario.examples)
        return labels, list(predicted[:, 0])

    def _draw_split(self, rng: np.random.Generator, quality: NDArray[np.float32], n: int) -> tuple[Bools, Bools]:
        """Return labels (n,) and predictions (methods, settings, seeds, n) of models with the given quality."""
        methods, settings, seeds = quality.shape
        shapes = [(1, 1, 1, n), (methods, 1, 1, n), (methods, settings, 1, n), (methods, settings, seeds, n)]
        common, method, setting, margin = (
            deviation * rng.standard_normal(shape, np.float32)
            for deviation, shape in zip(self.deviations, shapes, strict=True)
        )
        margin += common + method + setting
        margin += quality[..., None]
        labels = rng.random(n) < POSITIVE
        return labels, labels ^ (margin < 0)


def _runs(scores: Floats) -> list[RecordedRun]:
    """Return the runs of a setting with these scores on the selection split."""
    return [RecordedRun(_FOLDER, {"metrics": {"selection/mcc": float(score)}}, {}, {}) for score in scores]


def _by_seed(labels: Bools, predicted: Bools) -> dict[str, float]:
    """Return the MCC of each seed, for predictions (seeds, N)."""
    return {str(i): float(x) for i, x in enumerate(compute_metric(confusion_counts(labels, predicted)))}


def _mcc_at(accuracy: Floats) -> Floats:
    """Return the MCC of predictions that are right equally often for both labels."""
    right, wrong = accuracy, 1 - accuracy
    counts = [POSITIVE * right, (1 - POSITIVE) * wrong, POSITIVE * wrong, (1 - POSITIVE) * right]
    return compute_metric(np.stack(counts, -1))


def _correlation(accuracy: float, disagreement: float) -> float:
    """Return the correlation of the margins of two models that differ on this share of the examples."""
    from scipy.optimize import brentq
    from scipy.special import ndtri
    from scipy.stats import multivariate_normal

    z = ndtri(accuracy)

    def excess(correlation: float) -> float:
        both = multivariate_normal.cdf([z, z], cov=[[1, correlation], [correlation, 1]])
        return float(2 * (accuracy - both) - disagreement)

    return float(brentq(excess, 0, 0.99999))


def _normal_p(z: Floats) -> Floats:
    """Return two-sided p values of normal deviates."""
    from scipy.special import ndtr

    return np.asarray(2 * ndtr(-np.abs(z)))


# -- real predictions --


def calibrate(folder: Path) -> list[dict[str, Any]]:
    """Return `Data` of each setting of a real sweep: its seeds against each other and against the next setting."""
    from lora_bench.analysis.loading import load_runs
    from lora_bench.analysis.settings import group_runs
    from lora_bench.records import predictions

    loaded = load_runs([folder])
    lines, previous = [], None
    for runs in group_runs(loaded.newest(), loaded.keys):
        read = [predictions.read(run.folder, loaded.splits[0]) for run in runs]
        predicted = np.stack([one.predicted for one in read])  # (S, N)
        pairs = [(a != b).mean() for a, b in itertools.combinations(predicted, 2)]
        mcc = [one.value("mcc") for one in read]
        line: dict[str, Any] = {
            "setting": ",".join(str(runs[0].keys[key]) for key in ("adapter", "adapter.rank", "optimizer.lr"))
        }
        line |= {"seeds": len(runs), "accuracy": np.mean([one.correct.mean() for one in read])}
        if pairs:
            line |= {"mcc_sd": np.std(mcc, ddof=1), "by_seed": np.mean(pairs)}
        if previous is not None:
            line["by_previous_setting"] = (predicted[:, None] != previous).mean()
        previous = predicted
        lines.append(line)
    return lines


def _scenarios() -> list[Scenario]:
    """Return the scenarios of the table: each with equal methods, and with a lead of 4 points."""
    base = Scenario()
    noisy = replace(base, examples=5000, spread=0.01)
    variants = [
        *(base, replace(base, data="easy"), replace(base, data="hard", spread=0.02)),
        *(replace(base, spread=0.01), replace(base, spread=0.02), replace(base, spread=0.01, common_luck=0.5)),
        *(replace(base, seeds=5), replace(base, examples=5000), replace(base, methods=2)),
        *(replace(noisy, noisy="baseline"), replace(noisy, noisy="rival")),
        replace(base, spread=0.01, tuned_baseline=False),
    ]
    return [replace(one, lead=lead) for one in variants for lead in (0.0, 0.04)]


def main() -> None:
    """Print a line for each scenario, or the calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", type=Path, metavar="SWEEP", help="a real sweep to measure instead")
    arguments = parser.parse_args()
    if arguments.calibrate is not None:
        for line in calibrate(arguments.calibrate):
            print(_format(line))
        return
    for scenario in _scenarios():
        for test, shares in simulate(scenario, arguments.sweeps, arguments.seed).items():
            print(_format(vars(scenario) | {"test": test} | shares), flush=True)


def _format(values: dict[str, Any]) -> str:
    """Return values as a line of `key=value` pairs."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


if __name__ == "__main__":
    main()
