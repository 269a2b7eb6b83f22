#!/usr/bin/env python3
"""Print the second table of docs/results/target-quality.md: the time to the target, measured side by side.

    experiments/target_time.py data.path=DIR [KEY=VALUE …] [--rounds N]

The runs of the stage `target` take hours, beside whatever else the machine does. This script repeats the first 40 steps
of each of its methods, with the overrides in the kept records, in turn and for several rounds. Run nothing else
meanwhile. Columns are medians over the rounds: the seconds before the first step, and those of a step. The seconds to
the target are the first, and the second times the mean number of steps over the seeds. KEY=VALUE is added to every run:
data.path=DIR is the folder with QQP's train.tsv and validation.tsv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from target_table import BASELINES, FULL, METHODS, RECIPE_FULL, RECORDS, final_score, format_share, read_models

from lora_bench.cli import main as lora_bench
from lora_bench.records import run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from target_table import Costs

STEPS = 40
SHORT = (
    *(f"trainer.max_steps={STEPS}", "trainer.eval_every=null", "trainer.stop_at=null"),
    *("data.selection_size=64", "data.report=false"),
)
"""Overrides of a run that is only to be timed: the data that are scored are not."""


def time_run(overrides: Sequence[str]) -> tuple[float, float]:
    """Train for `STEPS` steps; return the seconds before the first one, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        with redirect_stdout(sys.stderr):
            code = lora_bench(["train", *overrides, f"hydra.run.dir={folder}"])
        if code != 0:
            sys.exit(code)
        cost = run_folder.read(folder)["cost"]
    before = float(cost["prepare_seconds"] or 0)
    return before, (cost["train_seconds"] - before) / cost["steps"]


def time_methods(methods: Mapping[str, Costs], overrides: Sequence[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median seconds before the first step, and of a step, of each method, timed in turn."""
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, costs in methods.items():
            _, record = costs.runs[0]
            timed[name].append(time_run([*record["overrides"], *SHORT, *overrides]))
    return {name: (median(x for x, _ in pairs), median(y for _, y in pairs)) for name, pairs in timed.items()}


def format_model(model: str, methods: Mapping[str, Costs], timed: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the rows of a model's methods."""
    target = final_score(methods[FULL])
    to_target: dict[str, float] = {}
    for name, (before, step) in timed.items():
        reached = [steps for steps in methods[name].steps(target) if steps is not None]
        if len(reached) == len(methods[name].runs):
            to_target[name] = before + step * fmean(reached)
    before, step = timed[FULL]
    whole = before + step * fmean(record["cost"]["steps"] for _, record in methods[FULL].runs)
    lines = []
    for name, (before, step) in timed.items():
        seconds = to_target.get(name)
        cells = [model, METHODS[name], f"{before:.1f}", f"{step:.2f}", "—" if seconds is None else f"{seconds:.0f}"]
        baselines = [None if name == other else to_target.get(other) for other in (FULL, RECIPE_FULL)]
        cells += [format_share(seconds, baseline) for baseline in (*baselines, whole)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the kept records")
    options = parser.parse_args()
    columns = ["backbone", "method", "before the first step", "a step", "seconds to target", *BASELINES]
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    for model, methods in read_models(options.records).items():
        timed = time_methods(methods, options.overrides, options.rounds)
        print("\n".join(format_model(model, methods, timed)))


if __name__ == "__main__":
    main()
