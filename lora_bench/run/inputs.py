"""What the members of a pack share: backbone, tokens, splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.data import sources
from lora_bench.data.augmentation import training_tables
from lora_bench.data.tokenization import TokenTable, scoring_table
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.stress_splits import describe_stress_splits
from lora_bench.training.memory import keep_freed_memory
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device, resolve_precision
from lora_bench.training.task_mixture import TaskData, TaskMixture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.backbones.base import Backbone
    from lora_bench.config import schema
    from lora_bench.data.examples import Examples
    from lora_bench.run.packed_run import PackedRun
    from lora_bench.run.settings import Experiment

SEEDS_APART = 1_000_000
"""Between the seeds of an ensemble's members: ensembles of neighbouring seeds have no member in common."""


@dataclass(frozen=True)
class Task:
    """The pairs of one task as the backbone's tokens."""

    data: schema.Data
    tables: dict[str, TokenTable]
    """`train`, `selection`, and every split to report."""
    swapped: TokenTable | None
    """The training pairs once more, exchanged, perturbed or as they are, where the objective asks for it."""
    described: dict[str, Any]
    """What records say of the data."""
    splits: dict[str, Examples]
    """The texts, where reported splits are scored on more than themselves; otherwise empty."""

    @property
    def reported(self) -> list[str]:
        """The splits that are scored once, at the end."""
        return [name for name in self.tables if name not in ("train", "selection")]

    @property
    def pairs(self) -> TaskData:
        """What training looks at."""
        return TaskData(self.tables["train"], self.tables["selection"], self.swapped)

    def with_tables(self, tables: Mapping[str, TokenTable]) -> Task:
        """The same with other tables for some: the same pairs, with more known of them."""
        found = self.tables | dict(tables)
        if self.swapped is self.tables["train"]:
            found["swapped"] = found["train"]
        if "exchanged" in found:
            found["selection"] = replace(found["selection"], exchanged=found.pop("exchanged"))
        if found["train"].exchanged is not None and "swapped" in found:
            found["train"] = replace(found["train"], exchanged=found.pop("swapped"))
        swapped = found.pop("swapped", self.swapped)
        return replace(self, tables=found, swapped=swapped)

    @classmethod
    def read(
        cls,
        data: schema.Data,
        splits: dict[str, Examples],
        described: dict[str, Any],
        backbone: Backbone,
        trainer: schema.Trainer,
        head: int,
    ) -> Task:
        """What `load_splits` gave, as tokens that one of a member's heads answers."""
        reader = backbone.for_task(data.task)
        train, swapped = training_tables(data, splits["train"], reader, trainer.objective, head)
        others = {name: split for name, split in splits.items() if name != "train"}
        tables = {"train": train} | {
            name: scoring_table(split, data, reader, both_orders=trainer.score_both_orders, head=head)
            for name, split in others.items()
        }
        described["truncated"] = {name: table.truncated for name, table in tables.items()}
        asked = data.unseen or data.perturb is not None
        return cls(data, tables, swapped, described, splits if asked else {})


@dataclass(frozen=True)
class SharedInputs:
    """What runs have in common that may be packed: the backbone, and the pairs as its tokens."""

    backbone: Backbone
    backbone_sha256: str
    """Of its weights as they were loaded."""
    tasks: dict[str, Task]
    """By name; one with an empty name where runs learn one task."""

    @property
    def described(self) -> dict[str, Any]:
        """What records say of the data; of several tasks, splits and warnings by task."""
        if list(self.tasks) == [""]:
            return self.tasks[""].described
        found: dict[str, Any] = {}
        for name, task in self.tasks.items():
            for key, value in task.described.items():
                if isinstance(value, dict):
                    found.setdefault(key, {}).update({f"{name}/{split}": each for split, each in value.items()})
                elif isinstance(value, list):
                    found.setdefault(key, []).extend(f"{name}: {each}" for each in value)
                else:
                    found.setdefault(key, value)
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest training pair."""
        return max(int(task.tables["train"].lengths.max()) for task in self.tasks.values())

    def mixtures(self, runs: Sequence[PackedRun]) -> list[TaskMixture]:
        """Return what the members of these runs learn: all the same tasks, or each a task of its own."""
        data = {name: task.pairs for name, task in self.tasks.items()}
        if runs[0].experiment.own_adapters:
            return [TaskMixture([run.numbers[i] for run in runs], {name: data[name]}) for i, name in enumerate(data)]
        return [TaskMixture([k for run in runs for k in run.numbers], data, runs[0].experiment.data.temperature)]

    @classmethod
    def load(cls, experiment: Experiment) -> SharedInputs:
        """What the experiment shares with others.

        Raises:
            UserError: data or backbone cannot be had, or do not fit one another.
        """
        trainer = experiment.trainer
        keep_freed_memory()
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        loaded = {name: load_splits(each.data) for name, each in experiment.each.items()}
        device = resolve_device(trainer.device)
        backbone, sha256 = load_backbone(experiment, device, resolve_precision(trainer.precision, device))
        _refuse_unlike_labels(experiment, backbone)
        tasks = {
            name: Task.read(each.data, *loaded[name], backbone, trainer, 0 if experiment.own_adapters else i)
            for i, (name, each) in enumerate(experiment.each.items())
        }
        return cls(backbone, sha256, tasks)


def _refuse_unlike_labels(experiment: Experiment, backbone: Backbone) -> None:
    """Tasks share what answers them where a backbone has no head: then their labels must be the same."""
    names = {name: data.label_names for name, data in experiment.tasks.items()}
    if backbone.head_modules or len(set(map(tuple, names.values()))) < 2:
        return
    told = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in names.items())
    reason = f"have different labels ({told}), and this model answers all of them in the same two words"
    remedy = "Take model.form=encoder, which has a head for each."
    raise UserError(reason, key="data.tasks", value=list(names), remedy=remedy, code=Code.UNSUPPORTED)


def load_splits(data: schema.Data) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Train, selection and every labelled split to report, and what the record says of them.

    Raises:
        UserError: the source has no train split, or no labelled split to report.
    """
    found = sources.load(data)
    if "train" not in found:
        raise UserError(
            "there is no train split",
            key="data",
            remedy=f"Found: {', '.join(found)}. Training needs a train file with labels.",
            code=Code.EMPTY,
        )
    reported = sources.reported(found) if data.report else {}
    if data.report and not reported:
        raise UserError(
            "there is no labelled split to report on",
            key="data",
            remedy="Add a validation file: scores on the training pairs say nothing.",
            code=Code.EMPTY,
        )
    train, selection = sources.carve(found["train"], data)
    splits = {"train": train, "selection": selection, **reported}
    return splits, {**sources.describe(data, splits), **describe_stress_splits(data, reported, [train, selection])}


def load_backbone(experiment: Experiment, device: torch.device, dtype: torch.dtype) -> tuple[Backbone, str]:
    """The frozen backbone on its device, and its hash as it was loaded."""
    backbone = load(experiment.model, load_tokenizer(experiment.model), task=experiment.data.task, device=device)
    for each in experiment.each.values():
        backbone.need_room(each.data.max_length)
    check_padding(backbone)
    sha256 = backbone.hash()
    backbone.to(device, dtype, trained=experiment.adapter.trains_backbone)
    return backbone, sha256


def attach(
    experiment: Experiment,
    device: torch.device,
    dtype: torch.dtype,
    saved_ranks: Mapping[str, int | list[int]] | None = None,
) -> tuple[Pack, str]:
    """What the run trains on its backbone, and the backbone's hash as it was loaded.

    Args:
        saved_ranks: rank by module (of each member) where a saved adapter's tensors are about to be put in.
    """
    backbone, sha256 = load_backbone(experiment, device, dtype)
    return Pack(backbone, experiment.members(saved_ranks)), sha256
