#!/usr/bin/env python3
"""Print the first table of docs/results/target-quality.md: the cost of reaching the final quality of full fine-tuning.

    experiments/target_table.py

It reads the records that `experiments/reproduce_enhanced.py --records experiments/records/enhanced` keeps of the stage
`target`. The target of a model is the selection MCC with which full fine-tuning ends in its worst seed. It is reached
at the first of three evaluations in a row, as `lora-bench compare` counts it. FLOPs are means over the seeds, those
before the first step included, those of evaluations not. The last columns have the shares saved of full fine-tuning's
cost to the target, of that with the recipe, and of all steps of full fine-tuning.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lora_bench.analysis.savings import cost_up_to, step_to_target
from lora_bench.records import run_folder
from lora_bench.records.metrics_log import selection_curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

RECORDS = Path(__file__).parent / "records" / "enhanced" / "target"
FULL, RECIPE_FULL = "full", "recipe-full"
METHODS = {
    FULL: "full",
    "lora": "LoRA",
    RECIPE_FULL: "full, with the recipe",
    "enhanced": "enhanced",
    "enhanced-upper": "enhanced, upper four layers, one epoch",
}
"""Folders of the stage below a model, with the names of their methods."""
BASELINES = ("saved against full", "saved against full with the recipe", "saved against all steps of full")
"""The last columns of the tables."""


@dataclass(frozen=True)
class Costs:
    """The runs of a method, one per seed, and their cost up to a target."""

    runs: list[tuple[Path, dict[str, Any]]]
    """Folder and record of each run, by seed."""

    @classmethod
    def read(cls, folder: Path) -> Costs:
        """Return the costs of the finished runs below a folder; there are none if there is no such folder."""
        found = run_folder.find_runs([folder])[0] if folder.is_dir() else []
        done = [(path, record) for path, record in found if record["status"] == "done"]
        return cls(sorted(done, key=lambda run: int(run[1]["config"]["seed"])))

    def curves(self) -> list[list[tuple[float, float]]]:
        """Return step and MCC of each evaluation of the selection split, of each run."""
        return [selection_curve(path / run_folder.METRICS_FILE, "mcc", may_choose=True) for path, _ in self.runs]

    def steps(self, target: float) -> list[float | None]:
        """Return the step at which each run reaches a target; None if it does not."""
        return [step_to_target(curve, target) for curve in self.curves()]

    def flops(self, steps: Sequence[float | None]) -> float | None:
        """Return the mean FLOPs up to a step of each run; None if one of them is None."""
        runs = zip(self.runs, steps, strict=True)
        flops = [None if step is None else cost_up_to(record["cost"], "flops", step) for (_, record), step in runs]
        known = [x for x in flops if x is not None]
        return fmean(known) if len(known) == len(flops) else None


def read_models(records: Path) -> dict[str, dict[str, Costs]]:
    """Return the methods that have records, by the folder of their model; one without full fine-tuning is absent."""
    models = {}
    for folder in sorted(path for path in records.iterdir() if path.is_dir()):
        methods = {name: read for name in METHODS if (read := Costs.read(folder / name)).runs}
        if FULL in methods:
            models[folder.name] = methods
    return models


def final_score(full: Costs) -> float:
    """Return the target: the selection MCC with which full fine-tuning ends in its worst seed."""
    return min(curve[-1][1] for curve in full.curves())


def format_model(model: str, methods: Mapping[str, Costs]) -> list[str]:
    """Return the rows of a model's methods."""
    target = final_score(methods[FULL])
    steps = {name: costs.steps(target) for name, costs in methods.items()}
    to_target = {name: costs.flops(steps[name]) for name, costs in methods.items()}
    whole = methods[FULL].flops([record["cost"]["steps"] for _, record in methods[FULL].runs])
    lines = []
    for name, flops in to_target.items():
        cells = [f"{model}, to {target:.3f}", METHODS[name]]
        cells.append(", ".join("—" if step is None else f"{step:.0f}" for step in steps[name]))
        cells.append("—" if flops is None else f"{flops / 1e12:.1f}")
        baselines = [None if name == other else to_target.get(other) for other in (FULL, RECIPE_FULL)]
        cells += [format_share(flops, baseline) for baseline in (*baselines, whole)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_share(cost: float | None, baseline: float | None) -> str:
    """Return the share of a baseline's cost that is saved; empty without one of them."""
    return "" if cost is None or baseline is None else f"{100 * (1 - cost / baseline):.0f} %"


def format_table(records: Path) -> str:
    """Return the table in Markdown, of the models that have records."""
    columns = ["backbone", "method", "steps of each seed", "TFLOP", *BASELINES]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for model, methods in read_models(records).items():
        lines += format_model(model, methods)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the kept records")
    print(format_table(parser.parse_args().records))


if __name__ == "__main__":
    main()
