"""Helpers of the tests: names of the tiny backbones, a small toy data set, and composed configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lora_bench.config.compose import register_with_hydra
from lora_bench.config.groups import conf_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

TINY = ("tiny_bert", "tiny_roberta", "tiny_t5")
SMALL_TOY = ["data=toy", "data.train_rows=120", "data.validation_rows=40", "trainer.precision=fp32"]


def composed(*overrides: str, name: str = "config") -> DictConfig:
    """Return the config that these overrides compose, with `tiny_bert` unless they choose a model."""
    register_with_hydra()
    GlobalHydra.instance().clear()
    chosen = list(overrides)
    if name == "config" and not any(o.startswith(("model=", "experiment=")) for o in chosen):
        chosen.insert(0, "model=tiny_bert")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(name, chosen)


QQP_LABELS = ("not_duplicate", "duplicate")
"""Names of QQP's classes, which are T5's words for them."""
