#!/usr/bin/env python3
"""Compare the time, memory and FLOPs that `dry_run=true` estimates with those of the run itself.

    benchmarks/estimates.py adapter=lora adapter=full,adapter.layers=top:3 -- model=minilm data=toy trainer.max_steps=20

Before `--`, each argument is a row: overrides separated by commas. After it are the overrides of all rows. Estimate and
run are processes of their own, one after the other. With `--cpu-time`, seconds are processor time of one thread, which
depends little on other load of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from composition import build_experiment
from rich.console import Console
from rich.table import Table

COSTS = ("train_seconds", "peak_memory_bytes", "train_flops")


def estimate_costs(overrides: list[str]) -> dict[str, float]:
    """Return the estimated costs of a run."""
    from lora_bench.sweeps.cost_estimate import estimate_run

    estimate = estimate_run(build_experiment(overrides))
    return {name: float(getattr(estimate, name)) for name in COSTS}


def run_for_costs(overrides: list[str]) -> dict[str, float]:
    """Train the run and return the costs in its record."""
    from lora_bench.cli import main
    from lora_bench.records import run_folder

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if code := main(["train", *overrides, f"hydra.run.dir={run}"]):
            sys.exit(code)
        return {name: float(run_folder.read(run)["cost"][name]) for name in COSTS}


WORKERS = {"estimated": estimate_costs, "measured": run_for_costs}


def start_worker(worker: str, row: str, shared: list[str], *, cpu_time: bool) -> dict[str, float]:
    """Estimate or run one row in a process of its own."""
    options = ["--cpu-time"] if cpu_time else []
    command = [sys.executable, __file__, *options, "--worker", worker, row, "--", *shared]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(f"{worker} {row}: the process ended with exit code {process.returncode}\n{process.stdout}")
    costs: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROW", help="overrides, separated by commas")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, with one thread")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    arguments = sys.argv[1:]
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    options, shared = parser.parse_args(arguments[:separator]), arguments[separator + 1 :]
    if options.cpu_time and "trainer.threads=1" not in shared:
        shared = [*shared, "trainer.threads=1"]
    if options.worker:
        if options.cpu_time:
            time.perf_counter = time.process_time
        print(json.dumps(WORKERS[options.worker]([*shared, *options.rows[0].split(",")])))
        return
    table = Table("run", "cost", "estimated", "measured", "error")
    for row in options.rows:
        estimated, measured = (start_worker(name, row, shared, cpu_time=options.cpu_time) for name in WORKERS)
        for name in COSTS:
            error = estimated[name] / measured[name] - 1
            table.add_row(row, name, f"{estimated[name]:.4g}", f"{measured[name]:.4g}", f"{error:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
