"""The available trackers, and those that a config chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.config.build import build
from lora_bench.errors import Code, nearest, require
from lora_bench.tracking.mlflow import MLflow
from lora_bench.tracking.tensorboard import TensorBoard
from lora_bench.tracking.trackio import Trackio
from lora_bench.tracking.wandb import WeightsAndBiases

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_bench.tracking.base import Tracker

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def build_trackers(node: DictConfig | None) -> dict[str, Tracker]:
    """Return the chosen trackers by name; nothing is started, and `Tracker.check` is left to the caller.

    Args:
        node: the config group `tracking`; None, as in records older than tracking, chooses no tracker.

    Raises:
        UserError: there is no tracker of a name, or a setting is wrong.
    """
    chosen = {}
    for name, settings in (node or {}).items():
        tracker_class = TRACKERS.get(str(name))
        require(
            tracker_class is not None,
            f"tracking.{name!s}",
            None,
            "is not a tracker",
            nearest(str(name), TRACKERS),
            code=Code.UNKNOWN_CHOICE,
        )
        assert tracker_class is not None
        chosen[str(name)] = build(tracker_class, settings, f"tracking.{name!s}")
    return chosen
