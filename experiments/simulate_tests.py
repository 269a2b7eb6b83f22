#!/usr/bin/env python3
"""Measures how often each test of lora_bench.analysis.statistics rejects at 0.05, over simulated comparisons.

    experiments/simulate_tests.py --comparisons 2000 --examples 5000

An example is right where its ease is above 0: a part that is the same for everyone, one of each method (`own`, what its
seeds share), one of each seed, and how good the seed turned out (`spread`; 0.06 is about a point of MCC). So seeds and
examples are both sources of chance; about 6 % of the examples change between two seeds. Without a difference both
methods draw from the same law. `truth` is the mean difference in MCC over the comparisons, `theory` the power that the
formula gives for that difference and the mean variances, `seeds' share` how much of the variance shows between seeds.

McNemar's test and the bootstrap ask about the two models at hand, not about the methods: where seeds differ, they
reject what is true of these models.
"""

from __future__ import annotations

import argparse

import numpy as np

from lora_bench.analysis import statistics
from lora_bench.evaluation import confusion


def study(
    comparisons: int, N: int, S: int, spread: float, disagreement: float, gain: float, seed: int
) -> dict[str, float]:
    """The share of comparisons that each test rejects; `gain` is what a has over b."""
    rng = np.random.default_rng(seed)
    rejected: dict[str, int] = {}
    crossed = []
    for _ in range(comparisons):
        y = rng.random(N) < 0.37
        ease = rng.normal(3.0, 2.3, N)
        predicted = []
        for lift in (gain, 0.0):
            logits = (
                ease
                + disagreement * rng.normal(size=N)
                + 0.7 * rng.normal(size=(S, N))
                + spread * rng.normal(size=(S, 1))
            )
            predicted.append(y ^ (logits + lift < 0))
        a, b = predicted
        crossed.append(statistics.crossed_test(y, a, b))
        p = {
            "crossed": crossed[-1].p,
            "crossed, one seed": statistics.crossed_test(y, a[0], b[0]).p,
            "mcnemar": statistics.mcnemar(a[0] == y, b[0] == y).p,
            "bootstrap": statistics.paired_bootstrap(y, a[0], b[0], resamples=1000).p,
            "over seeds": statistics.seeds_test(
                *(confusion.compute_metric(confusion.confusion_counts(y, x)) for x in (a, b))
            ).p,
        }
        for name, value in p.items():
            rejected[name] = rejected.get(name, 0) + (value <= 0.05)
    by_seeds, by_examples, truth = (
        float(np.mean([getattr(test, name) for test in crossed])) for name in ("by_seeds", "by_examples", "difference")
    )
    typical = statistics.Comparison("mcc", truth, by_seeds, by_examples, S, N)
    shares = {name: count / comparisons for name, count in rejected.items()}
    shares["seeds' share"] = by_seeds / (by_seeds + by_examples)
    return shares | ({"truth": truth, "theory": typical.power(truth)} if gain else {})


def mcnemar_power(comparisons: int, N: int, seed: int) -> tuple[float, float]:
    """Share of comparisons in which mid-p McNemar finds a true point of accuracy, and what theory says."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(N, [0.045, 0.035, 0.92], size=comparisons)
    rejected = 0
    for only_a, only_b, _ in draws:
        a, b = np.repeat([True, False], [only_a, only_b]), np.repeat([False, True], [only_a, only_b])
        rejected += statistics.mcnemar(a, b).p <= 0.05
    return rejected / comparisons, statistics.mcnemar_power(N, 0.045, 0.035)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seen, theory = mcnemar_power(given.comparisons, given.examples, given.seed)
    print(f"a point of accuracy: mcnemar finds {seen:.4f}, theory {theory:.4f}", flush=True)
    for S in given.seeds:
        for spread, disagreement in ((0.0, 0.7), (0.03, 0.7), (0.06, 0.7), (0.2, 0.7), (0.0, 0.0), (0.06, 0.0)):
            for gain in (0.0, 0.065):
                shares = study(given.comparisons, given.examples, S, spread, disagreement, gain, given.seed)
                line = ", ".join(f"{name} {value:.4f}" for name, value in shares.items())
                print(f"{S} seeds, spread {spread}, own {disagreement}, gain {gain}: {line}", flush=True)


if __name__ == "__main__":
    main()
