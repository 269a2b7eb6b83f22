#!/usr/bin/env python3
"""Compare LoRA, the enhanced method and full fine-tuning on six tasks. Finished runs are not repeated.

    experiments/task_suite.py DATA OUTPUT [TASK …] [KEY=VALUE …]
    experiments/task_suite.py DATA OUTPUT --table

DATA has a folder for each task, with train and validation (banking77: test) files. MiniLM, rank 8, seeds 0-2, the
default learning rate of each method, no tuning; the epoch with the best main metric on the selection split (a tenth of
train) is reported. The settings of a task are in `TASKS` below. All runs take about two hours on one core that
multiplies bf16 fast. --table prints the table of the docs from the finished runs. KEY=VALUE is added to every run.

The splits are parts of the published ones, so the results cannot be compared with published results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from lora_bench.cli import main as lora_bench
from lora_bench.config.metric_names import display_name
from lora_bench.records import run_folder

METHODS = ("lora", "enhanced", "full")
PAIRS = "data.text_columns=[sentence1,sentence2]"
SENTENCES = "data.text_columns=[sentence]"
TASKS = {
    "banking77": ("data.text_columns=[text]", "data.label_column=category", "trainer.epochs=6"),
    "mnli": (
        PAIRS,
        "data.label_names=[entailment,neutral,contradiction]",
        "data.relation=entailment",
        "trainer.epochs=1",
    ),
    "stsb": (PAIRS, "data.type=regression", "data.relation=similarity", "trainer.epochs=2"),
    "cola": (SENTENCES, "data.label_names=[unacceptable,acceptable]", "trainer.epochs=3"),
    "sst2": (SENTENCES, "data.label_names=[negative,positive]", "data.train_size=10000", "trainer.epochs=1"),
    "rte": (PAIRS, "data.label_names=[entailment,not_entailment]", "data.relation=entailment", "trainer.epochs=3"),
}
"""Settings of each task."""
COLUMNS = {
    "banking77": ("accuracy", "macro_f1", "mcc"),
    "mnli": ("accuracy", "macro_f1", "mcc"),
    "stsb": ("spearman", "pearson", "mse"),
    "cola": ("accuracy", "f1", "mcc"),
    "sst2": ("accuracy", "f1", "mcc"),
    "rte": ("accuracy", "f1", "mcc"),
}
"""Metrics of the table."""


def train(data: Path, output: Path, task: str, overrides: list[str]) -> None:
    """Train every method and seed on a task; a sweep that was stopped is resumed."""
    folder = output / task
    if folder.exists():
        lora_bench(["train", "-m", f"resume={folder}"])
        return
    settings = [f"data.path={data.resolve() / task}", *TASKS[task], "model=minilm", "data=files", f"data.task={task}"]
    sweep = [f"adapter={','.join(METHODS)}", "seed=0,1,2", "pack.size=1", f"hydra.sweep.dir={folder}"]
    lora_bench(["train", "-m", *settings, *sweep, *overrides])


def print_table(output: Path) -> None:
    """Print a Markdown table: of each task and method the mean and standard deviation over seeds."""
    print("| task | split, n | method | seeds | results | train FLOPs |")
    print("| --- | --- | --- | ---: | --- | ---: |")
    for task, names in COLUMNS.items():
        runs_found = run_folder.find_runs([output / task])[0] if (output / task).is_dir() else []
        records = [record for _, record in runs_found]
        for method in METHODS:
            runs = [r for r in records if r["choices"]["adapter"] == method and r["status"] == "done"]
            if not runs:
                continue
            split = "test" if "validation/nll" not in runs[0]["metrics"] and task == "banking77" else "validation"
            cells = []
            for name in names:
                values = [run["metrics"][f"{split}/{name}"] for run in runs]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{display_name(name)} {statistics.mean(values):.3f}{spread}")
            flops = statistics.mean(run["cost"]["train_flops"] for run in runs)
            rows = runs[0]["data"]["rows"][split]
            print(f"| {task} | {split}, {rows:,} | {method} | {len(runs)} | {', '.join(cells)} | {flops:.2e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("rest", nargs="*", metavar="TASK or KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    options = parser.parse_args()
    overrides = [text for text in options.rest if "=" in text]
    tasks = [text for text in options.rest if "=" not in text]
    if unknown := [task for task in tasks if task not in TASKS]:
        sys.exit(f"{unknown[0]} is none of the tasks {', '.join(TASKS)}")
    for task in [] if options.table else tasks or TASKS:
        train(options.data, options.output, task, overrides)
    print_table(options.output)


if __name__ == "__main__":
    main()
