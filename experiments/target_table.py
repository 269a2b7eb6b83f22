#!/usr/bin/env python3
"""Print the table of docs/results/target-quality.md: the cost of reaching the final quality of full fine-tuning.

    experiments/target_table.py

It reads the records that `experiments/reproduce_enhanced.py --records experiments/records/enhanced` keeps of the stage
`target`. The target of a model is the selection MCC with which full fine-tuning ends in its worst seed, reached at the
first of three evaluations in a row, as `lora-bench compare` counts it. Costs are means over the seeds, with everything
before the first step and without evaluations. The last columns have the shares of FLOPs and of seconds that are saved
of full fine-tuning's cost to the target, of that with the recipe, and of all steps of full fine-tuning.
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
    from collections.abc import Sequence
    from typing import Any

RECORDS = Path(__file__).parent / "records" / "enhanced" / "target"
MODELS = ("minilm", "roberta_mini")
FULL, RECIPE_FULL = "full", "recipe-full"
METHODS = {
    FULL: "full",
    "lora": "LoRA",
    RECIPE_FULL: "full, with the recipe",
    "enhanced": "enhanced",
    "enhanced-upper": "enhanced, upper four layers, one epoch",
}
"""Folders of the stage below a model, with the names of their methods."""


@dataclass(frozen=True)
class Costs:
    """The costs of a method's runs, one per seed."""

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
        return [selection_curve(path / run_folder.METRICS_FILE, "mcc") for path, _ in self.runs]

    def steps(self, target: float) -> list[float | None]:
        """Return the step at which each run reaches a target; None if it does not."""
        return [step_to_target(curve, target) for curve in self.curves()]

    def up_to(self, steps: Sequence[float | None]) -> tuple[float, float] | None:
        """Return the mean FLOPs and seconds up to a step of each run; None if one of them is None, or no run is."""
        if not steps or None in steps:
            return None
        costs = [record["cost"] for _, record in self.runs]
        flops, seconds = (
            fmean(cost_up_to(cost, unit, step) for cost, step in zip(costs, steps, strict=True) if step is not None)
            for unit in ("flops", "seconds")
        )
        return flops, seconds


def format_model(model: str, folder: Path) -> list[str]:
    """Return the rows of a model; none if full fine-tuning has no records."""
    costs = {name: read for name in METHODS if (read := Costs.read(folder / name)).runs}
    if FULL not in costs:
        return []
    target = min(curve[-1][1] for curve in costs[FULL].curves())
    steps = {name: of_method.steps(target) for name, of_method in costs.items()}
    to_target = {name: of_method.up_to(steps[name]) for name, of_method in costs.items()}
    whole = costs[FULL].up_to([record["cost"]["steps"] for _, record in costs[FULL].runs])
    lines = []
    for name in costs:
        cells = [f"{model}, to {target:.3f}", METHODS[name]]
        cells.append(", ".join("—" if step is None else f"{step:.0f}" for step in steps[name]))
        cost = to_target[name]
        cells += ["—", "—"] if cost is None else [f"{cost[0] / 1e12:.1f}", f"{cost[1]:.0f}"]
        baselines = [None if name == other else to_target.get(other) for other in (FULL, RECIPE_FULL)]
        cells += [format_saving(cost, baseline) for baseline in (*baselines, whole)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_saving(cost: tuple[float, float] | None, baseline: tuple[float, float] | None) -> str:
    """Return the shares of FLOPs and of seconds that are saved of a baseline; empty without one of them."""
    if cost is None or baseline is None:
        return ""
    return ", ".join(f"{100 * (1 - x / y):.0f} %" for x, y in zip(cost, baseline, strict=True))


def format_table(records: Path) -> str:
    """Return the table in Markdown, of the models that have records."""
    baselines = ("full", "full, with the recipe", "all steps of full")
    columns = [
        "backbone",
        "method",
        "steps of each seed",
        "TFLOP",
        "seconds",
        *(f"saved of {name}" for name in baselines),
    ]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for model in MODELS:
        lines += format_model(model, records / model)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the kept records")
    print(format_table(parser.parse_args().records))


if __name__ == "__main__":
    main()
