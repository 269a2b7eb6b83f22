"""Composes the settings of an experiment from overrides, as `lora-bench train` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.run.settings import Experiment


def build_experiment(overrides: Sequence[str]) -> Experiment:
    """Return the settings that these overrides compose. torch is imported here, so `--help` of a benchmark is fast."""
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose
    from lora_bench.config.groups import conf_folder
    from lora_bench.run.settings import Experiment

    config = compose(conf_folder(), "config", list(overrides))
    return Experiment.build(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
