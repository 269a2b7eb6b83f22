"""Finished runs with all that the page shows, made without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.records.run_folder import Run

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert(1)</script>\"'\x1b[31m</style>\u202e"
ROWS = 200


def make(folder: Path, adapter: str, seed: int, mcc: float, rank: int = 8, lr: float = 1e-3) -> None:
    """A finished run with a curve, predictions of that MCC (a multiple of 0.02), ranks and a later evaluation."""
    config = {"seed": seed, "adapter": {"rank": rank}, "optimizer": {"lr": lr}}
    overrides = [f"adapter={adapter}", f"adapter.rank={rank}", f"optimizer.lr={lr}"]
    run = Run.claim(
        folder, choices={"model": "bert", "adapter": adapter, "data": "qqp"}, config=config, overrides=overrides
    )
    random = np.random.default_rng([seed, rank, *adapter.encode()])
    labels = np.arange(ROWS) % 2
    wrong = round((1 - mcc) * ROWS / 4)  # of each label
    flipped = np.concatenate([random.permutation(ROWS // 2)[:wrong] * 2 + label for label in (0, 1)])
    scores = np.where(np.isin(np.arange(ROWS), flipped), 1 - labels, labels) * 0.5 + random.uniform(0.1, 0.4, ROWS)
    run.write_predictions("validation", np.arange(ROWS), labels, scores)
    for step in range(10, 60, 10):
        run.log({"step": step, "split": "selection", "metrics": {"mcc": mcc * step / 50}})
    metrics = {"validation/accuracy": 0.9, "validation/f1": 0.8, "validation/mcc": mcc, "selection/mcc": mcc}
    run.update(
        metrics={**metrics, "validation/ece": 0.05}, data={"fingerprint": {"validation": "one"}, "rows": {"train": 100}}
    )
    run.update(params={"adapter": 1000 * rank, "head": 10}, cost={"train_seconds": 10.0 + rank})
    run.update(targets={f"layer.{n}.query": n + rank for n in range(3)}, environment={"commit": "abc", "device": "cpu"})
    paws = {"validation/mcc": mcc - 0.25, "validation/typo/mcc": mcc - 0.35}
    run.write_evaluation("paws", {"metrics": paws, "data": {"fingerprint": {"validation": "another"}}})
    perturbed = {"validation/mcc": mcc, "validation/typo/mcc": mcc - 0.05}
    run.write_evaluation("qqp", {"metrics": perturbed, "data": {"fingerprint": {"validation": "one"}}})
    run.finish("done")
