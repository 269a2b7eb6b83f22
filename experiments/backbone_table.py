#!/usr/bin/env python3
"""Print the tables of docs/results/backbones.md: five methods on each backbone, and tests against the enhanced one.

    experiments/backbone_table.py

It reads the records that `experiments/reproduce_enhanced.py --records experiments/records/enhanced` keeps of the stage
`backbones`. Values are the mean and standard deviation over the seeds on the whole of validation. Holm's correction is
over the four rivals of one backbone and measure. In the last table label 1 is predicted from the score on that has the
best MCC on the run's selection split.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from result_tables import difference_cells

from lora_bench.analysis.statistics import crossed_test, holm, pool_seed_variance
from lora_bench.api import compare
from lora_bench.evaluation.scores import predict_labels
from lora_bench.records import predictions, run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

RECORDS = Path(__file__).parent / "records" / "enhanced" / "backbones"
BACKBONES = ("minilm", "roberta_mini", "t5_mini")
BASELINE = "enhanced"
METRICS = {"accuracy": 4, "f1": 4, "mcc": 4, "nll": 3, "ece": 3}
"""The metrics of the first table, with their decimals."""
THRESHOLD_MCC = "validation/calibrated/mcc"
MEASURES = ("mcc", "f1")
"""The metrics that are tested."""


def method_of(record: dict[str, Any]) -> str:
    """Return the name of a run's method in the tables."""
    choices = record["choices"]
    return f"{choices['adapter']}, with the recipe" if choices.get("experiment") == "recipe" else choices["adapter"]


def format_scores(backbone: str, folder: Path) -> list[str]:
    """Return the rows of a backbone in the first table, best MCC first."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for _, record in run_folder.find_runs([folder])[0]:
        by_method.setdefault(method_of(record), []).append(record)
    rows = []
    for method, records in by_method.items():
        cells = [backbone, method, f"{records[0]['config']['optimizer']['lr']:g}"]
        for name, decimals in METRICS.items():
            values = [record["metrics"][f"validation/{name}"] for record in records]
            cells.append(f"{fmean(values):.{decimals}f} ± {stdev(values):.{decimals}f}")
        cells.append(f"{fmean(record['cost']['train_flops'] for record in records) / 1e12:.0f}")
        rows.append((fmean(record["metrics"]["validation/mcc"] for record in records), cells))
    return [f"| {' | '.join(cells)} |" for _, cells in sorted(rows, reverse=True)]


def format_tests(backbone: str, folder: Path) -> list[str]:
    """Return the rows of a backbone in the second table: each rival against the enhanced method, by MCC and by F1."""
    frames = [compare(folder, baseline=BASELINE, measure=measure) for measure in MEASURES]
    lines = []
    for _, row in frames[0].iterrows():
        if row["tests.verdict"] == "baseline":
            continue
        cells = [backbone, method_of(run_folder.read(Path(row["runs"][0])))]
        for frame in frames:
            other = frame.loc[[runs == row["runs"] for runs in frame["runs"]]].iloc[0]
            cells += difference_cells(other)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_thresholds(backbone: str, folder: Path) -> list[str]:
    """Return the rows of a backbone in the third table, at the chosen thresholds, with the MCC tested, best first."""
    by_method: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for run, record in sorted(run_folder.find_runs([folder])[0], key=lambda found: found[1]["config"]["seed"]):
        by_method.setdefault(method_of(record), []).append((run, record))
    labels = predictions.read(by_method[BASELINE][0][0], "validation").labels  # (N,)
    predicted = {method: np.stack([_predict(*found) for found in runs]) for method, runs in by_method.items()}  # (S, N)
    values = {
        metric: {method: [record["metrics"][metric] for _, record in runs] for method, runs in by_method.items()}
        for metric in ("validation/calibrated/f1", THRESHOLD_MCC, "validation/auroc")
    }
    pool = pool_seed_variance(
        [{str(seed): x for seed, x in enumerate(of_seeds)} for of_seeds in values[THRESHOLD_MCC].values()]
    )
    tests = {rival: crossed_test(labels, predicted[rival], predicted[BASELINE]) for rival in by_method}
    del tests[BASELINE]
    if pool is not None:
        tests = {rival: test.with_pooled_seeds(pool) for rival, test in tests.items()}
    cells = {BASELINE: ["", ""]}
    for (rival, test), p in zip(tests.items(), holm([test.p for test in tests.values()]), strict=True):
        low, high = test.interval()
        interval = {"tests.difference_low": low, "tests.difference_high": high}
        cells[rival] = difference_cells({"tests.difference": test.difference, **interval, "tests.p_holm": p})
    rows = []
    for method in sorted(by_method, key=lambda method: -fmean(values[THRESHOLD_MCC][method])):
        means = [f"{fmean(of[method]):.4f} ± {stdev(of[method]):.4f}" for of in values.values()]
        rows.append(f"| {' | '.join([backbone, method, *means, *cells[method]])} |")
    return rows


def _predict(run: Path, record: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the labels that a run predicts, at its chosen threshold: (N,)."""
    return predict_labels(predictions.read(run, "validation").scores, record["selection"]["threshold"])


def format_tables(records: Path, backbones: Sequence[str] = BACKBONES) -> str:
    """Return the tables in Markdown, of the backbones that have records."""
    kept = [backbone for backbone in backbones if (records / backbone).is_dir()]
    scores = ["| backbone | method | learning rate | accuracy | F1 | MCC | NLL | ECE | TFLOP |"]
    scores += ["| --- | --- |" + " ---: |" * 7]
    tests = ["| backbone | rival | MCC of the rival − enhanced | p | F1 of the rival − enhanced | p |"]
    tests += ["| --- | --- |" + " ---: |" * 4]
    thresholds = ["| backbone | method | F1 | MCC | AUROC | MCC − that of enhanced | p |"]
    thresholds += ["| --- | --- |" + " ---: |" * 5]
    for backbone in kept:
        thresholds += format_thresholds(backbone, records / backbone)
        scores += format_scores(backbone, records / backbone)
        tests += format_tests(backbone, records / backbone)
    return "\n".join([*scores, "", *tests, "", *thresholds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the kept records")
    print(format_tables(parser.parse_args().records))


if __name__ == "__main__":
    main()
