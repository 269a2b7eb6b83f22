"""`lora-bench eval data=…`: evaluate a finished run, or an adapter made by PEFT, on another data set.

The results of a run go into its folder; those of an adapter, and of a run on the hub, into a new folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
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
from lora_bench.config import build, schema
from lora_bench.console.progress import print_metrics
from lora_bench.console.text import sanitise
from lora_bench.data import sources
from lora_bench.data.tokenization import tokenize
from lora_bench.errors import Code, UserError, require, require_one_of
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import check_metrics, class_metrics, score
from lora_bench.evaluation.stress_splits import describe_stress_splits, resolve_transforms, score_stress_splits
from lora_bench.files.paths import check_folder
from lora_bench.records import hub_run
from lora_bench.records.backfill import model_paths
from lora_bench.records.evaluations import read_evaluations
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.hub_run import is_on_hub
from lora_bench.records.run_folder import EVALUATIONS, Run, discard, file_name
from lora_bench.run.finished_run import FinishedRun
from lora_bench.run.settings import Experiment
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.backbones.family import Family
    from lora_bench.data.examples import Examples

Scorer = Callable[["Examples", bool], "NDArray[np.float64]"]
"""Returns the scores of N examples from M members, (M, N) or (M, N, C); with the flag set, their tokens are cached."""


@dataclass(frozen=True)
class _Subject:
    """A model to evaluate."""

    scored: Scorer
    target: Run
    """The folder that its results go into."""
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


def run_eval(cfg: DictConfig, *, data_choice: str, console: Console) -> None:
    """Evaluate every labelled split except train, and write `evaluations/<name>.json` with the predictions.

    The name is `cfg.name`; if that is not set, the stem of `data.path` for local files, and `data_choice` for other
    data. The files go into the run's folder, replacing an older evaluation of the same source and name, or, for an
    adapter or a run on the hub, into `output`. Metrics and the path are printed.

    Args:
        cfg: the composed configuration of `eval`.
        data_choice: the choice of the group `data`.
        console: receives metrics and notes.

    Raises:
        UserError: the request cannot be met, an older evaluation of that name is of other data, or the results cannot
            be written.
    """
    data = build.build_data(cfg.data)
    metrics = build.build_metrics(cfg.metric)
    resolve_transforms(data)
    require(data.augment is None, "data.augment", data.augment, "is for lora-bench train", code=Code.CONFLICT)
    reason = "is for lora-bench train: a run is evaluated on one data set at a time"
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
    file_name(title)  # refuses what is not a file name
    finished = _check_run(cfg, data) if cfg.run else None
    notes: list[str] = []
    if finished:
        trained = Experiment.of_finished(finished).data
        check_metrics(metrics, trained.form, trained.outputs)
        data = _with_order_of_numbers(data, finished)
        loaded = sources.load_for_run(data, trained, notes.append)
        names = trained.label_names
        data = replace(data, type=trained.type, label_names=names, label_threshold=None, positive_label=None)
    else:
        data, loaded = sources.load(data)
        check_metrics(metrics, data.form, data.outputs)
    for note in notes:
        console.print(sanitise(f"note: {note}"))
    splits = sources.reported_splits(loaded)
    if not splits:
        raise UserError(
            "there is no labelled validation or test split to score", key="data", value=data_choice, code=Code.EMPTY
        )
    subject = _run_subject(finished, cfg, data, console) if finished else _peft_subject(cfg, data)
    described = sources.describe_data(data, splits)
    _refuse_other_data(subject.target.folder, title, data, described["fingerprint"])

    metrics_by_split: dict[str, float | None] = {}
    predictions = {}
    per_class: dict[str, Any] = {}
    for name, split in splits.items():
        assert split.labels is not None
        member_scores = subject.scored(split, True)
        scores = member_scores.mean(axis=0)
        values = score(scores, split.labels, metrics)
        if subject.calibration is not None:
            values |= score_calibrated(scores, split.labels, subject.calibration)
        if subject.member_calibrations:
            values |= score_members(member_scores, split.labels, metrics, subject.member_calibrations)
        values |= score_stress_splits(
            data,
            split,
            scores,
            lambda examples: subject.scored(examples, False).mean(axis=0),
            seen=subject.seen,
            metrics=metrics,
            log=lambda line: console.print(sanitise(line)),
        )
        metrics_by_split |= {f"{name}/{key}": value for key, value in values.items()}
        if data.form == "multiclass":
            per_class[name] = class_metrics(scores, split.labels, data.label_names or [])
        predictions[name] = (split.ids, split.labels, scores)
    described = {
        "path": getattr(data, "path", None),
        "choice": data_choice,
        **described,
        **describe_stress_splits(data, splits, subject.seen),
    }
    content = {**subject.described, "data": described, "metrics": metrics_by_split}
    content |= {"per_class": per_class} if per_class else {}
    for warning in described["warnings"]:
        console.print(sanitise(f"note: {warning}"))
    path = _write(subject.target, title, content, predictions)
    print_metrics(console, metrics_by_split)
    console.print(sanitise(f"written: {path}"), soft_wrap=True)  # without wrapping the path


def _refuse_other_data(folder: Path, title: str, data: schema.Data, fingerprints: dict[str, str]) -> None:
    """Refuse to replace an evaluation of other files. One of the same source may be replaced, though that has changed.

    Args:
        folder: the target.
        title: the name of the new evaluation.
        data: its settings.
        fingerprints: of its data, by split.

    Raises:
        UserError: the folder holds an evaluation of this name with another path and other fingerprints.
    """
    older = read_evaluations(folder).get(file_name(title))
    if older is not None and older.path != getattr(data, "path", None) and older.fingerprints != fingerprints:
        raise UserError(
            "is the name of an older evaluation, of other data, which would be replaced",
            key="name",
            value=title,
            file=folder / EVALUATIONS / f"{file_name(title)}.json",
            remedy="Give another name: name=NAME.",
            code=Code.EXISTS,
        )


def _check_run(cfg: DictConfig, data: schema.Data) -> FinishedRecord:
    """Read the run's record, and refuse settings that conflict with it or results that cannot be written.

    Raises:
        UserError: a model family or an output is given, the run is not finished, the data has another number of text
            columns, or the folder is not writable.
    """
    outputs = [] if is_on_hub(cfg.run) else [("output", cfg.output)]
    for key, value in [("model", cfg.model.get("family")), *outputs]:
        if value:
            raise UserError("is for peft=, not for run=: a run has its own", key=key, value=value, code=Code.CONFLICT)
    finished = FinishedRecord.read(cfg.run)
    if len(data.text_columns) != len(finished.text_columns):
        reason = f"has {len(data.text_columns)} where the run was trained on {len(finished.text_columns)}"
        raise UserError(reason, key="data.text_columns", value=data.text_columns, code=Code.MISMATCH)
    if outputs:
        check_folder(finished.folder / EVALUATIONS, "run")
    return finished


def _with_order_of_numbers(data: schema.Data, finished: FinishedRecord) -> schema.Data:
    """Return settings whose label numbers mean the classes that they meant in the run's training data.

    `data.positive_label` may have put the run's classes into another order than its `data.label_names`.
    """
    given, of_run = finished.config["data"].get("label_names"), finished.label_names
    is_reordered = data.label_names is None and given and of_run and given != of_run and sorted(given) == sorted(of_run)
    return replace(data, label_names=given) if is_reordered else data


def _run_subject(finished: FinishedRecord, cfg: DictConfig, data: schema.Data, console: Console) -> _Subject:
    """Load a finished run to evaluate, and print its notes; with `data.unseen` load its training data too.

    The results of a run on the hub go into `output`, those of another one into its folder.

    Raises:
        UserError: the run cannot be loaded, its training data have changed, or `output` is not writable.
    """
    target, described = Run(finished.folder, finished.record), {}
    if is_on_hub(cfg.run):
        source = hub_run.parse(cfg.run, "run")
        described = {"run": str(source._replace(revision=finished.folder.name))}  # the commit
        target = Run(_output(cfg.output, finished.folder, "hub", source.repository), {})
        check_folder(target.folder, "output")
    run = FinishedRun.load(finished, device=str(cfg.device), **model_paths(cfg.model))
    for note in run.notes:
        console.print(sanitise(f"note: {note}"))
    return _Subject(
        lambda examples, cached: run.member_scores(examples, cached=cached),
        target,
        described,
        seen=_seen(run) if data.unseen else (),
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


def _peft_subject(cfg: DictConfig, data: schema.Data) -> _Subject:
    """Load an adapter made by PEFT to evaluate, in fp32.

    The folder of the results, `output` or by default a new one, may exist. It is checked and not created yet.

    Raises:
        UserError: `data.unseen` is set, the adapter or its backbone cannot be loaded, or the folder of the results is
            not writable or is inside the adapter's.
    """
    require(
        not data.unseen,
        "data.unseen",
        data.unseen,
        "needs run=: the training examples of PEFT are not known",
        code=Code.UNSUPPORTED,
    )
    adapter = PeftConfig.read(cfg.peft)
    output = _output(cfg.output, adapter.folder, "peft", adapter.folder.resolve().name)
    check_folder(output, "output")
    model = _model(cfg.model, adapter)
    device = resolve_device(cfg.device)
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
    return _Subject(scored, Run(output, {}), {"peft": described})


def _output(output: str | None, source: Path, kind: str, name: str) -> Path:
    """Return the folder for the results: `output`, or a new one below `outputs/<kind>`; it is not created.

    Args:
        output: as requested.
        source: the folder of the adapter or run, which must not change.
        kind: `peft` or `hub`.
        name: of the adapter or repository; a new folder has it.

    Raises:
        UserError: `output` is the folder of the adapter or run, or is inside it.
    """
    if output is None:
        return Path("outputs", kind, f"{name.replace('/', '--')}-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}")
    if source.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        reason = f"is inside the {'adapter' if kind == 'peft' else 'run'}'s folder, which must not change"
        raise UserError(reason, key="output", value=output, code=Code.EXISTS)
    return Path(output)


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
