"""A finished run, loaded for prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_bench.adapters.peft import files
from lora_bench.backbones.identity import refuse_another
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import scoring_table
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import adapter_folders, altered_notes
from lora_bench.run.inputs import attach
from lora_bench.run.settings import Experiment
from lora_bench.training.precision import resolve_device
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.evaluation.calibration import Calibration

_NOT_FINITE = "The run may have been trained in a precision that this device computes otherwise; try device=cpu."


@dataclass(frozen=True)
class FinishedRun:
    """A run restored from its folder: the backbone with its adapter and head, or with those of its ensemble."""

    finished: FinishedRecord
    experiment: Experiment
    pack: Pack
    notes: Sequence[str] = ()
    """What the user should know of how it was restored."""

    @classmethod
    def load(
        cls,
        folder: str | Path | FinishedRecord,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        model_path: str | None = None,
        tokenizer: str | None = None,
    ) -> FinishedRun:
        """Restore a run.

        Args:
            folder: the run's; or its record, read already.
            device: `cpu`, `cuda`, or `auto`.
            dtype: the precision of products; None: that of its training.
            model_path: where its backbone lies now; None: where the record says.
            tokenizer: where its tokenizer lies now; None: where the record says.

        Raises:
            UserError: there is no finished run, its backbone cannot be had or is another one, or its files are damaged.
        """
        finished = folder if isinstance(folder, FinishedRecord) else FinishedRecord.read(folder)
        finished = finished.relocate(model_path, tokenizer)
        experiment = Experiment.of_finished(finished)
        adapters = adapter_folders(finished.folder, finished.members)
        if not experiment.adapter.trains_backbone:
            for adapter in adapters:
                files.check_ranks(adapter, finished.targets)
        dtype = dtype or getattr(torch, finished.precision)
        pack, sha256 = attach(experiment, resolve_device(device), dtype, finished.targets)
        if sha256 != finished.backbone_sha256:
            raise UserError(
                "the backbone is not the one that this run was trained on",
                key="run",
                value=finished.folder,
                remedy=f"Its weights have hash {sha256[:12]}…, the record names {finished.backbone_sha256[:12]}….",
                code=Code.MISMATCH,
            )

        def refusal(reason: str, remedy: str) -> UserError:
            return UserError(reason, key="run", value=finished.folder, remedy=remedy, code=Code.MISMATCH)

        notes = refuse_another(finished.record["environment"], pack.backbone.tokenizer_identity, refusal)
        altered = altered_notes([(finished.folder, finished.record)])
        for k, adapter in enumerate(adapters):
            files.load(adapter, pack, k)
            finished.check_weights(adapter)
        return cls(finished, experiment, pack.eval(), [*pack.backbone.notes, *notes, *altered])

    @property
    def folder(self) -> Path:
        return self.finished.folder

    @property
    def record(self) -> dict[str, Any]:
        return self.finished.record

    @property
    def calibration(self) -> Calibration | None:
        """Fitted on selection; None where an older run has none."""
        return self.finished.calibration

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
            raise UserError(
                f"row {wrong} has {len(rows[wrong])} texts where this run was trained on {columns}",
                code=Code.INVALID_DATA,
            )
        if not rows:
            return np.empty(0)
        texts = tuple([row[c] for row in rows] for c in range(columns))
        return self.score(Examples(np.arange(len(rows)), texts, None))

    @property
    def member_calibrations(self) -> list[Calibration]:
        """Of each member of an ensemble, fitted for it alone; empty for another run."""
        return self.finished.member_calibrations

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
            raise RunFailedError(
                "some scores are not finite numbers", file=self.folder, remedy=_NOT_FINITE, code=Code.DAMAGED
            )
        return scores
