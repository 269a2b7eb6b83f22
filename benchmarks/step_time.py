#!/usr/bin/env python3
"""Measure the time of a training step of each method relative to LoRA: MiniLM, 32 pairs of 32 tokens, all linears.

    benchmarks/step_time.py [METHOD …]

The methods are those of conf/adapter/ but PEFT's, unless some are named. Run nothing else meanwhile. Every round runs
one step of each method in turn. The table has medians over the rounds, and the median of the ratios to LoRA.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TYPE_CHECKING

from composition import build_experiment

from lora_bench.config.groups import choices

if TYPE_CHECKING:
    import torch

    from lora_bench.adapters.pack.pack import Pack

PAIRS, TOKENS, WARM_UP, ROUNDS = 32, 32, 2, 20
SCHEDULED_STEPS = 1000
"""Length of the training that schedules, as AdaLoRA's, are told of."""


def build_pack(method: str) -> tuple[Pack, torch.optim.Optimizer]:
    """Return a pack of one member with this method, and its optimizer."""
    from lora_bench.run.inputs import attach
    from lora_bench.training.optim import make_optimizer
    from lora_bench.training.precision import resolve_device, resolve_precision

    experiment = build_experiment(["model=minilm", "data=toy", f"adapter={method}"])
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("auto", device))
    return pack.train(), make_optimizer(experiment.optimizer, pack, 0)


def run_step(pack: Pack, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Run a step as `training/loop.py` does, without the clipping that all methods share."""
    import torch
    import torch.nn.functional as F

    from lora_bench.data.batching import Batch

    device = pack.backbone.device
    ids = torch.randint(1000, 20000, (PAIRS, TOKENS), device=device)
    labels = torch.randint(0, 2, (PAIRS,), device=device)
    loss = F.cross_entropy(pack(Batch(ids, torch.ones_like(ids), None, labels, full=True))[0], labels)
    adapter, updates = pack.members[0].adapter, pack.updates[0]
    penalty = adapter.penalty(updates)
    torch.autograd.backward(loss if penalty is None else loss + penalty)
    adapter.before_step(updates, step, SCHEDULED_STEPS)
    optimizer.step()
    adapter.after_step(updates, step, SCHEDULED_STEPS)
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(packs: dict[str, tuple[Pack, torch.optim.Optimizer]]) -> dict[str, list[float]]:
    """Return the seconds of a step in every round, by method."""
    from rich.console import Console
    from rich.progress import track

    seconds: dict[str, list[float]] = {method: [] for method in packs}
    for round_ in track(range(WARM_UP + ROUNDS), console=Console(stderr=True), transient=True):
        for method, (pack, optimizer) in packs.items():
            start = time.perf_counter()
            run_step(pack, optimizer, round_ + 1)
            if round_ >= WARM_UP:
                seconds[method].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(choices("adapter")))
    options = parser.parse_args()

    import torch

    from lora_bench.training.memory import keep_freed_memory

    keep_freed_memory()
    native = [choice for choice in choices("adapter") if choice.partition("_")[0] != "peft"]
    methods = dict.fromkeys(["lora", *(options.methods or native)])
    packs = {method: build_pack(method) for method in methods}
    seconds = measure(packs)
    print(f"{torch.get_num_threads()} threads, {packs['lora'][0].backbone.compute_dtype}, {ROUNDS} rounds\n")
    print("| method | adapter parameters | step | relative to LoRA |\n| --- | ---: | ---: | ---: |")
    for method, (pack, _) in packs.items():
        ratio = median(a / b for a, b in zip(seconds[method], seconds["lora"], strict=True))
        parameters = pack.count_parameters(0)["adapter"]
        print(f"| {method} | {parameters:,} | {1000 * median(seconds[method]):.0f} ms | {ratio:.2f} |")


if __name__ == "__main__":
    main()
