#!/usr/bin/env python3
"""Print how fast methods reduce the training loss in their first 50 steps on QQP, with MiniLM.

    experiments/loss_curves.py DATA RATES METHOD …
    experiments/loss_curves.py DATA 2e-4,5e-4 rslora lora_one 'lora adapter.alpha=8'

DATA is a folder with QQP's train.tsv and validation.tsv. RATES are learning rates. The setting is 2,000 pairs, batch
size 32, fp32, a constant learning rate after the warm-up, and seeds 0 to 2. A row has the mean loss of steps 1-10,
11-20, … with the standard deviation over seeds. It takes about a minute on one core.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEPS, STEPS_PER_COLUMN, SEEDS = 50, 10, (0, 1, 2)


class LossRecorder:
    """An observer that keeps the training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        self.losses.append(losses[0])

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        pass

    def ended(self, members: Sequence[int]) -> None:
        pass


def train(overrides: list[str]) -> list[float]:
    """Train one run without a record, and return its losses."""
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose
    from lora_bench.config.groups import conf_folder
    from lora_bench.data.tokenization import tokenize
    from lora_bench.run.inputs import attach
    from lora_bench.run.loaded_data import LoadedData
    from lora_bench.run.settings import Experiment
    from lora_bench.training.loop import fit, prepare_task
    from lora_bench.training.precision import resolve_device, resolve_precision

    config = compose(conf_folder(), "config", overrides)
    experiment = Experiment.build(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    loaded = LoadedData.load(experiment.data)
    experiment, splits = experiment.with_data([loaded.data]), loaded.splits
    device = resolve_device("auto")
    pack, _ = attach(experiment, device, resolve_precision("fp32", device))
    columns, length = experiment.data.text_columns, experiment.data.max_length
    train, selection = (tokenize(splits[name], columns, pack.backbone, length) for name in ("train", "selection"))
    prepare_task(pack, experiment.trainer, train)
    recorder = LossRecorder()
    fit(pack, [experiment.optimizer], experiment.trainer, train, selection, observer=recorder)
    return recorder.losses


def format_row(method: str, rate: str, losses: Sequence[Sequence[float]]) -> str:
    """Return the row of a method in Markdown.

    Args:
        method: as on the command line.
        rate: the learning rate.
        losses: (seeds, steps).
    """
    means = np.array(losses).reshape(len(losses), -1, STEPS_PER_COLUMN).mean(2)  # (seeds, columns)
    cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(means.mean(0), means.std(0, ddof=1), strict=True)]
    return f"| {method} | {rate} | {' | '.join(cells)} | {means.mean():.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("rates", metavar="RATES", help="learning rates, separated by commas")
    parser.add_argument("methods", nargs="+", metavar="METHOD", help="a choice of adapter=, with further overrides")
    options = parser.parse_args()
    shared = ["model=minilm", "data=pairs", f"data.path={options.data}", "data.train_size=2000"]
    shared += ["data.selection_size=200", f"trainer.max_steps={STEPS}", "trainer.eval_every=1000"]
    shared += ["optimizer.schedule=constant"]
    columns = [f"{first + 1}-{first + STEPS_PER_COLUMN}" for first in range(0, STEPS, STEPS_PER_COLUMN)]
    print(f"| method | learning rate | {' | '.join(columns)} | all |")
    print(f"| --- | ---: |{' ---: |' * (len(columns) + 1)}")
    for rate in options.rates.split(","):
        for method in options.methods:
            overrides = [*shared, *f"adapter={method}".split(), f"optimizer.lr={rate}"]
            losses = [train([*overrides, f"seed={seed}"]) for seed in SEEDS]
            print(format_row(method, rate, losses), flush=True)


if __name__ == "__main__":
    main()
