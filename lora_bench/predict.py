"""A finished run at work: restored from its folder, labelling new pairs; and the command `lora-bench predict`."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_bench import record
from lora_bench.adapters import peft_format
from lora_bench.checks import need, need_number
from lora_bench.data import files
from lora_bench.data.examples import Examples
from lora_bench.data.pairs import scoring_table
from lora_bench.errors import RunFailedError, UserError
from lora_bench.evaluation.calibration import Calibration, calibrated
from lora_bench.evaluation.ensemble import spread
from lora_bench.experiment import Experiment, attach
from lora_bench.prompted import is_prompted
from lora_bench.recorded import restored
from lora_bench.tasks import refuse_several
from lora_bench.training.loop import predict
from lora_bench.training.precision import resolve_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from omegaconf import DictConfig

    from lora_bench.adapters.pack import Pack

_NOT_FINITE = "The run may have been trained in a precision that this device computes otherwise; try device=cpu."
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OUTPUTS = (".tsv", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class FinishedRun:
    """A run restored from its folder: the backbone with its adapter and head, or with those of its ensemble."""

    folder: Path
    record: dict[str, Any]
    experiment: Experiment
    pack: Pack

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> FinishedRun:
        """Restore a run.

        Args:
            folder: the run's.
            device: `cpu`, `cuda`, or `auto`.
            dtype: the precision of products; None: that of its training.

        Raises:
            UserError: there is no finished run, its backbone cannot be had or is another one, or its files are damaged.
        """
        path = Path(folder)
        found = record.read(path)
        if is_prompted(found):
            raise UserError("is a run of lora-bench prompt, which leaves no model", key="run", value=folder)
        if found["status"] != "done":
            raise UserError(f"the run is {found['status']}, not done", key="run", value=folder)
        refuse_several(folder, found["config"], "run")
        experiment = Experiment.build(restored(path, found))
        precision = found["environment"].get("precision")
        need(
            isinstance(precision, str) and precision in PRECISIONS,
            "run",
            folder,
            f"its record names no precision of products: {precision!r}",
        )
        dtype = dtype or PRECISIONS[precision]
        pack, sha256 = attach(experiment, resolve_device(device), dtype, found["targets"])
        if sha256 != found["environment"]["backbone_sha256"]:
            recorded = str(found["environment"]["backbone_sha256"])
            raise UserError(
                "the backbone is not the one that this run was trained on",
                key="run",
                value=folder,
                remedy=f"Its weights have hash {sha256[:12]}…, the record names {recorded[:12]}….",
            )
        for k, adapter in enumerate(record.adapter_folders(path, pack.size)):
            peft_format.load(adapter, pack, k)
        return cls(path, found, experiment, pack.eval())

    @property
    def calibration(self) -> Calibration | None:
        """Fitted on selection; None where an older run has none."""
        return Calibration.read(self.record["selection"])

    def predict(self, pairs: Sequence[tuple[str, ...] | str]) -> NDArray[np.float64]:
        """P(label 1) of each pair, (N,).

        Args:
            pairs: pairs of texts, or single texts where the run was trained on single sentences.

        Raises:
            UserError: a row does not have as many texts as the run was trained on.
        """
        columns = len(self.experiment.data.text_columns)
        rows = [(row,) if isinstance(row, str) else tuple(row) for row in pairs]
        wrong = next((i for i, row in enumerate(rows) if len(row) != columns), None)
        if wrong is not None:
            raise UserError(f"row {wrong} has {len(rows[wrong])} texts where this run was trained on {columns}")
        if not rows:
            return np.empty(0)
        texts = tuple([row[c] for row in rows] for c in range(columns))
        return self.score(Examples(np.arange(len(rows)), texts, None))

    @property
    def member_calibrations(self) -> list[Calibration]:
        """Of each member of an ensemble, fitted for it alone; empty for another run."""
        found = map(Calibration.read, self.record["selection"].get("members", []))
        return [calibration for calibration in found if calibration]

    def score(self, examples: Examples, *, cached: bool = False) -> NDArray[np.float64]:
        """P(label 1) of each example, (N,): an ensemble's is the mean over its members."""
        return self.member_scores(examples, cached=cached).mean(axis=0)  # type: ignore[no-any-return]

    def member_scores(self, examples: Examples, *, cached: bool = False) -> NDArray[np.float64]:
        """P(label 1) of each example from each member, (M, N); M is 1 but for an ensemble."""
        data, trainer = self.experiment.data, self.experiment.trainer  # column names are part of what T5 reads
        both = trainer.score_both_orders
        table = scoring_table(examples, data, self.pack.backbone, both_orders=both, cached=cached)
        scores = predict(self.pack, table, trainer.eval_batch_size)
        if not np.isfinite(scores).all():  # NaN would be labelled 0
            raise RunFailedError("some scores are not finite numbers", file=self.folder, remedy=_NOT_FINITE)
        return scores


def run_predict(cfg: DictConfig) -> None:
    """`lora-bench predict run=DIR input=pairs.tsv output=labelled.tsv`."""
    output = str(cfg.output)
    if output != "-" and Path(output).suffix not in OUTPUTS:
        raise UserError(
            f"is none of {', '.join(OUTPUTS)}", key="output", value=output, remedy="Or - for standard output."
        )
    for key in ("calibrated", "uncertainty"):
        need(type(cfg[key]) is bool, key, cfg[key], "must be true or false")
    chosen = cfg.threshold == "selection"
    if not chosen:
        number = type(cfg.threshold) in (int, float)
        need(number, "threshold", cfg.threshold, "is neither a number nor selection", "Give one from 0 to 1.")
        need_number("threshold", cfg.threshold, 0, 1)
    source = str(cfg.input)
    run = FinishedRun.load(cfg.run, device=cfg.device)
    data = run.experiment.data
    columns = list(cfg.text_columns) if cfg.text_columns else list(data.text_columns)
    if len(columns) != len(data.text_columns):
        reason = f"names {len(columns)} where the run was trained on {len(data.text_columns)}"
        raise UserError(reason, key="text_columns", value=columns)
    examples = files.read(source, columns, None)
    of_members = run.member_scores(examples)
    scores = of_members.mean(axis=0)
    honest, threshold = scores, cfg.threshold
    if asked := [key for key in ("calibrated", "uncertainty") if cfg[key]] + ["threshold"] * chosen:
        if run.calibration is None:
            raise UserError("needs a calibration, and the run's record has none", key=asked[0], value=cfg[asked[0]])
        honest = calibrated(scores, run.calibration.temperature)
        threshold = run.calibration.threshold if chosen else threshold
    labels = (scores >= threshold).astype(int).tolist()
    found = dict(zip(columns, examples.texts, strict=True))
    found |= {"label": labels, "score": (honest if cfg.calibrated else scores).tolist()}
    if cfg.uncertainty:
        found["calibrated"] = honest.tolist()
        found |= {"spread": spread(of_members).tolist()} if len(of_members) > 1 else {}
    _write(output, [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)])


def _write(output: str, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format that the file's ending names; TSV to standard output."""
    kind = ".tsv" if output == "-" else Path(output).suffix
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    elif kind == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        text = io.StringIO()
        if kind == ".csv":
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            text.write("\t".join(rows[0]) + "\n")
            text.writelines("\t".join(_flat(value) for value in row.values()) + "\n" for row in rows)
        content = text.getvalue().encode()
    if output == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        Path(output).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", key="output", value=output) from None


def _flat(value: object) -> str:
    """A TSV cell: tabs and line breaks, which a CSV or JSON input may hold, become spaces."""
    return " ".join(str(value).split("\t")).replace("\r", " ").replace("\n", " ")
