#!/usr/bin/env python3
"""Measure how often each test of lora_bench.analysis.statistics rejects at 0.05, over simulated comparisons.

    experiments/simulate_tests.py --comparisons 2000 --examples 5000
    experiments/simulate_tests.py --comparisons 400 --tasks three_classes many_classes numbers --resamples 0

An example is predicted correctly if its ease is above 0. The ease is a sum: a term that all models share, one of each
method (`method_spread`, shared by its seeds), one of each seed, and how good the seed turned out (`spread`; 0.06 is
about a point of MCC). So seeds and examples are both sources of chance; about 6 % of the examples change between two
seeds. Without a difference both methods draw from the same distribution. `truth` is the mean difference in the metric
over the comparisons, `theory` the power that the formula gives for that difference and the mean variances, and
`seeds' share` the part of the variance that shows between seeds.

With three or 77 classes, an example that is not predicted correctly gets a class that most models take for it.
Predicted numbers are the label plus an error that is a sum of the same terms. `spread`, and the difference of the
methods, scale it.

McNemar's test and the bootstrap are about two models, not about methods. If seeds differ, they reject what is true of
these models.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.analysis import statistics
from lora_bench.analysis.bootstrap import paired_bootstrap
from lora_bench.evaluation import main_metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA = 0.05
GAIN = 0.065
"""Ease that the better method has over the other, where there is a difference."""
TASKS = {
    "two_classes": (2, ("mcc",)),
    "three_classes": (3, ("mcc", "macro_f1")),
    "many_classes": (77, ("mcc", "macro_f1")),
    "numbers": (0, ("spearman",)),
}
"""Number of classes, 0 for numbers, and the metrics that are tested."""
SETTINGS = ((0.0, 0.7), (0.03, 0.7), (0.06, 0.7), (0.2, 0.7), (0.0, 0.0), (0.06, 0.0))
"""Pairs of `spread` and `method_spread`."""


@dataclass(frozen=True)
class Study:
    """Simulated comparisons of two methods, a and b, with the same number of seeds."""

    comparisons: int
    examples: int
    seeds: int
    spread: float
    method_spread: float
    gain: float
    """Ease of a over b."""
    classes: int = 2
    """0 for a task of numbers."""
    measure: str = "mcc"
    """The metric that is tested."""
    resamples: int = 1000
    """Resamples of the bootstrap; 0 leaves it out."""

    def simulate(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the labels (N,) and the predictions of a and of b, (S, N) each."""
        if self.classes == 0:
            return self._simulate_numbers(rng)
        N, S, k = self.examples, self.seeds, self.classes
        y = rng.random(N) < 0.37 if k == 2 else _draw_classes(rng, k, N)
        shared = rng.normal(3.0, 2.3, N)
        usual = None if k == 2 else (y + rng.integers(1, k, N)) % k  # (N,) the class that most models take for it
        predicted = []
        for lift in (self.gain, 0.0):
            ease = shared + self.method_spread * rng.normal(size=N) + 0.7 * rng.normal(size=(S, N))
            ease = ease + self.spread * rng.normal(size=(S, 1)) + lift
            if usual is None:
                predicted.append(y ^ (ease < 0))
            else:
                wrong = np.where(rng.random((S, N)) < 0.7, usual, (y + rng.integers(1, k, (S, N))) % k)
                predicted.append(np.where(ease < 0, wrong, y))
        return y, predicted[0], predicted[1]

    def _simulate_numbers(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return labels and predictions with a rank correlation of about 0.85, of which `GAIN` is about a point."""
        N, S = self.examples, self.seeds
        y = rng.normal(size=N)
        shared = rng.normal(size=N)
        predicted = []
        for lift in (self.gain, 0.0):
            error = 0.5 * shared + 0.35 * self.method_spread * rng.normal(size=N) + 0.2 * rng.normal(size=(S, N))
            predicted.append(y + error * (1 - 0.7 * (lift + self.spread * rng.normal(size=(S, 1)))))
        return y, predicted[0], predicted[1]

    def run(self, seed: int) -> dict[str, float]:
        """Return the share of comparisons that each test rejects, and the properties of the simulation."""
        rng = np.random.default_rng(seed)
        rejections: dict[str, int] = {}
        crossed = []
        for _ in range(self.comparisons):
            y, a, b = self.simulate(rng)
            crossed.append(statistics.crossed_test(y, a, b, self.measure))
            for name, p in {"crossed": crossed[-1].p, **p_values(y, a, b, self.measure, self.resamples)}.items():
                rejections[name] = rejections.get(name, 0) + (p <= ALPHA)
        by_seeds, by_examples, truth = (
            float(np.mean([getattr(test, name) for test in crossed]))
            for name in ("by_seeds", "by_examples", "difference")
        )
        typical = statistics.Comparison(self.measure, truth, by_seeds, by_examples, self.seeds, self.examples)
        shares = {name: count / self.comparisons for name, count in rejections.items()}
        shares["seeds' share"] = by_seeds / (by_seeds + by_examples)
        return shares | ({"truth": truth, "theory": typical.power(truth)} if self.gain else {})


def _draw_classes(rng: np.random.Generator, k: int, n: int) -> NDArray[np.int64]:
    """Return n labels: three classes of 50, 30 and 20 %, or more of equal frequency."""
    return rng.choice(k, n, p=[0.5, 0.3, 0.2] if k == 3 else None)


def p_values(
    y: NDArray[Any], a: NDArray[Any], b: NDArray[Any], measure: str = "mcc", resamples: int = 1000
) -> dict[str, float]:
    """Return the p values of the tests except the crossed one."""
    values = [main_metric.compute(y, predicted, measure) for predicted in (a, b)]
    tests = {"crossed, one seed": statistics.crossed_test(y, a[0], b[0], measure).p}
    if not main_metric.is_of_numbers(measure):
        tests["mcnemar"] = statistics.mcnemar(a[0] == y, b[0] == y).p
    if resamples:
        tests["bootstrap"] = paired_bootstrap(y, a[0], b[0], measure, resamples=resamples).p
    return tests | {"over seeds": statistics.seeds_test(*values).p}


def mcnemar_power(comparisons: int, N: int, seed: int) -> tuple[float, float]:
    """Return the share of comparisons in which mid-p McNemar detects a point of accuracy, and what theory predicts."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(N, [0.045, 0.035, 0.92], size=comparisons)
    rejections = 0
    for only_a, only_b, _ in draws:
        a, b = np.repeat([True, False], [only_a, only_b]), np.repeat([False, True], [only_a, only_b])
        rejections += statistics.mcnemar(a, b).p <= ALPHA
    return rejections / comparisons, statistics.mcnemar_power(N, 0.045, 0.035)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["two_classes"])
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    measured, theory = mcnemar_power(options.comparisons, options.examples, options.seed)
    print(f"a point of accuracy: mcnemar detects {measured:.4f}, theory {theory:.4f}", flush=True)
    tasks = [(task, TASKS[task][0], measure) for task in options.tasks for measure in TASKS[task][1]]
    for (task, k, measure), S, setting, gain in itertools.product(tasks, options.seeds, SETTINGS, (0.0, GAIN)):
        spread, method_spread = setting
        study = Study(
            options.comparisons, options.examples, S, spread, method_spread, gain, k, measure, options.resamples
        )
        line = ", ".join(f"{name} {value:.4f}" for name, value in study.run(options.seed).items())
        title = f"{S} seeds, spread {spread}, method_spread {method_spread}, gain {gain}"
        print(f"{'' if task == 'two_classes' else f'{task}, {measure}, '}{title}: {line}", flush=True)


if __name__ == "__main__":
    main()
