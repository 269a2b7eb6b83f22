"""`lora-bench eval data=…`: evaluate a finished run, or an adapter made by PEFT, on another data set.

The results of a run go into its folder; those of an adapter, and of a run on the hub, into a new folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from lora_bench.adapters.peft import importer
from lora_bench.adapters.peft.config import PeftConfig
from lora_bench.backbones.families import build_model, family_class, family_of_type
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.backbones.locate import locate
from lora_bench.config import schema
from lora_bench.console.progress import print_metrics
from lora_bench.console.text import sanitise
from lora_bench.data.tokenization import tokenize
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import class_metrics, score
from lora_bench.evaluation.stress_splits import describe_stress_splits, score_stress_splits
from lora_bench.records.backfill import model_paths
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import discard
from lora_bench.run.finished_run import FinishedRun
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.backbones.family import Family
    from lora_bench.data.examples import Examples
    from lora_bench.records.run_folder import Run
    from lora_bench.run.evaluation_request import EvaluationRequest

Scorer = Callable[["Examples", bool], "NDArray[np.float64]"]
"""Returns the scores of N examples from M members, (M, N) or (M, N, C); with the flag set, their tokens are cached."""


@dataclass(frozen=True)
class _Subject:
    """A loaded model to evaluate."""

    scored: Scorer
    described: dict[str, Any]
    """Fields of the results that identify it."""
    seen: Sequence[Examples] = ()
    """Its train and selection splits, with `data.unseen`."""
    calibration: Calibration | None = None
    """Calibration of its scores; None: it has none."""
    member_calibrations: Sequence[Calibration] = ()
    """Calibrations of its members' scores, for an ensemble."""


BATCH_SIZE = 128
"""Pairs per forward pass of an adapter made by PEFT; a run has its own batch size."""


def run_eval(request: EvaluationRequest, *, console: Console) -> None:
    """Evaluate every labelled split except train, and write `evaluations/<name>.json` with the predictions.

    The files replace an older evaluation of the same source and name. Metrics and the path are printed.

    Args:
        request: the checked request.
        console: receives metrics and notes.

    Raises:
        UserError: the model cannot be loaded, or the results cannot be written.
    """
    data, splits = request.data, request.splits
    for note in request.notes:
        console.print(sanitise(f"note: {note}"))
    subject = _run_subject(request, console) if isinstance(request.subject, FinishedRecord) else _peft_subject(request)
    metrics: dict[str, float | None] = {}
    predictions = {}
    per_class: dict[str, Any] = {}
    for name, split in splits.items():
        assert split.labels is not None
        member_scores = subject.scored(split, True)
        scores = member_scores.mean(axis=0)
        values = _score_split(request, subject, split, member_scores, console)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
        if data.form == "multiclass":
            per_class[name] = class_metrics(scores, split.labels, data.label_names or [])
        predictions[name] = (split.ids, split.labels, scores)
    described = {
        "path": getattr(data, "path", None),
        "choice": request.choice,
        **request.described,
        **describe_stress_splits(data, splits, subject.seen),
    }
    content = {**subject.described, "data": described, "metrics": metrics}
    content |= {"per_class": per_class} if per_class else {}
    for warning in described["warnings"]:
        console.print(sanitise(f"note: {warning}"))
    path = _write(request.target, request.title, content, predictions)
    print_metrics(console, metrics)
    console.print(sanitise(f"written: {path}"), soft_wrap=True)  # without wrapping the path


def _score_split(
    request: EvaluationRequest,
    subject: _Subject,
    split: Examples,
    member_scores: NDArray[np.float64],
    console: Console,
) -> dict[str, float | None]:
    """Return the metrics of a split: of its scores, calibrated, of an ensemble's members, and on its stress splits.

    Args:
        request: the request.
        subject: the model.
        split: N labelled examples.
        member_scores: of them by each of M members, (M, N) or (M, N, C).
        console: receives a line per perturbation.
    """
    assert split.labels is not None
    scores = member_scores.mean(axis=0)
    values = score(scores, split.labels, request.metrics)
    if subject.calibration is not None:
        values |= score_calibrated(scores, split.labels, subject.calibration)
    if subject.member_calibrations:
        values |= score_members(member_scores, split.labels, request.metrics, subject.member_calibrations)
    return values | score_stress_splits(
        request.data,
        split,
        scores,
        lambda examples: subject.scored(examples, False).mean(axis=0),
        seen=subject.seen,
        metrics=request.metrics,
        log=lambda line: console.print(sanitise(line)),
    )


def _run_subject(request: EvaluationRequest, console: Console) -> _Subject:
    """Load a finished run to evaluate, and print its notes; with `data.unseen` load its training data too.

    Raises:
        UserError: the run cannot be loaded, or its training data have changed.
    """
    assert isinstance(request.subject, FinishedRecord)
    run = FinishedRun.load(request.subject, device=request.device, **model_paths(request.model))
    for note in run.notes:
        console.print(sanitise(f"note: {note}"))
    return _Subject(
        lambda examples, cached: run.member_scores(examples, cached=cached),
        {"run": request.hub_source} if request.hub_source else {},
        seen=_seen(run) if request.data.unseen else (),
        calibration=run.calibration,
        member_calibrations=run.member_calibrations,
    )


def _seen(run: FinishedRun) -> tuple[Examples, Examples]:
    """Return the run's train and selection splits, made from its data again.

    Raises:
        UserError: the data have changed since, or the record has no fingerprint of them.
    """
    try:
        return run.reload_splits()
    except UserError as error:
        if error.code == Code.MISMATCH:
            error.key, error.value = "data.unseen", True
        raise


def _peft_subject(request: EvaluationRequest) -> _Subject:
    """Load an adapter made by PEFT to evaluate, in fp32.

    Raises:
        UserError: the adapter or its backbone cannot be loaded.
    """
    assert isinstance(request.subject, PeftConfig)
    adapter, data = request.subject, request.data
    model = _model(request.model, adapter)
    device = resolve_device(request.device)
    backbone = load(model, load_tokenizer(model), task=data.task, label_names=[data.label_names], device=device)
    backbone.require_length(data.max_length)
    check_padding(backbone)
    backbone.to(device, torch.float32, trained=False)
    pack = importer.attach(adapter, backbone).eval()

    def scored(examples: Examples, cached: bool) -> NDArray[np.float64]:
        """Return the scores of the examples, (1, N) or (1, N, C); a `UserError` if a score is not finite."""
        truncation, columns = data.truncation, data.text_columns
        table = tokenize(examples, columns, backbone, data.max_length, truncation=truncation, cached=cached)
        scores = predict(pack, table, BATCH_SIZE)
        if not np.isfinite(scores).all():
            raise UserError(
                "gives scores that are not finite numbers", key="peft", value=adapter.folder, code=Code.DAMAGED
            )
        return scores

    described = {"folder": os.path.abspath(adapter.folder), "peft_type": adapter.peft_type, "backbone": locate(model)}
    return _Subject(scored, {"peft": described})


def _model(node: DictConfig, adapter: PeftConfig) -> Family:
    """Return the settings of the backbone: those given, or those of the model that the adapter names.

    In the latter case its config.json names the family, and only `path` and `tokenizer` are taken from the node.

    Args:
        node: the group `model`; without a family it has the keys `path` and `tokenizer`.
        adapter: names its backbone.

    Raises:
        UserError: the adapter names no backbone, or the family has keys that the adapter's files do not give.
    """
    if "family" in node:
        return build_model(node)
    base = node.path or adapter.base_model
    if not base:
        raise adapter.refusal("base_model_name_or_path", None, "names no backbone", "Give model.path=DIR.")
    local = bool(node.path) or Path(base).is_dir()
    source = {"path": base} if local else {"hub_id": base, "revision": adapter.revision}
    settings = dict.fromkeys(field.name for field in fields(schema.Model)) | {"tokenizer": node.tokenizer} | source
    family = family_of_type(model_type := _model_type(schema.Model(**settings)))
    settings["family"] = family
    cls = family_class(family)
    settings |= cls.settings_of_type(model_type)
    missing_keys = [f"model.{field.name}" for field in fields(cls) if field.name not in settings]
    if missing_keys:
        raise UserError(
            f"is an adapter of a {model_type}, and its files do not give {', '.join(missing_keys)}",
            key="peft",
            value=adapter.folder,
            remedy=f"Add model={cls.example or family} with those of these keys that differ from its defaults, and "
            f"model.path={base} if it is there.",
            code=Code.UNSUPPORTED,
        )
    return cls(**settings)


def _model_type(model: schema.Model) -> str | None:
    """Return `model_type` of the backbone's config.json, locally or on the hub; None if it cannot be read.

    Raises:
        UserError: there is no such local folder.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            locate(model), revision=model.revision, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception:
        return None
    return str(config.model_type)


def _write(target: Run, name: str, content: dict[str, Any], predictions: dict[str, Any]) -> Path:
    """Write an evaluation into the target's folder, which is created if necessary; return the path of its JSON file.

    An older evaluation of that name is replaced. A new folder that is still empty after a failure is removed again.

    Raises:
        UserError: the folder cannot be created.
        RunFailedError: a file in it cannot be written.
    """
    is_new = not target.folder.exists()
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        return target.write_evaluation(name, content, predictions)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}", file=target.folder, code=Code.UNWRITABLE
        ) from None
    finally:
        if is_new:
            discard(target.folder)  # if nothing was written into it
