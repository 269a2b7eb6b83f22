"""The trackers there are, and the ones that a config chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.config.build import build
from lora_bench.errors import Code, nearest, require
from lora_bench.tracking.mlflow import MLflow
from lora_bench.tracking.tensorboard import TensorBoard

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_bench.tracking.base import Tracker

TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def build_trackers(node: DictConfig | None) -> dict[str, Tracker]:
    """The chosen trackers by name; None, as in records older than tracking, is none."""
    chosen = {}
    for name, settings in (node or {}).items():
        kind = TRACKERS.get(str(name))
        require(
            kind is not None,
            f"tracking.{name!s}",
            None,
            "is no tracker",
            nearest(str(name), TRACKERS),
            code=Code.UNKNOWN_CHOICE,
        )
        assert kind is not None
        chosen[str(name)] = build(kind, settings, f"tracking.{name!s}")
    return chosen
