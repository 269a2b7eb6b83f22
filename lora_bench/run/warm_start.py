"""`adapter.init_from=RUN`: the adapter begins as that of a finished run, and the head where labels are the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.peft import files
from lora_bench.backbones.identity import refuse_another
from lora_bench.errors import Code, UserError
from lora_bench.records import run_folder
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.run.settings import Experiment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.run.inputs import SharedInputs


@dataclass(frozen=True)
class Source:
    """A finished run that another begins from."""

    finished: FinishedRecord
    label_names: list[str]
    with_head: bool
    """Whether its head answers with the labels of the run that begins."""

    @property
    def folder(self) -> Path:
        return self.finished.folder

    @property
    def ranks(self) -> dict[str, int | list[int]]:
        """By module; of each member where an ensemble's differ."""
        return self.finished.targets

    @classmethod
    def of(cls, experiment: Experiment, common: SharedInputs) -> Source | None:
        """What the experiment asks to begin from; None where it begins anew.

        Raises:
            UserError: there is no such run, it is not done, or its backbone, method, ranks or members are others.
        """
        asked = experiment.adapter.init_from
        if asked is None:
            return None
        source = FinishedRecord.read(asked, "adapter.init_from")

        def need(holds: bool, reason: str, remedy: str = "") -> None:
            if not holds:
                raise UserError(reason, key="adapter.init_from", value=asked, remedy=remedy, code=Code.MISMATCH)

        theirs = Experiment.of_finished(source)
        for name, own, other in _settings(experiment, theirs):
            need(own == other, f"has {name}={other} where this run has {own}", f"Give {name}={other}.")
        here, recorded = common.backbone_sha256, source.backbone_sha256
        remedy = f"The weights here have hash {here[:12]}…, its record names {recorded[:12]}…."
        need(here == recorded, "was trained on another backbone", remedy)

        def refusal(reason: str, remedy: str) -> UserError:
            return UserError(reason, key="adapter.init_from", value=asked, remedy=remedy, code=Code.MISMATCH)

        refuse_another(source.record["environment"], common.backbone.tokenizer_identity, refusal)
        fits = not experiment.tasks and theirs.data.label_names == experiment.data.label_names
        return cls(source, theirs.data.label_names, fits)

    def put_into(self, pack: Pack, members: Sequence[int]) -> None:
        """Give these members, made with the source's ranks, its tensors; a head that does not fit stays as drawn.

        Raises:
            UserError: a file is damaged, or tensors do not fit.
        """
        for k, folder in zip(members, run_folder.adapter_folders(self.folder, len(members)), strict=True):
            heads = pack.head_parameters(k)
            drawn = {name: p.detach().clone() for name, p in heads.items()}
            files.load(folder, pack, k)
            self.finished.check_weights(folder)
            if not self.with_head:
                for name, p in heads.items():
                    p.data.copy_(drawn[name])

    def told(self) -> str:
        """What the user should know of it."""
        if self.with_head:
            return f"adapter and head begin as those of {self.folder}."
        names = " and ".join(self.label_names)
        return f"the adapter begins as that of {self.folder}, whose head answers {names}: the head begins anew."


def _settings(mine: Experiment, theirs: Experiment) -> list[tuple[str, Any, Any]]:
    """What must be equal, with its values here and there: all that the saved tensors mean something by."""
    found = [
        (f"model.{name}", getattr(mine.model, name, None), getattr(theirs.model, name, None)) for name in _OF_MODEL
    ]
    found.append(("adapter.method", mine.adapter.method, theirs.adapter.method))
    kept = [each.name for each in fields(mine.adapter) if each.name not in mine.adapter.training_settings]
    found += [(f"adapter.{name}", getattr(mine.adapter, name), getattr(theirs.adapter, name, None)) for name in kept]
    found.append(("head.pair_features", mine.head.pair_features, theirs.head.pair_features))
    return [*found, ("ensemble.members", mine.ensemble.members, theirs.ensemble.members)]


_OF_MODEL = ("family", "form")
