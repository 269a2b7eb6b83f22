"""Warm start (`adapter.init_from=RUN`): initialisation from the adapter, and possibly the head, of a finished run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.peft import files
from lora_bench.backbones.identity import refuse_other_tokenizer
from lora_bench.errors import Code, UserError
from lora_bench.records import run_folder
from lora_bench.run.loadable_record import read_loadable
from lora_bench.run.settings import Experiment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.records.finished_record import FinishedRecord
    from lora_bench.run.inputs import SharedInputs


@dataclass(frozen=True)
class WarmStart:
    """A finished run that a new run is initialised from."""

    finished: FinishedRecord
    source: str
    """Its folder or its repository, as in `adapter.init_from`."""
    head_difference: str | None
    """How the head there differs, as a clause; None: the head is initialised too."""

    @property
    def folder(self) -> Path:
        """The finished run's folder."""
        return self.finished.folder

    @property
    def ranks(self) -> dict[str, int | list[int]]:
        """Rank by module; a list with the rank of each member if the members of an ensemble differ in it."""
        return self.finished.targets

    @classmethod
    def of(cls, experiment: Experiment, inputs: SharedInputs) -> WarmStart | None:
        """Return the warm start that the settings ask for; None without `adapter.init_from`. No tensor is read.

        Raises:
            UserError: there is no such finished run, or its backbone, tokenizer, method, ranks or members differ from
                this run's.
        """
        folder = experiment.adapter.init_from
        if folder is None:
            return None
        finished = read_loadable(folder, "adapter.init_from")

        def refusal(reason: str, remedy: str) -> UserError:
            return UserError(reason, key="adapter.init_from", value=folder, remedy=remedy, code=Code.MISMATCH)

        source = Experiment.of_finished(finished)
        for key, value, source_value in _shared_settings(experiment, source):
            if value != source_value:
                raise refusal(f"has {key}={source_value} where this run has {value}", f"Set {key}={source_value}.")
        sha256, recorded = inputs.backbone_sha256, finished.backbone_sha256
        if sha256 != recorded:
            remedy = f"The backbone of this run has hash {sha256[:12]}…, the record names {recorded[:12]}…."
            raise refusal("was trained on another backbone", remedy)
        refuse_other_tokenizer(finished.record["environment"], inputs.backbone.tokenizer_identity, refusal)
        return cls(finished, folder, _head_difference(experiment, source, inputs))

    def load_into(self, pack: Pack, members: Sequence[int]) -> None:
        """Copy the finished run's tensors into these members, which have its ranks; a head that differs stays.

        Raises:
            UserError: a file is damaged, or its tensors do not fit.
        """
        for k, folder in zip(members, run_folder.adapter_folders(self.folder, len(members)), strict=True):
            files.load(folder, pack, k, with_head=self.head_difference is None)
            self.finished.check_weights(folder)

    def note(self) -> str:
        """Return a note for the user on what is initialised."""
        if self.head_difference is None:
            return f"adapter and head are initialised from {self.source}."
        return f"the adapter is initialised from {self.source}; the head is not, as {self.head_difference}."


def _head_difference(experiment: Experiment, source: Experiment, inputs: SharedInputs) -> str | None:
    """Return how the source's head differs from this run's, as a clause; None if both learn one task in one form."""
    names = source.data.label_names
    labels = f"its labels there are {', '.join(names[:20]) if names else 'numbers'}"
    if experiment.tasks:
        return labels
    (task,) = inputs.tasks.values()
    if (source.data.type, names) != (task.data.type, task.data.label_names):
        return labels
    signed = source.head.has_signed_differences(source.data)
    if experiment.head.pair_features is False or signed == experiment.head.has_signed_differences(task.data):
        return None
    return f"its pair features there have {'signed' if signed else 'absolute'} differences"


def _shared_settings(experiment: Experiment, source: Experiment) -> list[tuple[str, Any, Any]]:
    """Return the settings that both runs must share for saved tensors to fit: key, value, and the source's value."""
    names = [
        field.name for field in fields(experiment.adapter) if field.name not in experiment.adapter.training_settings
    ]
    return [
        *(_values(experiment.model, source.model, "model", name) for name in ("family", "form")),
        *(_values(experiment.adapter, source.adapter, "adapter", name) for name in ("method", *names)),
        _values(experiment.head, source.head, "head", "pair_features"),
        _values(experiment.ensemble, source.ensemble, "ensemble", "members"),
    ]


def _values(settings: object, source: object, group: str, name: str) -> tuple[str, Any, Any]:
    """Return the key of a setting and its value in both runs; None for a run that does not have it."""
    return f"{group}.{name}", getattr(settings, name, None), getattr(source, name, None)
