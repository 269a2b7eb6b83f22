#!/usr/bin/env python3
"""Compare the enhanced method and its rivals on eight tasks, each at its tuned learning rate.

    experiments/tuned_suite.py DATA OUTPUT [TASK …] [KEY=VALUE …] [--methods METHOD …]
    experiments/tuned_suite.py DATA OUTPUT --table

DATA has a folder for each task of `TASKS`, with train and validation (banking77: test) files. MiniLM, rank 8. The
learning rate of each method is chosen from the same four values on the task's selection split, with 2,000 examples,
3 epochs and seed 0. Then the method is trained with seeds 0, 1 and 2, and scored on the reported split.
METHODS are the overrides of a method, such as "experiment=recipe adapter=lora".

After each method of a task the records of its reported runs are kept, without weights and texts, in
experiments/records/tuned_suite (--records names another folder); it is not trained again then. The eighth task, QQP, is
read from the records that `experiments/reproduce_enhanced.py DATA OUT backbones` keeps of MiniLM.

--table prints three tables of the kept records, in points of 100 times the task's main metric: the means; how the first
method differs from each other over the tasks (Wilcoxon's signed-rank test of the task means, two-sided); and how each
method differs from the first one on each task (Holm's correction over the rivals of a task).

A method of a task takes 10 to 20 minutes of one core that has AMX, and up to six times as long without it. All methods
of a task need the same precision, so it is bf16 unless trainer.precision=fp32 is given. The splits are parts of the
published ones, so the results cannot be compared with published results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from kept_sweep import run_kept
from result_tables import difference_cells, method_overrides

from lora_bench.api import compare
from lora_bench.config.recorded_task import main_metric
from lora_bench.records import run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECORDS = Path(__file__).parent / "records" / "tuned_suite"
QQP_RECORDS = Path("enhanced", "backbones", "minilm")  # beside tuned_suite
METHODS = (
    "experiment=enhanced",
    "adapter=lora",
    "experiment=recipe adapter=lora",
    "adapter=full",
    "experiment=recipe adapter=full",
)
LEARNING_RATES = "1e-4,4e-4,1.5e-3,6e-3"
SEEDS = 3
PAIR, SENTENCE = "data.text_columns=[sentence1,sentence2]", "data.text_columns=[sentence]"
ENTAILMENT = "data.relation=entailment"
TASKS = {
    "mrpc": (PAIR, "data.relation=paraphrase", "data.selection_size=700", "data.train_size=2900", "trainer.epochs=4"),
    "rte": (
        PAIR,
        ENTAILMENT,
        "data.label_names=[entailment,not_entailment]",
        *("data.selection_size=450", "data.train_size=2000", "trainer.epochs=4"),
    ),
    "stsb": (
        PAIR,
        "data.type=regression",
        "data.relation=similarity",
        *("data.selection_size=1000", "data.train_size=4000", "trainer.epochs=3"),
    ),
    "sst2": (SENTENCE, "data.label_names=[negative,positive]", "data.train_size=4000", "trainer.epochs=2"),
    "cola": (
        SENTENCE,
        "data.relation=form",
        "data.label_names=[unacceptable,acceptable]",
        *("data.train_size=6500", "trainer.epochs=3"),
    ),
    "mnli": (
        PAIR,
        ENTAILMENT,
        "data.label_names=[entailment,neutral,contradiction]",
        *("data.selection_size=1500", "data.train_size=4000", "trainer.epochs=2"),
    ),
    "banking77": (
        "data.text_columns=[text]",
        "data.label_column=category",
        *("data.train_size=4000", "trainer.epochs=6"),
    ),
}
"""Settings of each task."""


def folder_name(method: str) -> str:
    """Return the name of a method's folders: `recipe-lora` of "experiment=recipe adapter=lora"."""
    return "-".join(text.partition("=")[2] for text in method.split())


def sweep_arguments(task: str, method: str, data: Path) -> list[str]:
    """Return the arguments of the sweep of a method on a task, without its folder."""
    tuning = "{seed: 0, data: {train_size: 2000, report: false}, trainer: {epochs: 3, eval_every: null}}"
    sweep = ["hydra/sweeper=tuned", f"++hydra.sweeper.tune={tuning}", *method.split()]
    grid = [f"optimizer.lr={LEARNING_RATES}", f"seed={','.join(map(str, range(SEEDS)))}"]
    chosen = ["data=files", f"data.task={task}", *TASKS[task], f"data.path={data.resolve() / task}"]
    if not any(text.startswith("data.selection_size=") for text in chosen):
        chosen.append("data.selection_size=2000")
    return [*sweep, "model=minilm", "trainer.precision=bf16", *grid, *chosen]


def scores_by_method(records: Path) -> dict[str, list[float]]:
    """Return 100 times the main metric on the reported split, of each seed, by the overrides that name the method."""
    scores: dict[str, list[float]] = {}
    for _, record in run_folder.find_runs([records])[0] if records.is_dir() else []:
        scores.setdefault(method_overrides(record["overrides"]), []).append(100 * _reported(record))
    return scores


def _reported(record: Mapping[str, Any]) -> float:
    """Return the main metric of a record on its validation split, or on its test split if it has no other."""
    names = (f"{split}/{main_metric(record)}" for split in ("validation", "test"))
    return float(next(record["metrics"][name] for name in names if name in record["metrics"]))


def format_tables(scores: Mapping[str, Mapping[str, Sequence[float]]], methods: Sequence[str]) -> str:
    """Return two tables in Markdown: the scores of each task, and the differences of the first method over the tasks.

    Args:
        scores: by task, then by method, of each seed; a method may be missing, but not the first one.
        methods: in the order of the tables.
    """
    from scipy.stats import wilcoxon

    first, *others = methods
    lines = [f"| task | {' | '.join([first, *others])} |", "| --- |" + " ---: |" * (1 + len(others))]
    for task, by_method in scores.items():
        cells = [by_method.get(method, []) for method in (first, *others)]
        texts = [f"{fmean(cell):.1f} ± {stdev(cell):.1f}" if len(cell) > 1 else "" for cell in cells]
        lines.append(f"| {task} | {' | '.join(texts)} |")
    lines += ["", f"| {first} against | mean difference | tasks ahead | p |", "| --- | ---: | ---: | ---: |"]
    for other in others:
        tasks = [by_method for by_method in scores.values() if other in by_method]
        if not tasks:
            continue
        differences = [fmean(by_method[first]) - fmean(by_method[other]) for by_method in tasks]
        p = wilcoxon(differences).pvalue if any(differences) else 1.0
        ahead = sum(difference > 0 for difference in differences)
        lines.append(f"| {other} | {fmean(differences):+.2f} | {ahead} of {len(differences)} | {p:.3f} |")
    return "\n".join(lines)


def format_tests(folders: Mapping[str, Path], methods: Sequence[str]) -> str:
    """Return a table in Markdown: each method on each task, and how it differs from the first method there."""
    lines = ["| task | method | learning rate | score | method − first | p | TFLOP |"]
    lines.append("| --- | --- |" + " ---: |" * 5)
    for task, folder in folders.items():
        records = {str(run): record for run, record in run_folder.find_runs([folder])[0]}
        names = {run: method_overrides(record["overrides"]) for run, record in records.items()}
        baseline = next(run for run, name in names.items() if name == methods[0])
        rows = {names[row["runs"][0]]: row for _, row in compare(folder, baseline=baseline).iterrows()}
        for method in (method for method in methods if method in rows):
            runs = [records[run] for run in rows[method]["runs"]]
            scores = [100 * _reported(record) for record in runs]
            flops = fmean(record["cost"]["train_flops"] for record in runs) / 1e12
            cells = [task, method, f"{runs[0]['config']['optimizer']['lr']:g}"]
            cells.append(f"{fmean(scores):.1f} ± {stdev(scores):.1f}")
            cells += ["", ""] if method == methods[0] else difference_cells(rows[method], points=True)
            lines.append(f"| {' | '.join(cells)} | {flops:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("rest", nargs="*", metavar="TASK or KEY=VALUE")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="in place of the five methods")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records that are kept")
    parser.add_argument("--table", action="store_true", help="only print the tables of the kept records")
    options = parser.parse_args()
    overrides = [text for text in options.rest if "=" in text]
    tasks = [text for text in options.rest if "=" not in text] or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"{unknown[0]} is none of the tasks {', '.join(TASKS)}")
    worst = 0
    for task in [] if options.table else tasks:
        for method in options.methods:
            print(f"\n{task}: {method}", flush=True)
            place = Path(task, folder_name(method))
            arguments = [*sweep_arguments(task, method, options.data), *overrides]
            code = run_kept(arguments, options.output / place, options.records / place, SEEDS)
            if code in (130, 143):  # interrupted: the same command resumes it
                return code
            worst = max(worst, code)
    folders = {"qqp": options.records.parent / QQP_RECORDS} | {task: options.records / task for task in TASKS}
    scores = {task: scores_by_method(folder) for task, folder in folders.items()}
    if kept := {task: by_method for task, by_method in scores.items() if options.methods[0] in by_method}:
        print(format_tables(kept, options.methods), end="\n\n")
        print(format_tests({task: folders[task] for task in kept}, options.methods))
    return worst


if __name__ == "__main__":
    sys.exit(main())
