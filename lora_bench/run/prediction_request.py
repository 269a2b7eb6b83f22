"""The request of `lora-bench predict`, checked as far as possible without the model: no heavy imports."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import ListConfig

from lora_bench.config.build import check_names
from lora_bench.data import labelled, readers
from lora_bench.errors import Code, UserError, require, require_number, require_one_of
from lora_bench.files.paths import check_output, is_same_file, write_output
from lora_bench.records.backfill import MODEL_KEYS, model_paths
from lora_bench.records.run_names import resolve_run
from lora_bench.records.sweep_folder import refuse_own_file
from lora_bench.run.loadable_record import read_loadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from lora_bench.data.examples import Examples
    from lora_bench.data.readers import Table
    from lora_bench.evaluation.calibration import Calibration
    from lora_bench.records.backfill import ModelPaths
    from lora_bench.records.finished_record import FinishedRecord

DEVICES = ("auto", "cpu", "cuda")
BYTES_PER_ROW, BYTES_PER_PROBABILITY = 24, 20
"""Approximate bytes that predictions, and the probability of a class, add to a row of the output."""

_KEYS = (
    *("run", "input", "output", "text_columns", "calibrated", "uncertainty", "probabilities", "threshold"),
    *("model", "device"),
)


@dataclass(frozen=True)
class PredictionRequest:
    """The request of `lora-bench predict`: a run, the rows to label, and the output."""

    run: FinishedRecord
    table: Table
    """The input with all its columns."""
    examples: Examples
    """The texts of the input, in the order of the run's text columns."""
    output: str
    format: str
    threshold: float | None
    """Of two classes the lowest uncalibrated score that gets label 1; None: `DEFAULT_THRESHOLD`."""
    calibrated: bool
    uncertainty: bool
    probabilities: bool
    """Write the probability of each class."""
    device: str
    model_places: ModelPaths
    """The present folders of the run's backbone and tokenizer."""

    @classmethod
    def read(cls, cfg: DictConfig) -> PredictionRequest:
        """Check the command's config, the run's record and the output, and read the input; nothing is written.

        The key `run` is set to the folder of the run that it names.

        Raises:
            UserError: naming the key, file or row that is wrong, for example an output that is the input, or a setting
                that does not apply to the run's task or needs a calibration which the run does not have.
        """
        check_names(cfg, _KEYS)
        check_names(cfg.model, MODEL_KEYS, "model.")
        source, output = str(cfg.input), str(cfg.output)
        file_format = output_format(output)
        for key in ("calibrated", "uncertainty", "probabilities"):
            require(type(cfg[key]) is bool, key, cfg[key], "must be true or false")
        require_one_of("device", str(cfg.device), DEVICES)
        check_threshold(cfg.threshold)
        if is_same_file(source, output):
            raise UserError(
                "is the input file, which is never overwritten",
                key="output",
                value=output,
                remedy="Give another file.",
                code=Code.EXISTS,
            )
        refuse_own_file(output, "output")
        check_output(output, "output")
        run = read_loadable(resolve_run(cfg))
        _refuse_unsuitable(cfg, run)
        columns = _columns(cfg.text_columns, run.text_columns)
        for key in ("calibrated", "uncertainty"):
            if cfg[key] and run.form != "regression":
                _require_calibration(run, key, cfg[key])
        threshold = resolve_threshold(cfg.threshold, run)
        table = readers.read_table(source)
        examples = table.examples(columns, None, labels_may_hide=False)
        labelled.check_texts(table, file_format)
        added = BYTES_PER_ROW + BYTES_PER_PROBABILITY * len(run.label_names or ()) * cfg.probabilities
        size = sum(len(text) for column in examples.texts for text in column) + added * len(examples)
        check_output(output, "output", size)
        flags = cfg.calibrated, cfg.uncertainty, cfg.probabilities, str(cfg.device), model_paths(cfg.model)
        return cls(run, table, examples, output, file_format, threshold, *flags)

    def write(self, predictions: dict[str, Sequence[Any]]) -> None:
        """Write the input's columns followed by the predictions, and note renamed columns and replaced characters.

        An older output is replaced. The notes go to standard error.

        Args:
            predictions: values of each new column, in the order of the rows.

        Raises:
            UserError: the output cannot be written.
        """
        names = labelled.unique_column_names(list(predictions), self.table.names)
        renamed = [f"{name} as {new}" for name, new in names.items() if new != name]
        if renamed:
            _note(f"the input has columns of the same names, so predictions are renamed: {', '.join(renamed)}")
        columns = {names[name]: values for name, values in predictions.items()}
        content, replaced = labelled.encode(self.table, columns, self.format)
        write_output(self.output, content, "output")
        if replaced:
            remedy = "use an output that ends in .csv, .jsonl or .parquet to keep them"
            _note(f"tabs, line breaks and NUL in {replaced} texts were replaced by spaces; {remedy}")


def _refuse_unsuitable(cfg: DictConfig, run: FinishedRecord) -> None:
    """Refuse settings that do not apply to a run that predicts numbers, except a threshold.

    Raises:
        UserError: naming the key.
    """
    if run.form == "regression":
        for key in ("calibrated", "probabilities"):
            require(cfg[key] is False, key, cfg[key], _OF_CLASSES, "Leave it out.", code=Code.UNSUPPORTED)
        reason = "is the spread of an ensemble's members, and this run is a single one that predicts a number"
        require(
            not cfg.uncertainty or run.members > 1,
            "uncertainty",
            cfg.uncertainty,
            reason,
            "Leave it out.",
            code=Code.UNSUPPORTED,
        )


_OF_CLASSES = "is about classes, and this run predicts a number"


def check_threshold(threshold: Any) -> None:
    """Refuse a threshold that is neither null, a number from 0 to 1, nor `selection`."""
    if threshold is None or threshold == "selection":
        return
    is_number = type(threshold) in (int, float)
    require(is_number, "threshold", threshold, "is neither a number nor selection", "Give a number from 0 to 1.")
    require_number("threshold", threshold, 0, 1)


def resolve_threshold(threshold: Any, run: FinishedRecord) -> float | None:
    """Return the threshold that a request names for a run; None if it names none.

    Args:
        threshold: null, a number, or `selection` for the one with the best MCC on the selection split.
        run: the record of the run.

    Raises:
        UserError: the run has not two classes, or needs a calibration that its record lacks.
    """
    if threshold is None:
        return None
    if run.form == "multiclass":
        reason = f"is a threshold between two classes, and this run has {len(run.label_names or ())}"
        remedy = "Leave it out: the most probable class is predicted."
        raise UserError(reason, key="threshold", value=threshold, remedy=remedy, code=Code.UNSUPPORTED)
    if run.form == "regression":
        remedy = "Leave it out."
        raise UserError(_OF_CLASSES, key="threshold", value=threshold, remedy=remedy, code=Code.UNSUPPORTED)
    if threshold == "selection":
        return _require_calibration(run, "threshold", threshold).threshold
    return float(threshold)


def _require_calibration(run: FinishedRecord, key: str, value: Any) -> Calibration:
    """Return the calibration of a run; a `UserError` for this value of a key if its record has none."""
    if run.calibration is None:
        raise UserError(
            "needs a calibration, and the run's record has none", key=key, value=value, code=Code.UNSUPPORTED
        )
    return run.calibration


def output_format(output: str) -> str:
    """Return the format that an output's ending names, such as `.csv`; a stream without an ending gets `.tsv`.

    Raises:
        UserError: the ending is unknown or missing.
    """
    file_format = readers.file_format(output)
    if file_format is None:
        reason = f"is none of {', '.join(labelled.FORMATS)}"
        raise UserError(
            reason, key="output", value=output, remedy="Or use - for standard output.", code=Code.UNKNOWN_CHOICE
        )
    return file_format


def _columns(requested: Any, trained: list[str]) -> list[str]:
    """Return the text columns to read: the requested ones, by default those that the run was trained on.

    Raises:
        UserError: their number differs from that of the run's. Whether the input has them is not checked.
    """
    if requested is None:
        return trained
    columns = [str(name) for name in requested] if isinstance(requested, ListConfig) else [str(requested)]
    if len(columns) != len(trained):
        reason = f"names {len(columns)} columns, and the run was trained on {len(trained)}"
        raise UserError(reason, key="text_columns", value=columns, code=Code.MISMATCH)
    return columns


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
