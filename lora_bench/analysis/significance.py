"""Whether the rows of a table differ from a baseline beyond chance: paired tests on the predictions of their runs.

The measure is MCC unless another is asked for. Seeds that two rows share are paired, the examples are the same, and
both are counted as chance (`stats.crossed_test`); p values are adjusted by Holm for the number of rivals that were
tested. What cannot be tested says why. Predictions are read only here, and only of rows that are tested.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.experiments import experiment_of
from lora_bench.analysis.table import value_text
from lora_bench.console.format import to_single_line
from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.analysis.statistics import Comparison
    from lora_bench.analysis.table import Row, Table
    from lora_bench.records.predictions import Predictions

MARGIN = 0.01
ALPHA = 0.05
BASELINE = "baseline"
NOT_TESTED = "not tested"
NO_VERDICT = "no verdict"


@dataclass(frozen=True)
class Finding:
    """A row against the baseline: the row's measure minus the baseline's. What could not be found out is None."""

    baseline: str
    verdict: str
    """A word of `stats.VERDICTS` about the row; `baseline`, `no verdict` or `not tested`."""
    measure: str = "mcc"
    """Of `stats.MEASURES`."""
    why: str | None = None
    """Why there is no verdict or no test."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    """95 % interval of the difference, over seeds and examples."""
    p: float | None = None
    p_holm: float | None = None
    p_margin: float | None = None
    """Of a true difference of the margin or more, adjusted as `p_holm`: two one-sided tests."""
    effect_size: float | None = None
    """Mean difference over its standard deviation over seeds (Hedges), from three seeds on."""
    power: float | None = None
    """The chance that this comparison finds a true difference of the margin, at Holm's strictest level."""
    detectable: float | None = None
    """The true difference that it finds with a chance of 80 %, at the same level."""
    paired_seeds: int | None = None
    examples: int | None = None
    p_seeds: float | None = None
    """Paired t test over seeds; the examples are taken for granted. None where no spread shows."""
    p_bootstrap: list[float] | None = None
    p_mcnemar: list[float] | None = None
    """Of each seed's pair of models; the models are taken for granted. The bootstrap asks about the measure,
    McNemar's mid-p test about accuracy."""


def against(
    table: Table, baseline: Row, rivals: Sequence[Row], split: str, margin: float = MARGIN, measure: str = "mcc"
) -> list[Finding]:
    """Each rival against the baseline, with p values adjusted for those that could be tested.

    Args:
        table: whose rows they are, with the records of their runs.
        baseline: a row on the same data as the rivals.
        split: whose predictions are compared.
        margin: a difference up to this is of no account.
        measure: what differs, of `stats.MEASURES`.
    """
    from lora_bench.analysis import statistics

    read = _Reader(split)
    pairs = [_paired(table, read, rival, baseline) for rival in rivals]
    tests = {i: pair.test(measure) for i, pair in enumerate(pairs) if pair.ours}
    counted = {i: test for i, test in tests.items() if test.seeds > 1 or pairs[i].fixed}
    p_holm = dict(zip(counted, statistics.holm([test.p for test in counted.values()]), strict=True))
    p_margin = dict(zip(counted, statistics.holm([test.p_beyond(margin) for test in counted.values()]), strict=True))
    level, name, found = ALPHA / max(1, len(counted)), label(table, baseline), []
    for i, pair in enumerate(pairs):
        if i not in tests:
            found.append(Finding(name, NOT_TESTED, measure, pair.why))
            continue
        test = tests[i]
        low, high = test.interval()
        finding = Finding(
            baseline=name,
            verdict=NO_VERDICT,
            measure=measure,
            why="one seed, so chance over seeds is not known",
            difference=test.difference,
            difference_low=low,
            difference_high=high,
            p=test.p,
            paired_seeds=test.seeds,
            examples=test.examples,
            **pair.habits(measure),
        )
        if i in counted:
            finding = replace(
                finding,
                verdict=statistics.verdict(test.difference, p_holm[i], p_margin[i], ALPHA),
                why=pair.why,
                p_holm=p_holm[i],
                p_margin=p_margin[i],
                power=test.power(margin, level),
                detectable=test.detectable(alpha=level),
            )
        found.append(finding)
    return found


def label(table: Table, row: Row) -> str:
    """A row's name: what its key columns hold, as typed in an override."""
    return ", ".join(
        f"{to_single_line(c.name)}={value_text(row.keys[c.name])}" for c in table.keys if c.name in row.keys
    )


# -- which runs are paired --


def selection_mcc(table: Table, folders: Sequence[Path]) -> float:
    """Mean MCC on the selection split, by which alone anything is chosen; -inf where a run has none."""
    found = [table.records[folder]["metrics"].get("selection/mcc") for folder in folders]
    numbers = [float(x) for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
    return fmean(numbers) if len(numbers) == len(found) else -math.inf


@dataclass(frozen=True)
class _Pair:
    """Predictions of a row and of the baseline, seed by seed, on the same examples."""

    ours: list[Predictions]
    theirs: list[Predictions]
    fixed: bool = False
    """Neither was trained, so there is no chance over seeds to miss."""
    why: str | None = None
    """Why there are none, or fewer than there are seeds."""

    def test(self, measure: str) -> Comparison:
        import numpy as np

        from lora_bench.analysis import statistics

        ours, theirs = (np.stack([each.predicted for each in side]) for side in (self.ours, self.theirs))  # (S, N)
        return statistics.crossed_test(self.ours[0].labels, ours, theirs, measure)

    def habits(self, measure: str) -> dict[str, Any]:
        """What the field reports beside: over seeds alone, and over the examples alone for each seed."""
        from lora_bench.analysis import statistics

        labels = self.ours[0].labels
        both = list(zip(self.ours, self.theirs, strict=True))
        ours, theirs = ([each.value(measure) for each in side] for side in (self.ours, self.theirs))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        return {
            "effect_size": statistics.effect_size(differences),
            "p_seeds": None if statistics.alike(differences) else statistics.seeds_test(ours, theirs).p,
            "p_bootstrap": [statistics.paired_bootstrap(labels, a.predicted, b.predicted, measure).p for a, b in both],
            "p_mcnemar": [statistics.mcnemar(a.right, b.right).p for a, b in both],
        }


class _Reader:
    """Reads each run's predictions once; what cannot be used is the reason for it."""

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


def _paired(table: Table, read: _Reader, rival: Row, baseline: Row) -> _Pair:
    """The seeds that both have, with predictions of the same examples."""
    ours, theirs = (_by_seed(table, best_experiment(table, row)) for row in (rival, baseline))
    fixed = [all(_is_fixed(table.records[folder]) for folder in seeds.values()) for seeds in (ours, theirs)]
    if fixed == [True, True]:
        ours, theirs = ({None: next(iter(seeds.values()))} for seeds in (ours, theirs))
    elif fixed[0] and len(ours) == 1:
        ours = dict.fromkeys(theirs, *ours.values())
    elif fixed[1] and len(theirs) == 1:
        theirs = dict.fromkeys(ours, *theirs.values())
    seeds = [seed for seed in ours if seed in theirs]
    whole: list[tuple[Predictions, Predictions]] = []
    why = None if seeds else "no seed in common"
    for seed in seeds:
        pair = []
        for folder in (ours[seed], theirs[seed]):
            found = read(folder)
            if isinstance(found, str):
                why = f"no usable predictions of the {read.split} split: {folder} (its file {found})"
            elif not _agrees(table.records[folder], read.split, found):
                why = f"predictions and run.json disagree about MCC: {folder}"
            else:
                pair.append(found)
        if len(pair) == 2:
            first = whole[0][0] if whole else pair[0]
            if all(first.same_examples(each) for each in pair):
                whole.append((pair[0], pair[1]))
            else:
                why = f"predictions of other examples than the baseline: {ours[seed]}"
    # A side that never tells two examples apart has MCC 0 by convention, and no spread shows.
    if whole and any(all(each.is_constant for each in side) for side in zip(*whole, strict=True)):
        return _Pair([], [], all(fixed), "the answers of one side are all alike, in every seed")
    return _Pair([a for a, _ in whole], [b for _, b in whole], all(fixed), why)


def best_experiment(table: Table, row: Row) -> list[Path]:
    """The row's runs; of several experiments in a row (`--by`), the runs of the one that is best on selection."""
    experiments: dict[str, list[Path]] = {}
    for folder in row.folders:
        experiments.setdefault(experiment_of(table.records[folder]), []).append(folder)
    return max(experiments.values(), key=lambda folders: selection_mcc(table, folders))


def _by_seed(table: Table, folders: Sequence[Path]) -> dict[Any, Path]:
    return {json.dumps(table.records[folder]["config"].get("seed")): folder for folder in folders}


def _is_fixed(record: Mapping[str, Any]) -> bool:
    """Whether nothing was trained (`lora-bench prompt`): the same answers stand beside every seed of a rival."""
    return "llm" in record["config"]


def _agrees(record: Mapping[str, Any], split: str, found: Predictions) -> bool:
    recorded = record["metrics"].get(f"{split}/mcc")
    return isinstance(recorded, int | float) and abs(recorded - found.mcc) < 1e-6
