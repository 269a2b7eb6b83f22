#!/usr/bin/env python3
"""Measure how often each test of lora_bench.analysis.statistics rejects at 0.05, over simulated comparisons.

    experiments/simulate_tests.py --comparisons 2000 --examples 5000

An example is predicted correctly if its ease is above 0. The ease is a sum: a term that all models share, one of each
method (`method_spread`, shared by its seeds), one of each seed, and how good the seed turned out (`spread`; 0.06 is
about a point of MCC). So seeds and examples are both sources of chance; about 6 % of the examples change between two
seeds. Without a difference both methods draw from the same distribution. `truth` is the mean difference in MCC over the
comparisons, `theory` the power that the formula gives for that difference and the mean variances, and `seeds' share`
the part of the variance that shows between seeds.

McNemar's test and the bootstrap are about two models, not about methods. If seeds differ, they reject what is true of
these models.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.analysis import statistics
from lora_bench.analysis.bootstrap import paired_bootstrap
from lora_bench.evaluation import confusion

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA = 0.05
GAIN = 0.065
"""Ease that the better method has over the other, where there is a difference."""
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

    def simulate(self, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the labels (N,) and the predictions of a and of b, (S, N) each."""
        N, S = self.examples, self.seeds
        y = rng.random(N) < 0.37
        shared = rng.normal(3.0, 2.3, N)
        predicted = []
        for lift in (self.gain, 0.0):
            ease = shared + self.method_spread * rng.normal(size=N) + 0.7 * rng.normal(size=(S, N))
            ease = ease + self.spread * rng.normal(size=(S, 1)) + lift
            predicted.append(y ^ (ease < 0))
        return y, predicted[0], predicted[1]

    def run(self, seed: int) -> dict[str, float]:
        """Return the share of comparisons that each test rejects, and the properties of the simulation."""
        rng = np.random.default_rng(seed)
        rejections: dict[str, int] = {}
        crossed = []
        for _ in range(self.comparisons):
            y, a, b = self.simulate(rng)
            crossed.append(statistics.crossed_test(y, a, b))
            for name, p in {"crossed": crossed[-1].p, **p_values(y, a, b)}.items():
                rejections[name] = rejections.get(name, 0) + (p <= ALPHA)
        by_seeds, by_examples, truth = (
            float(np.mean([getattr(test, name) for test in crossed]))
            for name in ("by_seeds", "by_examples", "difference")
        )
        typical = statistics.Comparison("mcc", truth, by_seeds, by_examples, self.seeds, self.examples)
        shares = {name: count / self.comparisons for name, count in rejections.items()}
        shares["seeds' share"] = by_seeds / (by_seeds + by_examples)
        return shares | ({"truth": truth, "theory": typical.power(truth)} if self.gain else {})


def p_values(y: NDArray[np.bool_], a: NDArray[np.bool_], b: NDArray[np.bool_]) -> dict[str, float]:
    """Return the p values of the tests except the crossed one."""
    mcc_a, mcc_b = (confusion.compute_metric(confusion.confusion_counts(y, predicted)) for predicted in (a, b))
    return {
        "crossed, one seed": statistics.crossed_test(y, a[0], b[0]).p,
        "mcnemar": statistics.mcnemar(a[0] == y, b[0] == y).p,
        "bootstrap": paired_bootstrap(y, a[0], b[0], resamples=1000).p,
        "over seeds": statistics.seeds_test(mcc_a, mcc_b).p,
    }


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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    measured, theory = mcnemar_power(options.comparisons, options.examples, options.seed)
    print(f"a point of accuracy: mcnemar detects {measured:.4f}, theory {theory:.4f}", flush=True)
    for S in options.seeds:
        for spread, method_spread in SETTINGS:
            for gain in (0.0, GAIN):
                shares = Study(options.comparisons, options.examples, S, spread, method_spread, gain).run(options.seed)
                line = ", ".join(f"{name} {value:.4f}" for name, value in shares.items())
                print(f"{S} seeds, spread {spread}, method_spread {method_spread}, gain {gain}: {line}", flush=True)


if __name__ == "__main__":
    main()
