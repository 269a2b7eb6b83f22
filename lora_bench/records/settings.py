"""The settings of a run that need neither torch nor a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_bench.adapters.methods import check_settings
from lora_bench.backbones.families import build_model
from lora_bench.config.build import build, build_annotations, build_data, check_top, resolved
from lora_bench.config.schema import Data, Ensemble, Head, Optimizer, Packing, Trainer
from lora_bench.errors import Code, require

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_bench.backbones.family import Family


_GROUPS = ("model", "adapter", "head", "data", "optimizer", "trainer", "metric", "pack", "ensemble", "tracking")
KEYS = (*_GROUPS, "tasks", "name", "tags", "notes", "seed", "resume", "dry_run")
"""Keys at the top of a run's config."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run that are built without torch: all but its adapter, metrics and trackers.

    The values of the adapter's settings are checked, too.
    """

    data: Data
    model: Family
    head: Head
    optimizer: Optimizer
    trainer: Trainer
    pack: Packing
    ensemble: Ensemble
    tasks: dict[str, Data]
    """Data of each task by its name; empty for a run of one task."""

    @classmethod
    def build(cls, cfg: DictConfig) -> Settings:
        """Build the settings from a composed config.

        Raises:
            UserError: a key is unknown or missing, or a value is of a wrong type or out of range; it names the key.
        """
        check_top(cfg, KEYS)
        has_method = "method" in (cfg.adapter or {})
        build_annotations(cfg)  # only the record has them
        require(has_method, "adapter", None, "is missing", "It cannot be left out.", code=Code.MISSING)
        check_settings(resolved(cfg.adapter, "adapter"))
        return cls(
            data=build_data(cfg.data),  # first: the model's label words are those of the data
            model=build_model(cfg.model),
            head=build(Head, cfg["head"], "head"),
            optimizer=build(Optimizer, cfg.optimizer, "optimizer"),
            trainer=build(Trainer, cfg.trainer, "trainer"),
            pack=build(Packing, cfg.pack, "pack"),
            ensemble=build(Ensemble, cfg.ensemble, "ensemble"),
            tasks={str(name): build_data(node) for name, node in (cfg.get("tasks") or {}).items()},
        )
