"""The request of `lora-bench eval`, checked as far as possible without the model: no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.peft.config import PeftConfig
from lora_bench.config import build
from lora_bench.config.schema import FileData
from lora_bench.data import sources
from lora_bench.errors import Code, UserError, require, require_one_of
from lora_bench.evaluation.metrics import check_metrics
from lora_bench.evaluation.stress_splits import resolve_transforms
from lora_bench.files.paths import check_folder
from lora_bench.records import hub_run
from lora_bench.records.backfill import MODEL_KEYS
from lora_bench.records.evaluations import read_evaluations
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.hub_run import is_on_hub
from lora_bench.records.run_folder import EVALUATIONS, Run, file_name
from lora_bench.records.run_names import resolve_run
from lora_bench.run.loadable_record import read_loadable
from lora_bench.run.prediction_request import DEVICES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_bench.config.schema import Data, Metric
    from lora_bench.data.examples import Examples
    from lora_bench.records.hub_run import HubRun

_KEYS = ("run", "peft", "model", "data", "metric", "name", "output", "device")


@dataclass(frozen=True)
class EvaluationRequest:
    """The request of `lora-bench eval`: what is evaluated, the data, and where the results go."""

    subject: FinishedRecord | PeftConfig
    """A finished run, or an adapter made by PEFT."""
    hub_source: str | None
    """The run's repository on the hub and its commit; None for another subject."""
    data: Data
    """The settings; for a run with the names of its classes."""
    choice: str
    """The choice of the group `data`."""
    splits: dict[str, Examples]
    """The labelled splits except train, with the class numbers of the run."""
    described: dict[str, Any]
    """The description of the splits for the results."""
    metrics: dict[str, Metric]
    """Extra metrics, by name."""
    title: str
    """The name of the evaluation."""
    target: Run
    """The folder that the results go into; that of an adapter or of a run on the hub may not exist yet."""
    model: DictConfig
    """The group `model`: the present folders of backbone and tokenizer, or the family of an adapter's backbone."""
    device: str
    notes: list[str]
    """Sentences on the data for the user."""

    @classmethod
    def read(cls, cfg: DictConfig, data_choice: str) -> EvaluationRequest:
        """Check the command's config, the record or the adapter's config, and the target, and read the data.

        Nothing is written. The key `run` is set to the folder of the run that it names. The name of the evaluation is
        `cfg.name`; if that is not set, the stem of `data.path` for local files, and `data_choice` for other data.

        Args:
            cfg: the composed configuration of `eval`.
            data_choice: the choice of the group `data`.

        Raises:
            UserError: naming the key or file that is wrong: both or neither of `run` and `peft`, a run that is not
                finished, data that do not suit it, or an older evaluation of this name, of other data.
        """
        build.check_names(cfg, _KEYS)
        if "family" not in cfg.model:  # keys of a family are checked as it is built
            build.check_names(cfg.model, MODEL_KEYS, "model.")
        require(
            bool(cfg.run) != bool(cfg.peft),
            "eval",
            None,
            "needs either a finished run or an adapter made by PEFT",
            "Give run=DIR or peft=DIR.",
            code=Code.CONFLICT if cfg.run else Code.MISSING,
        )
        require_one_of("device", str(cfg.device), DEVICES)
        data, metrics = build.build_data(cfg.data), build.build_metrics(cfg.metric)
        _check_data(data)
        title = str(cfg.name or (Path(data.path).stem if isinstance(data, FileData) else data_choice))
        file_name(title)  # refuses what is not a file name
        subject: FinishedRecord | PeftConfig
        notes: list[str] = []
        if cfg.run:
            resolve_run(cfg)
            subject = finished = _read_run(cfg, data)
            check_metrics(metrics, finished.data.form, finished.data.outputs)
            data, loaded = _load_for_run(data, finished, notes)
        else:
            reason = "needs run=: the training examples of PEFT are not known"
            require(not data.unseen, "data.unseen", data.unseen, reason, code=Code.UNSUPPORTED)
            subject = PeftConfig.read(cfg.peft)
            data, loaded = sources.load(data)
            check_metrics(metrics, data.form, data.outputs)
        splits = sources.reported_splits(loaded)
        reason = "there is no labelled validation or test split to score"
        require(bool(splits), "data", data_choice, reason, code=Code.EMPTY)
        source = hub_run.parse(cfg.run, "run") if cfg.run and is_on_hub(cfg.run) else None
        target = _target(cfg.output, subject, source)
        described = sources.describe_data(data, splits)
        _refuse_other_data(target.folder, title, data, described["fingerprint"])
        commit = None if source is None else str(source._replace(revision=subject.folder.name))
        of_data = data, data_choice, splits, described
        return cls(subject, commit, *of_data, metrics, title, target, cfg.model, str(cfg.device), notes)


def _check_data(data: Data) -> None:
    """Refuse unknown perturbations, and settings of the data that apply to training only."""
    resolve_transforms(data)
    require(data.augment is None, "data.augment", data.augment, "is for lora-bench train", code=Code.CONFLICT)
    reason = "is for lora-bench train: a run is evaluated on one data set at a time"
    require(data.tasks is None, "data.tasks", data.tasks, reason, code=Code.CONFLICT)


def _read_run(cfg: DictConfig, data: Data) -> FinishedRecord:
    """Read the run's record, and refuse settings that conflict with it.

    Raises:
        UserError: a model family or an output is given, the run is not finished, or the data has another number of text
            columns.
    """
    outputs = [] if is_on_hub(cfg.run) else [("output", cfg.output)]
    for key, value in [("model", cfg.model.get("family")), *outputs]:
        if value:
            raise UserError("is for peft=, not for run=: a run has its own", key=key, value=value, code=Code.CONFLICT)
    finished = read_loadable(cfg.run)
    if len(data.text_columns) != len(finished.text_columns):
        reason = f"has {len(data.text_columns)} where the run was trained on {len(finished.text_columns)}"
        raise UserError(reason, key="data.text_columns", value=data.text_columns, code=Code.MISMATCH)
    return finished


def _load_for_run(data: Data, finished: FinishedRecord, notes: list[str]) -> tuple[Data, dict[str, Examples]]:
    """Load data with the class numbers of a run; return the settings with its classes, and the splits.

    Label numbers mean the classes that they meant in the run's training data: `data.positive_label` may have put these
    into another order than its `data.label_names`.

    Args:
        data: the settings.
        finished: the run.
        notes: receives a sentence if classes are matched by their number.

    Raises:
        UserError: as `sources.load_for_run`.
    """
    trained, given = finished.data, finished.config["data"].get("label_names")
    names = trained.label_names
    if data.label_names is None and given and names and given != names and sorted(given) == sorted(names):
        data = replace(data, label_names=given)
    splits = sources.load_for_run(data, trained, notes.append)
    return replace(data, type=trained.type, label_names=names, label_threshold=None, positive_label=None), splits


def _target(output: str | None, subject: FinishedRecord | PeftConfig, source: HubRun | None) -> Run:
    """Return the folder of the results, after a check that it can be written: the run's own, or `output`.

    Without `output`, those of an adapter and of a run on the hub go into a new folder below `outputs`. It is not
    created.

    Args:
        output: as requested.
        subject: the run or adapter.
        source: the run's repository; None: it is not on the hub.

    Raises:
        UserError: it is not writable, or `output` is the folder of the adapter or run, or is inside it.
    """
    if isinstance(subject, FinishedRecord) and source is None:
        check_folder(subject.folder / EVALUATIONS, "run")
        return Run(subject.folder, subject.record)
    kind, name = ("peft", subject.folder.resolve().name) if source is None else ("hub", source.repository)
    now = f"{datetime.now():%Y-%m-%d-%H-%M-%S-%f}"
    folder = Path(output or Path("outputs", kind, f"{name.replace('/', '--')}-{now}"))
    if subject.folder.resolve() in (folder.resolve(), *folder.resolve().parents):
        reason = f"is inside the {'adapter' if source is None else 'run'}'s folder, which must not change"
        raise UserError(reason, key="output", value=output, code=Code.EXISTS)
    check_folder(folder, "output")
    return Run(folder, {})


def _refuse_other_data(folder: Path, title: str, data: Data, fingerprints: dict[str, str]) -> None:
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
