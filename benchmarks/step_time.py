#!/usr/bin/env python3
"""Measures the time of a training step with each method, beside LoRA's, on MiniLM: 32 pairs of 32 tokens, all linears.

    benchmarks/step_time.py [METHOD …]      the methods of conf/adapter/, or those named; nothing else should be running

One step of every method in turn, for as many rounds as there are; medians and their ratio to LoRA's.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track

from lora_bench.config.compose import register_with_hydra
from lora_bench.config.groups import choices, conf_folder
from lora_bench.data.batching import Batch
from lora_bench.run.inputs import attach
from lora_bench.run.settings import Experiment
from lora_bench.training.memory import keep_freed_memory
from lora_bench.training.optim import make_optimizer
from lora_bench.training.precision import resolve_device, resolve_precision

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack

PAIRS, TOKENS, ROUNDS = 32, 32, 20


def make(method: str) -> tuple[Pack, torch.optim.Optimizer]:
    experiment = Experiment.build(compose("config", ["model=minilm", "data=toy", f"adapter={method}"]))
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("auto", device))
    return pack.train(), make_optimizer(experiment.optimizer, pack, 0)


def step(pack: Pack, optimizer: torch.optim.Optimizer, number: int) -> None:
    """As in training/loop.py, without the clipping that all methods share."""
    device = pack.backbone.device
    ids = torch.randint(1000, 20000, (PAIRS, TOKENS), device=device)
    labels = torch.randint(0, 2, (PAIRS,), device=device)
    loss = F.cross_entropy(pack(Batch(ids, torch.ones_like(ids), None, labels, full=True))[0], labels)
    adapter, updates = pack.members[0].adapter, pack.updates[0]
    penalty = adapter.penalty(updates)
    (loss if penalty is None else loss + penalty).backward()
    adapter.before_step(updates, number, 1000)
    optimizer.step()
    adapter.after_step(updates, number, 1000)
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


keep_freed_memory()
register_with_hydra()
names = list(dict.fromkeys(["lora", *(sys.argv[1:] or choices("adapter"))]))
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    packs = {name: make(name) for name in names}
seconds: dict[str, list[float]] = {name: [] for name in names}
for number in track(range(-2, ROUNDS), console=Console(stderr=True), transient=True):
    for name, (pack, optimizer) in packs.items():
        began = time.perf_counter()
        step(pack, optimizer, number + 3)
        if number >= 0:
            seconds[name].append(time.perf_counter() - began)
print(f"{torch.get_num_threads()} threads, {packs['lora'][0].backbone.compute_dtype}, {ROUNDS} rounds\n")
print("| method | adapter parameters | step | to LoRA's |\n| --- | ---: | ---: | ---: |")
for name, (pack, _) in packs.items():
    ratio = median(a / b for a, b in zip(seconds[name], seconds["lora"], strict=True))
    print(f"| {name} | {pack.count_parameters(0)['adapter']:,} | {1000 * median(seconds[name]):.0f} ms | {ratio:.2f} |")
