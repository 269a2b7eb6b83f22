"""Checks of a request that need neither torch nor a model, so that a wrong one is refused before they are imported.

All values are checked again where they are used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_bench.backbones.families import build_model
from lora_bench.backbones.locate import local_folder
from lora_bench.config import build, schema
from lora_bench.errors import Code, UserError, require, require_one_of
from lora_bench.records.finished_record import FinishedRecord

if TYPE_CHECKING:
    from omegaconf import DictConfig


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings outside their ranges, and folders of data and models that do not exist."""
    require(
        "method" in (cfg.get("adapter") or {}),
        "adapter",
        None,
        "is missing",
        "It cannot be left out.",
        code=Code.MISSING,
    )
    for node in (cfg.data, *(cfg.get("tasks") or {}).values()):
        check_data(build.build_data(node))
    local_folder(build_model(cfg.model))
    for name, settings in (
        ("head", schema.Head),
        ("optimizer", schema.Optimizer),
        ("trainer", schema.Trainer),
        ("pack", schema.Packing),
        ("ensemble", schema.Ensemble),
    ):
        build.build(settings, cfg[name], name)


def check_train(cfg: DictConfig, *, resumed: bool) -> None:
    """Check the settings, and for a new run also the finished run of `adapter.init_from`."""
    check_settings(cfg)
    if cfg.adapter.get("init_from") and not resumed:
        check_run(str(cfg.adapter.init_from), "adapter.init_from")


def check_data(data: schema.Data) -> None:
    """Refuse a path to data that does not exist."""
    if isinstance(data, schema.FileData) and not os.path.exists(data.path):
        remedy = "Give a folder with train, validation and test files, or one file."
        raise UserError("does not exist", key="data.path", value=data.path, remedy=remedy, code=Code.NOT_FOUND)


def check_run(folder: str, key: str = "run") -> None:
    """Refuse a folder that has no finished run of one task, naming the key that gave it."""
    FinishedRecord.read(folder, key)


def check_eval(cfg: DictConfig) -> None:
    """Refuse an evaluation of a run, an adapter or data that do not exist."""
    require(
        bool(cfg.run) != bool(cfg.peft),
        "eval",
        None,
        "needs either a finished run or an adapter made by PEFT",
        "Give run=DIR or peft=DIR.",
        code=Code.CONFLICT if cfg.run else Code.MISSING,
    )
    check_data(build.build_data(cfg.data))
    if cfg.run:
        check_run(str(cfg.run))


def check_export(cfg: DictConfig) -> None:
    """Refuse an export of a run that does not exist, or in an unknown format."""
    run, output = str(cfg.run), str(cfg.output)
    require_one_of("format", str(cfg.format), ("peft", "merged"))
    require(bool(output), "output", output, "names no folder")
    check_run(run)
