#!/usr/bin/env python3
"""A sweep of ranks on MiniLM, packed: how quick it is beside PEFT and the Trainer one after another, and our own runs.

    benchmarks/sweep_time.py DATA [--rows packed,peft] [--layers all,top:3] [--pairs 8000] [--json FILE]
    benchmarks/sweep_time.py DATA --profile      operator calls and milliseconds of a step, of one member and of eight

DATA is a folder with QQP's train.tsv and validation.tsv. Rows:

    packed        lora-bench train -m: one process
    one_by_one    the same with pack.size=1
    processes     lora-bench train for each rank, a process each
    peft          PEFT and the Trainer for each rank, a process each: grouped by length, the selection split scored
                  after each epoch, the reported split at the end, nothing saved
    halving       packed, with pack.halving=true
    equal         packed and one_by_one once more in fp32: how far metrics differ, and how many predictions

Seconds are by the clock on the wall, from the start of the first process to the end of the last; each row begins with
empty caches. Precision is bf16 where the device multiplies it fast, on both sides; on a GPU peaks are the device's.
With --json, rows add up over calls. Nothing else should be running. Needs the extra `dev` (peft, accelerate).
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
from pathlib import Path
from statistics import median
from typing import Any

from peft_trainer import BATCH, Work, experiment_on, shared_overrides, theirs

RANKS = "1,2,4,8,16,32,64,128"
ROWS = ("packed", "one_by_one", "processes", "peft", "halving", "equal")
EXACT = 1e-4
"""Metrics of a member and of its lone run may differ by so much in fp32."""
BARS = {"all": 3.5, "top:3": 5.0}
"""Lowest accepted ratio of PEFT's time to that of the packed sweep."""


def worker(contestant: str, *arguments: str) -> None:
    """One process of a row; its last line tells its peak memory."""
    if contestant == "ours":
        from lora_bench.cli import main as lora_bench

        if code := lora_bench(list(arguments)):
            sys.exit(code)
    else:
        import torch

        from lora_bench.training.precision import resolve_device, resolve_precision

        data, pairs, epochs, layers, rank = arguments
        fast = resolve_precision("auto", resolve_device("auto")) == torch.bfloat16
        top = int(layers.removeprefix("top:")) if layers != "all" else None
        work = Work(rank=int(rank), top=top, precision="bf16" if fast else "fp32", epochs=int(epochs), whole=True)
        theirs(work, data, int(pairs))
    torch = sys.modules["torch"]
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mb": peak / 1e6, "on": torch.cuda.get_device_name() if on_gpu else "cpu"}))


def process(cache: str, contestant: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", contestant, *arguments]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LORA_BENCH_CACHE": cache}
    )
    if answer.returncode:
        sys.exit(f"{' '.join(command)}\n{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def recorded(folder: str) -> list[dict[str, Any]]:
    """The records of a sweep's runs, in the order of their ranks."""
    records = [json.loads(path.read_text()) | {"place": path.parent} for path in Path(folder).glob("*/run.json")]
    return sorted(records, key=lambda record: record["config"]["adapter"]["rank"])


def measure(row: str, layers: str, options: argparse.Namespace, folder: str, *overrides: str) -> dict[str, Any]:
    """A row's seconds and peak memory (of several processes the median), and of ours what the records say.

    Args:
        folder: where our runs leave their records.
        more: further overrides of ours.
    """
    ranks = options.ranks.split(",")
    ours = [
        *shared_overrides(options.data, options.pairs),
        f"trainer.epochs={options.epochs}",
        f"adapter.layers={layers}",
        *overrides,
    ]
    sweep = ["train", "-m", *ours, f"adapter.rank={options.ranks}", f"hydra.sweep.dir={folder}"]
    given = [options.data, str(options.pairs), str(options.epochs), layers]
    processes = {
        "packed": [("ours", *sweep)],
        "one_by_one": [("ours", *sweep, "pack.size=1")],
        "halving": [("ours", *sweep, "pack.halving=true")],
        "processes": [("ours", "train", *ours, f"adapter.rank={r}", f"hydra.run.dir={folder}/{r}") for r in ranks],
        "peft": [("theirs", *given, r) for r in ranks],
    }[row]
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        results = [process(cache, *arguments) for arguments in processes]
        seconds = time.perf_counter() - began
    peak_mb = median(result["peak_mb"] for result in results)
    figures = {"seconds": seconds, "peak_mb": peak_mb, "processes": len(results), "on": results[0]["on"]}
    if records := recorded(folder):
        done = [record for record in records if record["status"] == "done"]
        best = max(done, key=lambda record: record["metrics"]["selection/mcc"])
        figures |= {
            "tflop": sum(record["cost"]["train_flops"] for record in records) / 1e12,
            "packs_of": sorted({record["cost"]["pack_size"] for record in records}),
            "best_rank": best["config"]["adapter"]["rank"],
            "mcc": best["metrics"]["validation/mcc"],
        }
    print(f"{row}, {layers}: " + ", ".join(f"{key} {value}" for key, value in figures.items()), file=sys.stderr)
    return figures


def equal(row: str, layers: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Compare members with their single runs: largest difference of a metric, and number of unequal predictions."""
    import pyarrow.parquet as parquet

    for contestant in ("packed", "one_by_one"):
        measure(contestant, layers, options, f"{folder}/{contestant}", "trainer.precision=fp32")
    apart: dict[str, float] = {}
    flipped = predicted = 0
    for member, lone in zip(recorded(f"{folder}/packed"), recorded(f"{folder}/one_by_one"), strict=True):
        for name, value in member["metrics"].items():
            where = f"{name}, rank {member['config']['adapter']['rank']}"
            apart[where] = abs((value or 0.0) - (lone["metrics"][name] or 0.0))
        tables = [parquet.read_table(record["place"] / "predictions/validation.parquet") for record in (member, lone)]
        one, other = (table["score"].to_numpy() >= 0.5 for table in tables)
        flipped += int((one != other).sum())
        predicted += len(one)
    where = max(apart, key=apart.__getitem__)
    return {"apart": apart[where], "where": where, "flipped": flipped, "predicted": predicted}


def profiled(row: str, layers: str, options: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """Profile a member's step in packs of one, of eight equal members and of all ranks, computed at once as on a GPU.

    Operator calls are those that no other operator made, in forward, backward, clipping and AdamW: what a training of
    three steps calls more than one of two. Launches are a GPU's. Milliseconds are without the profiler.
    """
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.run.inputs import SharedInputs
    from lora_bench.training.loop import fit, prepare_task

    steps = 20
    inputs = SharedInputs.load(experiment_on(options.data, options.pairs))
    few = inputs.tasks[""].tables["selection"].take(np.arange(BATCH))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def train(ranks: list[str], steps: int) -> float:
        """Seconds of the steps alone."""
        settings = [f"trainer.max_steps={steps}", f"trainer.epochs={steps}", f"trainer.micro_batch_size={BATCH}"]
        settings += ["trainer.eval_every=1000", f"adapter.layers={layers}"]
        experiments = [experiment_on(options.data, options.pairs, *settings, f"adapter.rank={rank}") for rank in ranks]
        pack = Pack(
            inputs.backbone, [member for experiment in experiments for member in experiment.members()], batched=True
        )
        try:
            prepare_task(pack, experiments[0].trainer, inputs.tasks[""].tables["train"])
            optimizers = [experiment.optimizer for experiment in experiments]
            return fit(pack, optimizers, experiments[0].trainer, inputs.tasks[""].tables["train"], few)[0].seconds
        finally:
            pack.detach()

    def calls(ranks: list[str], steps: int) -> tuple[int, int]:
        with profile(activities=activities) as profiled_calls:
            train(ranks, steps)
        operators = launches = 0
        for event in profiled_calls.events():
            launches += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
            above = event.cpu_parent
            while above is not None and not above.name.startswith("aten::"):
                above = above.cpu_parent
            operators += event.name.startswith("aten::") and above is None
        return operators, launches

    by_size = {}
    all_ranks = options.ranks.split(",")
    for name, ranks in (("1", ["8"]), ("8", ["8"] * 8), (f"{len(all_ranks)}, ranks {options.ranks}", all_ranks)):
        train(ranks, 2)
        shorter, longer = calls(ranks, 2), calls(ranks, 3)
        operators, launches = ((b - a) / len(ranks) for a, b in zip(shorter, longer, strict=True))
        ms = 1000 * train(ranks, steps) / steps / len(ranks)
        by_size[name] = {"operators": operators, "launches": launches, "ms": ms}
    return by_size


def table(rows: dict[str, dict[str, Any]], layers: str) -> list[str]:
    """In markdown: the rows of one choice of layers, and how many times the packed sweep's time each took."""
    timed = {row: figures for row, figures in rows.items() if "seconds" in figures}
    packed, lines = timed.get("packed"), []
    if timed:
        lines = [f"| {layers} | processes | seconds | times packed | bar | peak MB | TFLOP | best rank | its MCC |"]
        lines += ["| --- |" + " ---: |" * 8]
    for row, figures in timed.items():
        times = f"{figures['seconds'] / packed['seconds']:.2f}" if packed else ""
        bar = {"peft": BARS.get(layers, ""), "one_by_one": 1.0, "processes": 1.0}.get(row, "")
        cells = [row, figures["processes"], f"{figures['seconds']:.1f}", times, bar, f"{figures['peak_mb']:.0f}"]
        if "mcc" in figures:
            cells += [f"{figures['tflop']:.2f}", figures["best_rank"], f"{figures['mcc']:.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if packed and "processes" in timed:
        times = packed["peak_mb"] / timed["processes"]["peak_mb"]
        lines.append(f"peak memory: packed takes {times:.2f} times a single run's (bar 2.5)")
    if packed and "halving" in timed:
        share = timed["halving"]["tflop"] / packed["tflop"]
        lines.append(f"halving: {share:.0%} of the computation (bar 40 %)")
    if "equal" in rows:
        lines.append(
            "fp32: metrics differ by {apart:.1e} at most ({where}; bar {bar}),".format(bar=EXACT, **rows["equal"])
        )
        lines.append("      {flipped} of {predicted:,} predictions differ".format(**rows["equal"]))
    for members, figures in rows.get("profile", {}).items():
        lone = rows["profile"]["1"]
        less = lone["operators"] / figures["operators"]
        listed = ", ".join(f"{figures[key]:.1f} {key}" for key in figures)
        lines.append(f"a member's step, K = {members}: {listed}; {less:.2f} times fewer operators than alone (bar 5)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=os.path.abspath)
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, with commas")
    parser.add_argument("--layers", default="all,top:3", help="what adapter.layers is, with commas")
    parser.add_argument("--ranks", default=RANKS)
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what earlier calls measured, and where to add to it")
    parser.add_argument("--profile", dest="rows", action="store_const", const="profile", help="that alone")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if strange := set(rows) - {*ROWS, "profile"}:
        parser.error(f"no such row: {', '.join(sorted(strange))}")
    figures: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text(encoding="utf-8"))
    for layers in options.layers.split(","):
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                row_figures = {"equal": equal, "profile": profiled}.get(row, measure)(row, layers, options, folder)
            figures.setdefault(layers, {})[row] = row_figures
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    for layers, of_layers in figures.items():
        print("\n".join(["", *table(of_layers, layers)]))
    equals = [of_layers["equal"]["apart"] for of_layers in figures.values() if "equal" in of_layers]
    sys.exit(any(apart > EXACT for apart in equals))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1] == "--worker":
        worker(*sys.argv[2:])
    else:
        main()
