#!/usr/bin/env python3
"""Compares `dry_run=true` with the run itself: time, memory and FLOPs, for each adapter.

    benchmarks/estimates.py adapter=lora adapter=full -- model=minilm data=toy data.train_size=512 trainer.epochs=2

Before `--` one set of overrides for each line, separated by commas; after it, those of all. Estimate and run are
processes of their own, one after the other. With `--cpu-time` a second is one of this process's processor time and
torch has one thread: then it matters little what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

NAMES = ("train_seconds", "peak_memory_bytes", "train_flops")


def estimated(overrides: list[str]) -> dict[str, float]:
    from lora_bench.run.settings import Experiment
    from lora_bench.sweeps.cost_estimate import estimate_run
    from tests.helpers import composed

    estimate = estimate_run(Experiment.build(composed(*overrides)))
    return {name: float(getattr(estimate, name)) for name in NAMES}


def ran(overrides: list[str]) -> dict[str, float]:
    from lora_bench.records import run_folder
    from lora_bench.records.job import Job
    from lora_bench.train import train
    from tests.helpers import composed

    with tempfile.TemporaryDirectory() as folder:
        choices = dict(text.split("=", 1) for text in overrides if "." not in text.split("=")[0])
        job = Job(composed(*overrides), Path(folder, "run"), choices, overrides)
        train(job, console=Console(stderr=True))
        return {name: float(run_folder.read(job.folder)["cost"][name]) for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--child", choices=["estimated", "ran"], help=argparse.SUPPRESS)
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given, shared = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if given.cpu_time:
        shared = [*shared, "trainer.threads=1"]
    if given.child:
        if given.cpu_time:
            time.perf_counter = time.process_time
        print(json.dumps(globals()[given.child]([*shared, *given.lines[0].split(",")])))
        return
    table = Table("run", "cost", "estimated", "ran", "error")
    for line in given.lines:
        options = ["--cpu-time"] if given.cpu_time else []
        costs = []
        for child in ("estimated", "ran"):
            command = [sys.executable, __file__, *options, "--child", child, line, "--", *shared]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            costs.append(json.loads(out.splitlines()[-1]))
        for name in NAMES:
            a, b = (cost[name] for cost in costs)
            table.add_row(line, name, f"{a:.4g}", f"{b:.4g}", f"{a / b - 1:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
