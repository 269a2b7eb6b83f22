"""Significance: paired tests of the rows of a table against a baseline, on the predictions of their runs.

The metric is the main metric of the runs, or that of `--measure`. Seeds that two rows share are paired, the examples
are equal, and both count as chance (`statistics.crossed_test`). The variance over seeds is pooled over the rows
(`statistics.pool_seed_variance`). p values are adjusted by Holm for the number of rivals that were tested. A row that
cannot be tested has the reason. Predictions are read only here, and only those of tested rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.config.metric_names import MAIN_METRIC_CHOICES, display_name
from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.analysis.statistics import Comparison
    from lora_bench.analysis.table import Row, Table
    from lora_bench.records.predictions import Predictions

MARGIN = 0.01
"""Default of the largest difference that counts as equivalent."""
ALPHA = 0.05
"""Level of the tests."""
BASELINE = "baseline"
"""Words in place of a verdict: for the baseline, for rows without predictions, and for rows of one seed."""
NOT_TESTED = "not tested"
NO_VERDICT = "no verdict"
NEED_SEVERAL_LABELS = ("mcc", "pearson", "spearman", "r2")
"""Metrics that are 0 / 0 where all examples have the same label."""


@dataclass(frozen=True)
class Finding:
    """The test of a row against the baseline: the row's metric minus the baseline's. An unknown value is None."""

    baseline: str
    verdict: str
    """One of `statistics.VERDICTS` about the row, or `baseline`, `no verdict` or `not tested`."""
    measure: str = "mcc"
    """The metric that was tested, of `ALL_MAIN_METRICS`."""
    why: str | None = None
    """The reason that there is no verdict or no test."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    """Bounds of the 95 % interval of the difference, over seeds and examples."""
    p: float | None = None
    """Two-sided p value of no difference, not adjusted."""
    p_holm: float | None = None
    """`p` adjusted by Holm."""
    p_margin: float | None = None
    """p value of a true difference of the margin or more (two one-sided tests), adjusted by Holm."""
    effect_size: float | None = None
    """Mean difference divided by its standard deviation over seeds (Hedges), from three seeds on."""
    power: float | None = None
    """Probability of detecting a true difference of the margin, at Holm's strictest level."""
    detectable: float | None = None
    """True difference that is detected with a probability of 80 %, at the same level."""
    seeds_needed: int | None = None
    """Seeds that would detect `statistics.deciding_difference` with 80 %; None if no number is enough."""
    examples_needed: int | None = None
    """Examples that would, with as many seeds as are proposed at most; None if `seeds_needed` is known."""
    paired_seeds: int | None = None
    examples: int | None = None
    p_seeds: float | None = None
    """Paired t test over seeds, which takes the examples as fixed. None where no spread shows."""
    p_bootstrap: list[float] | None = None
    p_mcnemar: list[float] | None = None
    """p values of each seed's pair of models, which take the models as fixed.

    The bootstrap tests the metric, McNemar's mid-p test the accuracy, which a regression does not have.
    """


def compare_with_baseline(
    table: Table, baseline: Row, rivals: Sequence[Row], split: str, margin: float = MARGIN, measure: str = "mcc"
) -> list[Finding]:
    """Return the test of each rival against the baseline, with p values adjusted for the number of rivals tested.

    Args:
        table: the table of these rows, with the records of their runs.
        baseline: a row on the same data as the rivals.
        rivals: the rows to test.
        split: the split whose predictions are compared.
        margin: the largest difference that counts as equivalent.
        measure: the metric to test, of `ALL_MAIN_METRICS`.

    Returns:
        A finding for each rival, in their order.
    """
    from lora_bench.analysis import statistics

    read = _Reader(split)
    pairs = [_pair_seeds(table, read, rival, baseline, measure) for rival in rivals]
    tests = {i: pair.test(measure) for i, pair in enumerate(pairs) if pair.ours}
    tests |= _with_pooled_seeds({i: tests[i] for i in tests if _can_be_pooled(pairs[i], rivals[i], baseline)}, pairs)
    counted = {i: test for i, test in tests.items() if (test.seeds > 1 or pairs[i].fixed) and test.can_exclude(margin)}
    p_holm = dict(zip(counted, statistics.holm([test.p for test in counted.values()]), strict=True))
    p_margin = dict(zip(counted, statistics.holm([test.p_beyond(margin) for test in counted.values()]), strict=True))
    level, name, findings = ALPHA / max(1, len(counted)), table.label(baseline), []
    for i, pair in enumerate(pairs):
        if i not in tests:
            findings.append(Finding(name, NOT_TESTED, measure, pair.why))
            continue
        test = tests[i]
        low, high = test.interval() if test.can_exclude(margin) else (None, None)
        finding = Finding(
            baseline=name,
            verdict=NO_VERDICT,
            measure=measure,
            why=_why_no_verdict(test, margin),
            difference=test.difference,
            difference_low=low,
            difference_high=high,
            p=None if low is None else test.p,
            paired_seeds=test.seeds,
            examples=test.examples,
            **pair.usual_tests(measure),
        )
        if i in counted:
            finding = replace(
                finding,
                verdict=statistics.choose_verdict(test.difference, p_holm[i], p_margin[i], ALPHA),
                why=pair.why,
                p_holm=p_holm[i],
                p_margin=p_margin[i],
                power=test.power(margin, level) if test.error else None,
                detectable=test.detectable(alpha=level) if test.error else None,
            )
            if finding.verdict == "inconclusive":
                target = statistics.deciding_difference(test.difference, margin)
                seeds = None if pairs[i].fixed else test.seeds_needed(target, level)
                examples = test.examples_needed(target, level) if seeds is None else None
                finding = replace(finding, seeds_needed=seeds, examples_needed=examples)
        findings.append(finding)
    return findings


def _why_no_verdict(test: Comparison, margin: float) -> str:
    """Return the reason that a test gives no verdict."""
    if test.can_exclude(margin):
        return "only one seed, so the spread over seeds is unknown"
    return f"no spread shows, and {test.examples:,} examples are too few to exclude a difference of {margin:g}"


def _can_be_pooled(pair: _Pair, rival: Row, baseline: Row) -> bool:
    """Return whether a pair's spread over seeds can be compared with that of other pairs.

    Runs that learned nothing spread otherwise, and prompted runs have no spread.
    """
    return len(pair.ours) > 1 and pair.trained and not rival.unlearned and not baseline.unlearned


def _with_pooled_seeds(tests: Mapping[int, Comparison], pairs: Sequence[_Pair]) -> dict[int, Comparison]:
    """Return tests against one baseline with the variance over seeds that their methods share.

    Args:
        tests: by the number of their pair.
        pairs: all pairs.
    """
    from lora_bench.analysis import statistics

    if len(tests) < 2:
        return dict(tests)
    measure = next(iter(tests.values())).measure
    baseline: dict[str, float] = {}
    methods = [baseline]
    for pair in (pairs[i] for i in tests):
        baseline |= {seed: side.value(measure) for seed, side in zip(pair.seeds, pair.theirs, strict=True)}
        methods.append({seed: side.value(measure) for seed, side in zip(pair.seeds, pair.ours, strict=True)})
    pool = statistics.pool_seed_variance(methods)
    return {i: test if pool is None else test.with_pooled_seeds(pool) for i, test in tests.items()}


# -- pairs of runs --


@dataclass(frozen=True)
class _Pair:
    """Predictions of a row (`ours`) and of the baseline (`theirs`) on the same examples, seed by seed."""

    ours: list[Predictions]
    theirs: list[Predictions]
    seeds: Sequence[str] = ()
    """The seed of each pair of predictions."""
    fixed: bool = False
    """Both are a single prompted run, which trained nothing, so that there is no chance over seeds."""
    trained: bool = True
    """Neither is a prompted run."""
    why: str | None = None
    """The reason that there are none, or fewer than there are seeds."""

    def test(self, measure: str) -> Comparison:
        """Return the crossed test of a metric."""
        import numpy as np

        from lora_bench.analysis import statistics

        ours, theirs = (
            np.stack([predictions.predicted for predictions in side]) for side in (self.ours, self.theirs)
        )  # (S, N)
        return statistics.crossed_test(self.ours[0].labels, ours, theirs, measure)

    def usual_tests(self, measure: str) -> dict[str, Any]:
        """Return the other fields of a finding: tests over seeds alone, and over examples alone for each seed."""
        from lora_bench.analysis import statistics
        from lora_bench.analysis.bootstrap import paired_bootstrap

        labels = self.ours[0].labels
        seed_pairs = list(zip(self.ours, self.theirs, strict=True))
        ours, theirs = ([predictions.value(measure) for predictions in side] for side in (self.ours, self.theirs))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        is_regression = self.ours[0].form == "regression"
        return {
            "effect_size": statistics.effect_size(differences),
            "p_seeds": None if statistics.all_equal(differences) else statistics.seeds_test(ours, theirs).p,
            "p_bootstrap": [paired_bootstrap(labels, a.predicted, b.predicted, measure).p for a, b in seed_pairs],
            "p_mcnemar": None if is_regression else [statistics.mcnemar(a.correct, b.correct).p for a, b in seed_pairs],
        }


class _Reader:
    """A reader of predictions that reads each run once.

    Calling it with a folder returns the predictions, or the reason that they cannot be used.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.seen: dict[Path, Predictions | str] = {}

    def __call__(self, folder: Path) -> Predictions | str:
        from lora_bench.records import predictions

        if folder not in self.seen:
            try:
                self.seen[folder] = predictions.read(folder, self.split)
            except UserError as error:
                self.seen[folder] = error.reason
        return self.seen[folder]


def _pair_seeds(table: Table, read: _Reader, rival: Row, baseline: Row, measure: str) -> _Pair:
    """Return the predictions of the seeds that both rows have, on the same examples, where they give the measure."""
    ours, theirs = (_by_seed(table, row.folders) for row in (rival, baseline))
    fixed = [all(_is_fixed(table.records[folder]) for folder in seeds.values()) for seeds in (ours, theirs)]
    single = fixed == [True, True] and len(ours) == len(theirs) == 1
    if single:
        ours, theirs = ({None: next(iter(seeds.values()))} for seeds in (ours, theirs))
    elif fixed[0] and len(ours) == 1:
        ours = dict.fromkeys(theirs, *ours.values())
    elif fixed[1] and len(theirs) == 1:
        theirs = dict.fromkeys(ours, *theirs.values())
    seeds = [seed for seed in ours if seed in theirs]
    pairs: dict[Any, tuple[Predictions, Predictions]] = {}
    reason = None if seeds else "no seed in common"
    for seed in seeds:
        pair = []
        for folder in (ours[seed], theirs[seed]):
            predictions = read(folder)
            if isinstance(predictions, str):
                reason = f"predictions of the {read.split} split cannot be used: {folder} (its file {predictions})"
            elif measure not in MAIN_METRIC_CHOICES[predictions.form]:
                reason = f"{display_name(measure)} cannot be computed from the predictions: {folder}"
            elif not _agrees(table.records[folder], read.split, predictions):
                metric = display_name(MAIN_METRIC_CHOICES[predictions.form][0])
                reason = f"predictions and run.json disagree about {metric}: {folder}"
            else:
                pair.append(predictions)
        if len(pair) == 2:
            reference = next(iter(pairs.values()))[0] if pairs else pair[0]
            if all(reference.has_same_examples(predictions) for predictions in pair):
                pairs[seed] = pair[0], pair[1]
            else:
                reason = f"predictions of other examples than the baseline: {ours[seed]}"
    # A side that predicts the same for all examples has MCC or correlation 0 by convention, and no spread shows.
    sides = list(zip(*pairs.values(), strict=True))
    if any(all(predictions.is_constant for predictions in side) for side in sides):
        output = "number" if measure in MAIN_METRIC_CHOICES["regression"] else "label"
        return _Pair([], [], why=f"one side predicts the same {output} for all examples, in every seed")
    if sides and measure in NEED_SEVERAL_LABELS and (labels := sides[0][0].labels).min() == labels.max():
        return _Pair([], [], why=f"{display_name(measure)} is not defined, since all examples have the same label")
    ours_paired, theirs_paired = map(list, sides) if sides else ([], [])
    return _Pair(ours_paired, theirs_paired, list(pairs), single, not any(fixed), reason)


def _by_seed(table: Table, folders: Sequence[Path]) -> dict[Any, Path]:
    """Return the folders by seed."""
    return {json.dumps(table.records[folder]["config"].get("seed")): folder for folder in folders}


def _is_fixed(record: Mapping[str, Any]) -> bool:
    """Return whether a run trained nothing (`lora-bench prompt`), so that it pairs with every seed of a rival."""
    return "llm" in record["config"]


def _agrees(record: Mapping[str, Any], split: str, predictions: Predictions) -> bool:
    """Return whether MCC, or Spearman's correlation, of a run's predictions is the one in its record."""
    metric = MAIN_METRIC_CHOICES[predictions.form][0]
    recorded = record["metrics"].get(f"{split}/{metric}")
    return isinstance(recorded, int | float) and abs(recorded - predictions.value(metric)) < 1e-6
