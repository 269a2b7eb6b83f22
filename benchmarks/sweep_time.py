#!/usr/bin/env python3
"""Measure a packed sweep of ranks on MiniLM beside PEFT and the Trainer in sequence, and beside single runs.

    benchmarks/sweep_time.py DATA [--rows packed,peft] [--layers all,top:3] [--pairs 8000] [--json FILE]
    benchmarks/sweep_time.py DATA --profile

DATA is a folder with QQP's train.tsv and validation.tsv. Rows:

    packed        lora-bench train -m: one process
    one_by_one    the same with pack.size=1
    processes     lora-bench train for each rank, a process each
    peft          PEFT and the Trainer for each rank, a process each: grouped by length, the selection split scored
                  after each epoch, the reported split at the end, nothing saved
    halving       packed, with pack.halving=true
    equal         packed and one_by_one again in fp32: how far metrics differ, and how many predictions

Seconds are wall-clock time from the start of the first process to the end of the last. Each row begins with empty
caches. Precision is bf16 where the device multiplies it fast, on both sides. On a GPU, peak memory is the device's.
With --json, rows add up over calls. --profile measures operator calls and milliseconds of a step, of one member and of
eight. Run nothing else meanwhile. Needs the extra `dev` (peft, accelerate).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from peft_trainer import BATCH_SIZE, Workload, epoch_experiment, run_trainer, shared_overrides

if TYPE_CHECKING:
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.run.inputs import SharedInputs

RANKS = "1,2,4,8,16,32,64,128"
ROWS = ("packed", "one_by_one", "processes", "peft", "halving", "equal")
TOLERANCE = 1e-4
"""Largest accepted difference of a metric between a member and its single run, in fp32."""
TARGET_RATIOS = {"all": 3.5, "top:3": 5.0}
"""Lowest accepted ratio of PEFT's time to that of the packed sweep, by adapted layers."""


# -- workers --


def run_worker(side: str, *arguments: str) -> None:
    """Run one process of a row; its last line has its peak memory."""
    if side == "ours":
        from lora_bench.cli import main as lora_bench

        if code := lora_bench(list(arguments)):
            sys.exit(code)
    else:
        import torch

        from lora_bench.training.precision import resolve_device, resolve_precision

        data, pairs, epochs, layers, rank = arguments
        workload = Workload(
            rank=int(rank),
            top_layers=None if layers == "all" else int(layers.removeprefix("top:")),
            precision="bf16" if resolve_precision("auto", resolve_device("auto")) == torch.bfloat16 else "fp32",
            epochs=int(epochs),
            with_evaluation=True,
        )
        run_trainer(workload, data, int(pairs))
    torch = sys.modules["torch"]
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mb": peak / 1e6, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}))


def start_worker(cache: str, side: str, *arguments: str) -> dict[str, Any]:
    """Run a worker in a process of its own, with this folder as the cache."""
    command = [sys.executable, __file__, "--worker", side, *arguments]
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LORA_BENCH_CACHE": cache}
    )
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return measured


# -- rows --


def read_records(folder: str) -> list[dict[str, Any]]:
    """Return the records of a sweep's runs in the order of their ranks, each with its `folder`."""
    records = [json.loads(path.read_text()) | {"folder": path.parent} for path in Path(folder).glob("*/run.json")]
    return sorted(records, key=lambda record: record["config"]["adapter"]["rank"])


def list_processes(
    row: str, layers: str, options: argparse.Namespace, folder: str, overrides: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """Return the arguments of each worker of a row."""
    ranks = options.ranks.split(",")
    ours = [
        *shared_overrides(options.data, options.pairs),
        f"trainer.epochs={options.epochs}",
        f"adapter.layers={layers}",
        *overrides,
    ]
    if row == "peft":
        return [("theirs", options.data, str(options.pairs), str(options.epochs), layers, rank) for rank in ranks]
    if row == "processes":
        return [("ours", "train", *ours, f"adapter.rank={rank}", f"hydra.run.dir={folder}/{rank}") for rank in ranks]
    packing = {"packed": (), "one_by_one": ("pack.size=1",), "halving": ("pack.halving=true",)}[row]
    return [("ours", "train", "-m", *ours, f"adapter.rank={options.ranks}", f"hydra.sweep.dir={folder}", *packing)]


def measure_row(row: str, layers: str, options: argparse.Namespace, folder: str, *overrides: str) -> dict[str, Any]:
    """Measure seconds and peak memory of a row (the median of its processes), and read the records of our runs.

    Args:
        row: one of `ROWS` except `equal`.
        layers: a value of `adapter.layers`.
        options: of the command line.
        folder: where our runs leave their records.
        overrides: further overrides of our runs.
    """
    processes = list_processes(row, layers, options, folder, overrides)
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        results = [start_worker(cache, *arguments) for arguments in processes]
        seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "peak_mb": median(result["peak_mb"] for result in results),
        "processes": len(results),
        "device": results[0]["device"],
    }
    if records := read_records(folder):
        done = [record for record in records if record["status"] == "done"]
        best = max(done, key=lambda record: record["metrics"]["selection/mcc"])
        measured |= {
            "tflop": sum(record["cost"]["train_flops"] for record in records) / 1e12,
            "pack_sizes": sorted({record["cost"]["pack_size"] for record in records}),
            "best_rank": best["config"]["adapter"]["rank"],
            "mcc": best["metrics"]["validation/mcc"],
        }
    print(f"{row}, {layers}: " + ", ".join(f"{key} {value}" for key, value in measured.items()), file=sys.stderr)
    return measured


def compare_members(row: str, layers: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Compare members with their single runs: largest difference of a metric, and number of unequal predictions."""
    import pyarrow.parquet as parquet

    for name in ("packed", "one_by_one"):
        measure_row(name, layers, options, f"{folder}/{name}", "trainer.precision=fp32")
    differences: dict[str, float] = {}
    flips = predictions = 0
    pairs = zip(read_records(f"{folder}/packed"), read_records(f"{folder}/one_by_one"), strict=True)
    for member, single in pairs:
        for name, value in member["metrics"].items():
            metric = f"{name}, rank {member['config']['adapter']['rank']}"
            differences[metric] = abs((value or 0.0) - (single["metrics"][name] or 0.0))
        tables = [parquet.read_table(run["folder"] / "predictions/validation.parquet") for run in (member, single)]
        a, b = (table["score"].to_numpy() >= 0.5 for table in tables)
        flips += int((a != b).sum())
        predictions += len(a)
    metric = max(differences, key=differences.__getitem__)
    return {"max_difference": differences[metric], "metric": metric, "flips": flips, "predictions": predictions}


# -- profile --


@dataclass
class StepProfiler:
    """Trains packs for a few steps, and counts the operators of a step.

    Operator calls are those that no other operator made, in forward, backward, clipping and AdamW: what a training of
    three steps calls more than one of two. Launches are a GPU's.
    """

    options: argparse.Namespace
    layers: str
    inputs: SharedInputs
    selection: TokenTable

    def train(self, ranks: list[str], steps: int) -> float:
        """Train a pack of these ranks, all members at once as on a GPU, and return the seconds of its steps."""
        from lora_bench.adapters.pack.pack import Pack
        from lora_bench.training.loop import fit, prepare_task

        settings = [f"trainer.max_steps={steps}", f"trainer.epochs={steps}", f"trainer.micro_batch_size={BATCH_SIZE}"]
        settings += ["trainer.eval_every=1000", f"adapter.layers={self.layers}"]
        experiments = [
            epoch_experiment(self.options.data, self.options.pairs, *settings, f"adapter.rank={rank}") for rank in ranks
        ]
        members = [member for experiment in experiments for member in self.inputs.with_classes(experiment).members()]
        pack = Pack(self.inputs.backbone, members, batched=True)
        train = self.inputs.tasks[""].tables["train"]
        try:
            prepare_task(pack, experiments[0].trainer, train)
            optimizers = [experiment.optimizer for experiment in experiments]
            return fit(pack, optimizers, experiments[0].trainer, train, self.selection)[0].seconds
        finally:
            pack.detach()

    def count_calls(self, ranks: list[str], steps: int) -> tuple[int, int]:
        """Return the operator calls and kernel launches of a training."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with profile(activities=activities) as profiled:
            self.train(ranks, steps)
        operators = launches = 0
        for event in profiled.events() or []:
            launches += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
            caller = event.cpu_parent
            while caller is not None and not caller.name.startswith("aten::"):
                caller = caller.cpu_parent
            operators += event.name.startswith("aten::") and caller is None
        return operators, launches


def profile_steps(row: str, layers: str, options: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """Profile a member's step in packs of one, of eight equal members and of all ranks.

    Milliseconds are measured without the profiler.
    """
    import numpy as np

    from lora_bench.run.inputs import SharedInputs

    steps = 20
    inputs = SharedInputs.load(epoch_experiment(options.data, options.pairs))
    selection = inputs.tasks[""].tables["selection"].take(np.arange(BATCH_SIZE))
    profiler = StepProfiler(options, layers, inputs, selection)
    by_pack = {}
    all_ranks = options.ranks.split(",")
    for name, ranks in (("1", ["8"]), ("8", ["8"] * 8), (f"{len(all_ranks)}, ranks {options.ranks}", all_ranks)):
        profiler.train(ranks, 2)  # warms up
        two_steps, three_steps = profiler.count_calls(ranks, 2), profiler.count_calls(ranks, 3)
        operators, launches = ((b - a) / len(ranks) for a, b in zip(two_steps, three_steps, strict=True))
        milliseconds = 1000 * profiler.train(ranks, steps) / steps / len(ranks)
        by_pack[name] = {"operators": operators, "launches": launches, "ms": milliseconds}
    return by_pack


# -- output --


def format_table(rows: dict[str, dict[str, Any]], layers: str) -> list[str]:
    """Return the lines of one choice of layers in Markdown, with times relative to the packed sweep."""
    timed = {row: measured for row, measured in rows.items() if "seconds" in measured}
    packed, lines = timed.get("packed"), []
    if timed:
        lines = [f"| {layers} | processes | seconds | relative | target | peak MB | TFLOP | best rank | its MCC |"]
        lines += ["| --- |" + " ---: |" * 8]
    for row, measured in timed.items():
        relative = f"{measured['seconds'] / packed['seconds']:.2f}" if packed else ""
        target = {"peft": TARGET_RATIOS.get(layers, ""), "one_by_one": 1.0, "processes": 1.0}.get(row, "")
        cells = [row, measured["processes"], f"{measured['seconds']:.1f}", relative, target]
        cells += [f"{measured['peak_mb']:.0f}"]
        has_records = "mcc" in measured
        cells += [f"{measured['tflop']:.2f}", measured["best_rank"], f"{measured['mcc']:.4f}"] if has_records else []
        cells += [""] * (9 - len(cells))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if packed and "processes" in timed:
        memory = packed["peak_mb"] / timed["processes"]["peak_mb"]
        lines.append(f"peak memory: packed takes {memory:.2f} times that of a single run (target 2.5)")
    if packed and "halving" in timed:
        share = timed["halving"]["tflop"] / packed["tflop"]
        lines.append(f"halving: {share:.0%} of the computation (target 40 %)")
    if "equal" in rows:
        equal = rows["equal"]
        lines.append(
            f"fp32: metrics differ by at most {equal['max_difference']:.1e} ({equal['metric']}; target {TOLERANCE}), "
            f"{equal['flips']} of {equal['predictions']:,} predictions differ"
        )
    for members, measured in rows.get("profile", {}).items():
        fewer = rows["profile"]["1"]["operators"] / measured["operators"]
        values = ", ".join(f"{measured[key]:.1f} {key}" for key in measured)
        lines.append(f"a member's step, K = {members}: {values}; {fewer:.2f} times fewer operators (target 5)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=os.path.abspath)
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure, separated by commas")
    parser.add_argument("--layers", default="all,top:3", help="values of adapter.layers, separated by commas")
    parser.add_argument("--ranks", default=RANKS)
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="results of earlier calls, to which these are added")
    parser.add_argument("--profile", dest="rows", action="store_const", const="profile", help="only profile steps")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - {*ROWS, "profile"}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    for layers in options.layers.split(","):
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                measure = {"equal": compare_members, "profile": profile_steps}.get(row, measure_row)
                results.setdefault(layers, {})[row] = measure(row, layers, options, folder)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for layers, measured in results.items():
        print("\n".join(["", *format_table(measured, layers)]))
    differences = [measured["equal"]["max_difference"] for measured in results.values() if "equal" in measured]
    sys.exit(any(difference > TOLERANCE for difference in differences))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["--worker"]:
        run_worker(*sys.argv[2:])
    else:
        main()
