"""`lora-bench eval data=…`: a finished run, or an adapter made by PEFT, on another data set.

A run's figures go into its own folder; those of an adapter into a folder of their own, never into the adapter's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from lora_bench.adapters.peft import importer
from lora_bench.adapters.peft.config import PeftConfig
from lora_bench.backbones.bert import MODEL_TYPES
from lora_bench.backbones.load import load, load_tokenizer, locate
from lora_bench.config import build, schema
from lora_bench.console.progress import print_metrics
from lora_bench.console.text import sanitise
from lora_bench.data import sources
from lora_bench.data.tokenization import tokenize
from lora_bench.errors import Code, UserError, require, require_one_of
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import check_metrics, score
from lora_bench.evaluation.stress_splits import describe, perturbations, score_besides
from lora_bench.files.paths import check_folder
from lora_bench.records.backfill import model_places
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import Run, discard, file_name
from lora_bench.run.finished_run import FinishedRun
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.data.examples import Examples

Scorer = Callable[["Examples", bool], "NDArray[np.float64]"]
"""P(label 1) of each example from each member, (M, N); the flag says whether its tokens are worth keeping."""


@dataclass(frozen=True)
class _Subject:
    """What is scored."""

    scored: Scorer
    place: Run
    """Where its figures go."""
    described: dict[str, Any]
    """What they say of it."""
    seen: Sequence[Examples] = ()
    """What it was trained and chosen on, where that is asked for."""
    calibration: Calibration | None = None
    """Of its scores, where it has one."""
    member_calibrations: Sequence[Calibration] = ()
    """Of each member's, where it is an ensemble."""


BATCH_SIZE = 128
"""Pairs per forward pass of an adapter made by PEFT; a run has its own."""


def run_eval(cfg: DictConfig, *, data_choice: str, console: Console) -> None:
    """Score every labelled split but train, and write `evaluations/<name>.json` with the predictions beside it."""
    data = build.build_data(cfg.data)
    metrics = build.build_metrics(cfg.metric)
    check_metrics(metrics)
    perturbations(data)
    require(data.augment is None, "data.augment", data.augment, "goes with lora-bench train", code=Code.CONFLICT)
    reason = "goes with lora-bench train: a run is scored on one data set at a time"
    require(data.tasks is None, "data.tasks", data.tasks, reason, code=Code.CONFLICT)
    if bool(cfg.run) == bool(cfg.peft):
        raise UserError(
            "takes a finished run or an adapter made by PEFT",
            key="eval",
            remedy="Give run=DIR or peft=DIR.",
            code=Code.CONFLICT if cfg.run else Code.MISSING,
        )
    require_one_of("device", str(cfg.device), ("auto", "cpu", "cuda"))
    title = str(cfg.name or (Path(data.path).stem if isinstance(data, schema.FileData) else data_choice))
    file_name(title)  # refuses what cannot be one
    finished = _check_run(cfg, data) if cfg.run else None
    splits = sources.reported(sources.load(data))
    if not splits:
        raise UserError(
            "there is no labelled validation or test split to score", key="data", value=data_choice, code=Code.EMPTY
        )
    subject = _finished(finished, cfg, data, console) if finished else _made_by_peft(cfg, data)

    found: dict[str, float | None] = {}
    predictions = {}
    for name, split in splits.items():
        assert split.labels is not None
        of_members = subject.scored(split, True)
        scores = of_members.mean(axis=0)
        values = score(scores, split.labels, metrics)
        if subject.calibration is not None:
            values |= score_calibrated(scores, split.labels, subject.calibration)
        if subject.member_calibrations:
            values |= score_members(of_members, split.labels, metrics, subject.member_calibrations)
        values |= score_besides(
            data,
            split,
            scores,
            lambda examples: subject.scored(examples, False).mean(axis=0),
            seen=subject.seen,
            metrics=metrics,
            tell=lambda line: console.print(sanitise(line)),
        )
        found |= {f"{name}/{key}": value for key, value in values.items()}
        predictions[name] = (split.ids, split.labels, scores)
    described = {
        "path": getattr(data, "path", None),
        "choice": data_choice,
        **sources.describe(data, splits),
        **describe(data, splits, subject.seen),
    }
    content = {**subject.described, "data": described, "metrics": found}
    path = _write(subject.place, title, content, predictions)
    print_metrics(console, found)
    console.print(sanitise(f"written: {path}"), soft_wrap=True)  # a path is one word, however long


def _check_run(cfg: DictConfig, data: schema.Data) -> FinishedRecord:
    """Read the run's record, and refuse what does not go with it or cannot be written into its folder."""
    for key, given in (("model", cfg.model.get("family")), ("output", cfg.output)):
        if given:
            raise UserError(
                "goes with peft=, not with run=: a run has its own", key=key, value=given, code=Code.CONFLICT
            )
    finished = FinishedRecord.read(cfg.run)
    if len(data.text_columns) != len(finished.text_columns):
        reason = f"has {len(data.text_columns)} where the run was trained on {len(finished.text_columns)}"
        raise UserError(reason, key="data.text_columns", value=data.text_columns, code=Code.MISMATCH)
    check_folder(finished.folder / "evaluations", "run")
    return finished


def _finished(finished: FinishedRecord, cfg: DictConfig, data: schema.Data, console: Console) -> _Subject:
    run = FinishedRun.load(finished, device=str(cfg.device), **model_places(cfg.model))
    for note in run.notes:
        console.print(sanitise(f"note: {note}"))
    return _Subject(
        lambda examples, cached: run.member_scores(examples, cached=cached),
        Run(run.folder, run.record),
        described={},
        seen=_seen(run) if data.unseen else (),
        calibration=run.calibration,
        member_calibrations=run.member_calibrations,
    )


def _seen(run: FinishedRun) -> tuple[Examples, Examples]:
    """What the run was trained and chosen on, cut from its data again."""
    own = run.experiment.data
    seen = train, selection = sources.carve(sources.load(own)["train"], own)
    recorded = run.record["data"].get("fingerprint")
    for split, found in (("train", train), ("selection", selection)):
        if not isinstance(recorded, dict) or found.fingerprint() != recorded.get(split):
            raise UserError(
                f"the run's data now give another {split} split than it was trained with, so what it saw is not known",
                key="data.unseen",
                value=True,
                code=Code.MISMATCH,
            )
    return seen


def _made_by_peft(cfg: DictConfig, data: schema.Data) -> _Subject:
    require(
        not data.unseen,
        "data.unseen",
        data.unseen,
        "needs run=: what PEFT trained on is not known",
        code=Code.UNSUPPORTED,
    )
    adapter = PeftConfig.read(cfg.peft)
    output = _output(cfg.output, adapter.folder)
    check_folder(output, "output")
    model = _model(cfg.model, adapter)
    device = resolve_device(cfg.device)
    backbone = load(model, load_tokenizer(model), task=data.task, device=device)
    backbone.need_room(data.max_length)
    check_padding(backbone)
    backbone.to(device, torch.float32, trained=False)
    pack = importer.attach(adapter, backbone).eval()

    def scored(examples: Examples, cached: bool) -> NDArray[np.float64]:
        table = tokenize(examples, data.text_columns, backbone, data.max_length, cached=cached)
        scores = predict(pack, table, BATCH_SIZE)
        if not np.isfinite(scores).all():
            raise UserError(
                "gives scores that are not finite numbers", key="peft", value=adapter.folder, code=Code.DAMAGED
            )
        return scores

    described = {"folder": os.path.abspath(adapter.folder), "peft_type": adapter.kind, "backbone": locate(model)}
    return _Subject(scored, Run(output, {}), {"peft": described})


def _output(asked: str | None, adapter: Path) -> Path:
    """The folder for an adapter's figures."""
    if asked is None:
        return Path("outputs", "peft", f"{adapter.resolve().name}-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}")
    if adapter.resolve() in (Path(asked).resolve(), *Path(asked).resolve().parents):
        raise UserError(
            "lies in the adapter's own folder, which stays as it is", key="output", value=asked, code=Code.EXISTS
        )
    return Path(asked)


def _model(node: DictConfig, adapter: PeftConfig) -> schema.Model:
    """The backbone that was asked for, else that which the adapter names, its family read from its config.json."""
    if "family" in node:
        return build.build_model(node)
    place = node.path or adapter.base_model
    if not place:
        raise adapter.refusal("base_model_name_or_path", None, "names no backbone", "Give model.path=DIR.")
    local = bool(node.path) or Path(place).is_dir()
    where = {"path": place} if local else {"hub_id": place, "revision": adapter.revision}
    unset = dict.fromkeys(field.name for field in fields(schema.Model)) | {"tokenizer": node.tokenizer}
    model_type = _model_type(schema.Model(**unset | where | {"family": "auto"}))
    if model_type == "t5":
        raise UserError(
            "is an adapter of T5, and does not say through which template T5 reads and how it answers",
            key="peft",
            value=adapter.folder,
            remedy=f"Add model=t5 with model.template=… and model.form=…, and model.path={place} if it lies there.",
            code=Code.UNSUPPORTED,
        )
    family = "bert" if model_type in MODEL_TYPES else "auto"
    return schema.Model(**unset | where | {"family": family})


def _model_type(model: schema.Model) -> str | None:
    """What the backbone's config.json calls it; None where there is none, which loading it will tell."""
    try:
        found = transformers.AutoConfig.from_pretrained(locate(model), revision=model.revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception:
        return None
    return str(found.model_type)


def _write(place: Run, name: str, content: dict[str, Any], predictions: dict[str, Any]) -> Path:
    there = place.folder.exists()
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        return place.write_evaluation(name, content, predictions)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}", file=place.folder, code=Code.UNWRITABLE
        ) from None
    finally:
        if not there:
            discard(place.folder)  # if nothing was written into it
