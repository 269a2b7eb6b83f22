"""Checks of a request that need neither torch nor a model, so that a wrong one is refused before they are imported.

All values are checked again where they are used.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lora_bench.backbones.locate import local_folder
from lora_bench.config import build, schema
from lora_bench.config.launch import Launch
from lora_bench.errors import Code, UserError, require, require_one_of
from lora_bench.records.backfill import MODEL_KEYS
from lora_bench.records.run_names import resolve_run
from lora_bench.run.loadable_record import read_loadable
from lora_bench.run.prediction_request import check_threshold, resolve_threshold

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_bench.records.job import Job
    from lora_bench.records.settings import Settings
    from lora_bench.run.settings import Experiment


def check_paths(settings: Settings) -> None:
    """Refuse folders of data and models that do not exist."""
    for data in (settings.data, *settings.tasks.values()):
        check_data(data)
    local_folder(settings.model)


def check_train(job: Job) -> None:
    """Refuse settings outside their ranges, and folders of data, models and runs that do not exist.

    A resumed run may have started already, so the run that it is initialised from is not looked for.
    """
    check_paths(job.settings)
    check_sharding(job.settings, job.cfg.adapter.get("quantize"))
    check_kernels(job.settings.trainer)
    if not job.cfg.dry_run:
        check_processes(job.settings.trainer)
    if job.cfg.adapter.get("init_from") and job.resumed is None:
        read_loadable(str(job.cfg.adapter.init_from), "adapter.init_from")


def check_sharding(settings: Settings | Experiment, quantize: str | None) -> None:
    """Refuse a sharded backbone with several adapters, or with quantised weights, whose codes are not sharded.

    Args:
        settings: of the run.
        quantize: `adapter.quantize`.
    """
    trainer, ensemble, data, model = settings.trainer, settings.ensemble, settings.data, settings.model
    if trainer.sharding == "none":
        return
    several = {
        "ensemble.members": ensemble.members is not None,
        "data.share=backbone": bool(settings.tasks) and data.share == "backbone",
    }
    conflicts = {key: "trains several adapters on it" for key, is_set in several.items() if is_set}
    types = {
        "adapter.quantize": quantize,
        "model.quantize": model.quantize,
        "model.quantize_embeddings": model.quantize_embeddings,
    }
    conflicts |= {key: "holds codes in place of its weights" for key, type_ in types.items() if type_ is not None}
    for key, effect in conflicts.items():
        raise UserError(
            f"shards the backbone for one adapter, and {key} {effect}",
            key="trainer.sharding",
            value=trainer.sharding,
            remedy=f"Set trainer.sharding=none, or leave out {key}.",
            code=Code.CONFLICT,
        )


def check_kernels(trainer: schema.Trainer) -> None:
    """Refuse `trainer.quantization_kernels=bitsandbytes` without that library."""
    kernels = trainer.quantization_kernels
    is_possible = kernels != "bitsandbytes" or find_spec("bitsandbytes") is not None
    reason = "is not installed"
    remedy = "Install it: pip install 'lora-bench[bitsandbytes]'. Or set trainer.quantization_kernels=auto."
    require(is_possible, "trainer.quantization_kernels", kernels, reason, remedy, code=Code.MISSING_PACKAGE)


def check_processes(trainer: schema.Trainer) -> None:
    """Refuse `trainer.sharding=fsdp` in a single process, which has no others to share the weights with."""
    remedy = (
        "Start the run with torchrun --nproc-per-node N -m lora_bench train …, with N processes, or set "
        "trainer.sharding=none."
    )
    is_possible = trainer.sharding == "none" or Launch.read().world_size > 1
    reason = "spreads the weights over the processes of torchrun, and there is only this one"
    require(is_possible, "trainer.sharding", trainer.sharding, reason, remedy, code=Code.CONFLICT)


def check_data(data: schema.Data) -> None:
    """Refuse a `data.path` that does not exist; data of other sources pass."""
    if isinstance(data, schema.FileData) and not os.path.exists(data.path):
        remedy = "Give a folder with train, validation and test files, or one file."
        raise UserError("does not exist", key="data.path", value=data.path, remedy=remedy, code=Code.NOT_FOUND)


EXPORT_FORMATS = ("peft", "merged", "onnx", "torch")
"""The choices of `format` of `lora-bench export`."""
MODEL_FORMATS = ("peft", "merged")
"""Forms of export without the threshold: labels follow from the scores in the program that loads the model."""


def check_export(cfg: DictConfig) -> None:
    """Set `run` to the folder of its run, and refuse one that is not finished, an unknown format, or no output folder.

    Refused are, too, an unknown key, a threshold that does not apply, and `format=onnx` without the packages that it
    needs.
    """
    build.check_names(cfg, ("run", "format", "output", "threshold", "model"))
    build.check_names(cfg.model, MODEL_KEYS, "model.")
    output, export_format = str(cfg.output), str(cfg.format)
    require_one_of("format", export_format, EXPORT_FORMATS)
    require(bool(output), "output", output, "names no folder")
    check_threshold(cfg.threshold)
    reason, remedy = "applies to format=onnx and format=torch, whose graph has it", "Leave it out."
    has_threshold = export_format not in MODEL_FORMATS or cfg.threshold is None
    require(has_threshold, "threshold", cfg.threshold, reason, remedy, code=Code.UNSUPPORTED)
    if export_format == "onnx":
        missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
        reason = f"needs the packages {', '.join(missing)}"
        remedy = "Install them: pip install 'lora-bench[onnx]'. Or use format=torch, which needs no other package."
        require(not missing, "format", export_format, reason, remedy, code=Code.MISSING_PACKAGE)
    resolve_threshold(cfg.threshold, read_loadable(resolve_run(cfg)))
