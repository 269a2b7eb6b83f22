#!/usr/bin/env python3
"""Prints how fast methods bring the training loss down in their first 50 steps on QQP, with MiniLM.

    experiments/loss_curves.py DATA RATES METHOD …
    experiments/loss_curves.py DATA 2e-4,5e-4 rslora lora_one 'lora adapter.alpha=8'

DATA is a folder with QQP's train.tsv and validation.tsv. 2,000 pairs, batch 32, fp32, a constant rate after the
warm-up, seeds 0 to 2; a row gives the mean loss of steps 1-10, 11-20, … with the deviation over seeds. About a minute
a row on one core.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra import compose, initialize_config_dir

from lora_bench.config.compose import register_with_hydra
from lora_bench.config.groups import conf_folder
from lora_bench.data.tokenization import tokenize
from lora_bench.run.inputs import attach, load_splits
from lora_bench.run.settings import Experiment
from lora_bench.training.loop import fit, prepare_task
from lora_bench.training.precision import resolve_device, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS, BLOCK, SEEDS = 50, 10, (0, 1, 2)


class Losses(list[float]):
    """An observer that keeps the training losses."""

    def stepped(self, step: int, losses: Any, pairs: int) -> None:
        self.append(losses[0])

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        pass

    def ended(self, members: Sequence[int]) -> None:
        pass


def curve(overrides: list[str]) -> Losses:
    experiment = Experiment.build(compose("config", overrides))
    splits, _ = load_splits(experiment.data)
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("fp32", device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    train, selection = (tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "selection"))
    prepare_task(pack, experiment.trainer, train)
    losses = Losses()
    fit(pack, [experiment.optimizer], experiment.trainer, train, selection, observer=losses)
    return losses


data, rates, *methods = sys.argv[1:] if len(sys.argv) > 3 else sys.exit(__doc__)
fixed = ["model=minilm", "data=pairs", f"data.path={data}", "data.train_size=2000", "data.selection_size=200"]
fixed += [f"trainer.max_steps={STEPS}", "trainer.eval_every=1000", "optimizer.schedule=constant"]
blocks = [f"{start + 1}-{start + BLOCK}" for start in range(0, STEPS, BLOCK)]
print(f"| method | rate | {' | '.join(blocks)} | all |\n| --- | ---: |{' ---: |' * (len(blocks) + 1)}")
register_with_hydra()
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    for rate in rates.split(","):
        for method in methods:
            overrides = [*fixed, *f"adapter={method}".split(), f"optimizer.lr={rate}"]
            losses = np.array([curve([*overrides, f"seed={seed}"]) for seed in SEEDS])  # (seeds, steps)
            means = losses.reshape(len(SEEDS), -1, BLOCK).mean(2)  # (seeds, blocks)
            cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(means.mean(0), means.std(0, ddof=1), strict=True)]
            print(f"| {method} | {rate} | {' | '.join(cells)} | {losses.mean():.3f} |", flush=True)
