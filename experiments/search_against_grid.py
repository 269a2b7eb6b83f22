#!/usr/bin/env python3
"""Compare `lora-bench search` with a grid at no more than half of the grid's FLOPs (docs/search.md).

    experiments/search_against_grid.py DATA OUTPUT [REPETITION …] [KEY=VALUE …]
    experiments/search_against_grid.py DATA OUTPUT --table
    experiments/search_against_grid.py --toy OUTPUT

DATA is a folder with QQP's train.tsv and validation.tsv. Both look for the rank and the learning rate of LoRA on
MiniLM, on 4,000 pairs for 2 epochs. The grid has rank 2 to 64 and four learning rates, 24 runs; the search has 24
trials. Both choose on the selection split. Then each winner is trained with the same three fresh seeds and scored on
validation. Repetitions 0, 1 and 2 differ in all seeds. KEY=VALUE is added to every run. --toy tries the script out in
small.

A repetition takes about 40 full runs: 35 minutes on one core that multiplies bf16 fast. Finished runs are not
repeated: start the script again to resume. The last lines are the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept_sweep import start_or_resume

from lora_bench.records import run_folder

QQP = ("model=minilm", "data=pairs", "data.train_size=4000", "data.selection_size=2000", "trainer.epochs=2")
TOY = (
    *("model=tiny_bert", "data=toy", "data.train_rows=80", "data.validation_rows=16"),
    *("trainer.max_steps=4", "trainer.precision=fp32", "trainer.device=cpu"),
)
SEARCHED = ("adapter.rank", "optimizer.lr")


@dataclass(frozen=True)
class Protocol:
    """What grid and search have in common, and how large they are."""

    task: tuple[str, ...]
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    rates: tuple[float, ...] = (1e-4, 4e-4, 1.5e-3, 6e-3)
    trials: int = 24
    fresh_seeds: int = 3

    def request(self, seed: int) -> list[str]:
        """Return the overrides of grid and search."""
        return [*self.task, "adapter=lora", f"adapter.rank={','.join(map(str, self.ranks))}", f"seed={seed}"]


def run(command: list[str], folder: Path) -> None:
    """Start a sweep in a folder, or resume the one that is there; exit if it does not end well."""
    if code := start_or_resume(command, folder):
        sys.exit(code)


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the runs below a folder, in the order of their numbers."""
    runs, _ = run_folder.find_runs([folder]) if folder.is_dir() else ([], [])
    return [record for _, record in sorted(runs, key=lambda found: int(found[0].name))]


def setting(record: dict[str, Any]) -> dict[str, Any]:
    """Return the searched values of a run."""
    return {key: record["config"][key.split(".")[0]][key.split(".")[1]] for key in SEARCHED}


def flops(runs: list[dict[str, Any]]) -> float:
    return float(sum(record["cost"]["train_flops"] or 0 for record in runs))


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the done run with the best MCC on the selection split."""
    return max((r for r in runs if r["status"] == "done"), key=lambda record: record["metrics"]["selection/mcc"])


def repeat(protocol: Protocol, output: Path, repetition: int) -> None:
    """Run the grid, its winner with fresh seeds, and the search with its own winner."""
    seed, folder = 100 * repetition, output / str(repetition)
    rates = ",".join(map(str, protocol.rates))
    grid = ["train", "-m", *protocol.request(seed), f"optimizer.lr={rates}", "data.report=false"]
    run(grid, folder / "grid")
    runs = records(folder / "grid")
    chosen = [f"{key}={value}" for key, value in setting(best(runs)).items()]
    seeds = ",".join(str(seed + 1 + i) for i in range(protocol.fresh_seeds))
    run(["train", "-m", *protocol.task, "adapter=lora", *chosen, f"seed={seeds}"], folder / "grid_final")
    interval = f"tag(log,interval({protocol.rates[0]},{protocol.rates[-1]}))"
    budget = [f"search.trials={protocol.trials}", f"search.flops={flops(runs) / 2:.6e}"]
    budget += [f"search.final_seeds={protocol.fresh_seeds}"]
    run(["search", *protocol.request(seed), f"optimizer.lr={interval}", *budget], folder / "search")


def print_table(output: Path) -> None:
    """Print a Markdown table of the finished repetitions, and the mean difference of the two winners."""
    print("| repetition | grid: setting | MCC | search: setting | MCC | difference | FLOPs of the grid |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    differences = []
    for folder in sorted(path for path in output.iterdir() if path.name.isdigit()):
        grid, final = records(folder / "grid"), records(folder / "grid_final")
        trials, repeats, searched = (records(folder / "search" / stage) for stage in ("trials", "repeats", "final"))
        if not (final and searched) or any(record["status"] != "done" for record in [*final, *searched]):
            continue
        cells, means = [], []
        for runs in (final, searched):
            values = [record["metrics"]["validation/mcc"] for record in runs]
            means.append(statistics.mean(values))
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            rank, rate = setting(runs[0]).values()
            cells += [f"rank {rank}, {rate:g}", f"{means[-1]:.4f}{spread}"]
        differences.append(means[1] - means[0])
        share = 100 * flops([*trials, *repeats]) / flops(grid)
        print(f"| {folder.name} | {' | '.join(cells)} | {differences[-1]:+.4f} | {len(trials)} trials, {share:.0f} % |")
    if differences:
        print(f"\nmean difference of validation MCC: {statistics.mean(differences):+.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("rest", nargs="*", metavar="REPETITION or KEY=VALUE")
    parser.add_argument("--toy", action="store_true", help="try the script out on generated pairs, without DATA")
    parser.add_argument("--table", action="store_true", help="print the table of the finished repetitions")
    options = parser.parse_args()
    overrides = [text for text in options.rest if "=" in text]
    repetitions = [int(text) for text in options.rest if "=" not in text] or [0, 1, 2]
    if options.toy:
        protocol, repetitions = Protocol((*TOY, *overrides), (2,), (1e-3, 1e-2), trials=2, fresh_seeds=1), [0]
    elif options.data is None:
        parser.error("DATA is missing")
    else:
        protocol = Protocol((*QQP, f"data.path={options.data.resolve()}", *overrides))
    for repetition in [] if options.table else repetitions:
        repeat(protocol, options.output, repetition)
    print_table(options.output)


if __name__ == "__main__":
    main()
