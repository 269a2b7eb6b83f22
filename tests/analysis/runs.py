"""Finished runs on tasks of three classes and of numbers, made without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import MAIN_METRIC_CHOICES
from lora_bench.evaluation import main_metric
from lora_bench.records.run_folder import Run

if TYPE_CHECKING:
    from pathlib import Path

N = 1500
NAMES = ["entailment", "neutral", "contradiction"]
EASE = np.random.default_rng(1).normal(1.5, 2.0, N)
CLASSES = np.random.default_rng(0).choice(3, N, p=[0.5, 0.3, 0.2])
NUMBERS = np.random.default_rng(2).normal(2.5, 1.0, N)


def make(folder: Path, form: str, adapter: str, quality: float, seed: int, **config: Any) -> Path:
    """A finished run of a quality, 0 or above, on a task of this form; `config` holds groups of keys."""
    noise = np.random.default_rng([seed, *adapter.encode()])
    if form == "multiclass":
        labels = CLASSES
        right = EASE + quality + 0.7 * noise.normal(size=N) > 0
        classes = np.where(right, labels, (labels + noise.integers(1, 3, N)) % 3)
        confidence = noise.uniform(0.5, 0.95, N)[:, None]
        scores = np.where(np.eye(3)[classes] == 1, confidence, (1 - confidence) / 2)
        predicted: np.ndarray = scores.argmax(1)
        data = {"type": "classification", "label_names": NAMES, "fingerprint": {"validation": "three"}}
    else:
        labels = NUMBERS
        scores = labels + (2 - quality) * (0.3 * EASE + 0.3 * noise.normal(size=N))
        predicted = scores
        data = {"type": "regression", "label_names": None, "fingerprint": {"validation": "numbers"}}
    names = MAIN_METRIC_CHOICES[form]
    values = {name: float(main_metric.compute(labels, predicted, name)) for name in names}
    if form == "regression":
        values["mse"] = float(((labels - scores) ** 2).mean())
    metric = config.get("trainer", {}).get("main_metric") or names[0]
    config = {"adapter": {"method": adapter}, "seed": seed, "data": {"type": data["type"]}, **config}
    choices = {"model": "bert", "adapter": adapter, "data": {"multiclass": "mnli", "regression": "stsb"}[form]}
    run = Run.claim(folder, choices=choices, config=config, overrides=[f"adapter={adapter}", f"seed={seed}"])
    run.write_predictions("validation", np.arange(N), labels, scores)
    for step in (10, 20):
        logged = {name: value * step / 20 for name, value in values.items()}
        run.log({"step": step, "split": "selection", "metrics": logged})
    metrics = {f"{split}/{name}": value for split in ("selection", "validation") for name, value in values.items()}
    run.update(metrics=metrics, data={**data, "rows": {"validation": N}}, selection={"metric": metric})
    run.finish("done")
    return folder


def sweep(folder: Path, form: str, qualities: dict[str, float], seeds: int = 3, **config: Any) -> Path:
    """Runs of several adapters, each with several seeds."""
    for adapter, quality in qualities.items():
        for seed in range(seeds):
            make(folder / f"{form}-{adapter}-{seed}", form, adapter, quality, seed, **config)
    return folder
