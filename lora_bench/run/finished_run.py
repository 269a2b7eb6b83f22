"""A finished run, loaded for prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf

from lora_bench.adapters.peft import files
from lora_bench.backbones.identity import refuse_other_tokenizer
from lora_bench.config import build
from lora_bench.data import sources
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import scoring_table
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import adapter_folders, altered_notes
from lora_bench.records.run_names import find_run
from lora_bench.run.inputs import attach
from lora_bench.run.loadable_record import read_loadable
from lora_bench.run.settings import Experiment
from lora_bench.training.precision import resolve_device
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.evaluation.calibration import Calibration

_NOT_FINITE = "The run may have been trained in a precision that this device computes differently; try device=cpu."


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, loaded for prediction: the backbone with the adapter and head of each member."""

    finished: FinishedRecord
    experiment: Experiment
    pack: Pack
    notes: Sequence[str] = ()
    """Notes for the user on how it was loaded."""

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
        """Load a finished run, in evaluation mode.

        A record that was edited, and files of a tokenizer that changed without effect on the token ids, are only noted.

        Args:
            folder: of the run, or its name, the first digits of its id, or `last`; or its record.
            device: `cpu`, `cuda`, or `auto`.
            dtype: of the matrix products; None: that of its training.
            model_path: the present folder of its backbone; None: as in the record.
            tokenizer: the present folder of its tokenizer; None: as in the record.

        Raises:
            UserError: the folder has no finished run, its backbone cannot be loaded or has other weights, its tokenizer
                gives other token ids, or its files are damaged.
        """
        finished = folder
        if not isinstance(finished, FinishedRecord):
            finished = read_loadable(find_run(finished, "run", finished=True))
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
                remedy=f"The weights have hash {sha256[:12]}…, the record names {finished.backbone_sha256[:12]}….",
                code=Code.MISMATCH,
            )

        def refusal(reason: str, remedy: str) -> UserError:
            return UserError(reason, key="run", value=finished.folder, remedy=remedy, code=Code.MISMATCH)

        notes = refuse_other_tokenizer(finished.record["environment"], pack.backbone.tokenizer_identity, refusal)
        altered = altered_notes([(finished.folder, finished.record)])
        for k, adapter in enumerate(adapters):
            files.load(adapter, pack, k)
            finished.check_weights(adapter)
        return cls(finished, experiment, pack.eval(), [*pack.backbone.notes, *notes, *altered])

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.finished.folder

    @property
    def record(self) -> dict[str, Any]:
        """The content of the run's `run.json`."""
        return self.finished.record

    @property
    def calibration(self) -> Calibration | None:
        """Temperature and threshold, fitted on the selection split; None for a regression or an older run without."""
        return self.finished.calibration

    @property
    def form(self) -> str:
        """The form of its task: a key of `SHOWN_METRICS`."""
        return self.finished.form

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes 0, 1, …; None if the run predicts a number."""
        return self.finished.label_names

    def predict(self, pairs: Sequence[tuple[str, ...] | str]) -> NDArray[np.float64]:
        """Return the scores of each row, not calibrated; empty without rows.

        They are (N,) P(label 1) of two classes, (N, C) the probability of each of three or more classes, in the order
        of `label_names`, or (N,) numbers of a regression.

        Args:
            pairs: pairs of texts; single texts if the run was trained on single sentences.

        Raises:
            UserError: a row has another number of texts than the run was trained on.
            RunFailedError: a score is not finite.
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
            return np.empty((0, len(self.label_names or ())) if self.form == "multiclass" else 0)
        texts = tuple([row[c] for row in rows] for c in range(columns))
        return self.score(Examples(np.arange(len(rows)), texts, None))

    @property
    def member_calibrations(self) -> list[Calibration]:
        """The calibration of each member of an ensemble, fitted on its own scores; empty for a run without one."""
        return self.finished.member_calibrations

    def reload_splits(self) -> tuple[Examples, Examples]:
        """Return the run's train and selection splits, made from its data again.

        Raises:
            UserError: the data cannot be read, have changed since, or the record has no fingerprint of them.
        """
        data = build.build_data(OmegaConf.create(self.finished.config["data"]))
        splits = train, selection = sources.split_selection(sources.load(data)[1]["train"], data)
        recorded = self.record["data"].get("fingerprint")
        for name, split in (("train", train), ("selection", selection)):
            if not isinstance(recorded, dict) or split.fingerprint() != recorded.get(name):
                raise UserError(
                    f"the {name} split of the run's data has changed since its training", code=Code.MISMATCH
                )
        return splits

    def score(self, examples: Examples, *, cached: bool = False) -> NDArray[np.float64]:
        """Return the scores of each example as `predict` does; an ensemble's are the mean over its members.

        Args:
            examples: with the text columns of the run.
            cached: whether the token cache on disk is used.

        Raises:
            RunFailedError: a score is not finite.
        """
        return self.member_scores(examples, cached=cached).mean(axis=0)  # type: ignore[no-any-return]

    def member_scores(self, examples: Examples, *, cached: bool = False) -> NDArray[np.float64]:
        """Return the scores of each example by each member: (M, N) or (M, N, C), with M = 1 without an ensemble.

        Raises:
            RunFailedError: a score is not finite.
        """
        data, trainer = self.experiment.data, self.experiment.trainer  # column names are part of T5's input
        both = trainer.scores_both_orders_of(data)
        table = scoring_table(examples, data, self.pack.backbone, both_orders=both, cached=cached)
        scores = predict(self.pack, table, trainer.eval_batch_size)
        if not np.isfinite(scores).all():  # NaN would silently get label 0
            raise RunFailedError(
                "some scores are not finite numbers", file=self.folder, remedy=_NOT_FINITE, code=Code.DAMAGED
            )
        return scores
