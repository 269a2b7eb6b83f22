"""The settings of a run, typed and checked, and what runs have in common that train on one backbone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from lora_bench import config
from lora_bench.adapters import Adapter, method_class
from lora_bench.adapters.pack import Member, Pack
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.besides import describe, perturbations
from lora_bench.checks import need
from lora_bench.data import sources
from lora_bench.data.augment import augmentations, training_tables
from lora_bench.data.pairs import TokenTable, scoring_table
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.metrics import check_metrics
from lora_bench.tracking.choices import build_trackers
from lora_bench.training.course import Course, Pairs
from lora_bench.training.memory import keep_freed_memory
from lora_bench.training.objective import check_objective
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from lora_bench.backbones.base import Backbone
    from lora_bench.data.examples import Examples
    from lora_bench.finished import FinishedRecord
    from lora_bench.tracking.base import Tracker

_GROUPS = ("model", "adapter", "data", "optimizer", "trainer", "metric", "pack", "ensemble", "tracking")
_KEYS = (*_GROUPS, "tasks", "seed", "resume", "dry_run")

SEEDS_APART = 1_000_000
"""Between the seeds of an ensemble's members: ensembles of neighbouring seeds have no member in common."""


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, typed and checked."""

    model: config.Model
    adapter: Adapter
    data: config.Data
    optimizer: config.Optimizer
    trainer: config.Trainer
    pack: config.Packing
    ensemble: config.Ensemble
    metrics: dict[str, config.Metric]
    trackers: dict[str, Tracker]
    seed: int
    tasks: dict[str, config.Data] = field(default_factory=dict)
    """By name, where the run learns several; `data` is then the first's."""

    @property
    def own_adapters(self) -> bool:
        """Whether each of several tasks has an adapter of its own."""
        return bool(self.tasks) and self.data.share == "backbone"

    @property
    def size(self) -> int:
        """Members that the run trains: one, one for each task, or those of its ensemble."""
        return len(self.tasks) if self.own_adapters else self.ensemble.size

    @property
    def each(self) -> dict[str, Experiment]:
        """By task, with its data; by an empty name itself, where there is one task."""
        return {name: replace(self, data=data, tasks={}) for name, data in self.tasks.items()} or {"": self}

    @property
    def identity(self) -> str:
        """Equal for runs that would be the same: all that decides what is learned, and not how it is computed."""
        learned = (self.model, self.adapter, self.data, self.optimizer, self.trainer, self.ensemble)
        return repr((*learned, self.tasks, self.metrics, self.seed))

    def members(self, saved_ranks: Mapping[str, int | list[int]] | None = None) -> list[Member]:
        """What the run trains: one adapter, one for each task, or those of its ensemble.

        Of an ensemble the first is what the run would train without one, the others what it would train with the seeds
        `seed` + 1,000,000, `seed` + 2,000,000, … in whatever they differ.

        Args:
            saved_ranks: by module, where saved tensors are about to be put in; a list has one for each member.
        """
        found = []
        heads = 1 if self.own_adapters else max(1, len(self.tasks))
        for i in range(self.size):
            apart = 0 if self.own_adapters else i * SEEDS_APART
            seeds = dict.fromkeys(self.ensemble.vary, self.seed + apart)
            ranks = None
            if saved_ranks is not None:
                ranks = {name: rank[i] if isinstance(rank, list) else rank for name, rank in saved_ranks.items()}
            found.append(Member(self.adapter, self.seed, ranks, seeds, heads))
        return found

    @classmethod
    def build(cls, cfg: DictConfig) -> Experiment:
        """From the composed config; refuses what is out of range, naming the key."""
        config.check_top(cfg, _KEYS)
        need("method" in cfg.adapter, "adapter", None, "is missing", "It cannot be left out.", code=Code.MISSING)
        metrics = config.build_metrics(cfg.metric)
        check_metrics(metrics)
        made = cls(
            data=config.build_data(cfg.data),  # first: T5 takes its label words from it
            model=config.build_model(cfg.model),
            adapter=config.build(method_class(str(cfg.adapter.method)), cfg.adapter, "adapter"),
            optimizer=config.build(config.Optimizer, cfg.optimizer, "optimizer"),
            trainer=config.build(config.Trainer, cfg.trainer, "trainer"),
            pack=config.build(config.Packing, cfg.pack, "pack"),
            ensemble=config.build(config.Ensemble, cfg.ensemble, "ensemble"),
            metrics=metrics,
            trackers=build_trackers(cfg.get("tracking")),
            seed=cfg.seed,
            tasks={str(name): config.build_data(node) for name, node in (cfg.get("tasks") or {}).items()},
        )
        _check_ensemble(made.ensemble, made.adapter, made.pack)
        _check_tasks(made)
        drops_out = made.adapter.trains_backbone or bool(getattr(made.adapter, "dropout", 0))
        for each in made.each.values():
            check_objective(each.trainer, each.data.text_columns, drops_out, each.adapter.matching is True)
            perturbations(each.data)
            augmentations(each.data, each.trainer.objective)
        return made

    @classmethod
    def of_finished(cls, finished: FinishedRecord) -> Experiment:
        """Build the settings of a finished run; refuses what is out of range, naming the record and the key."""
        try:
            return cls.build(OmegaConf.create(finished.config))
        except UserError as error:
            reason = f"is damaged: {str(error).removesuffix('.')}"
            raise UserError(reason, file=finished.folder / "run.json", code=Code.DAMAGED) from None


def _check_ensemble(ensemble: config.Ensemble, adapter: Adapter, packing: config.Packing) -> None:
    """Refuse one whose members would all be the same, or have no backbone to share."""
    if ensemble.members is None:
        return
    if adapter.trains_backbone:
        reason = f"{adapter.method} trains the backbone itself, which the members of an ensemble share"
        raise UserError(
            reason,
            key="ensemble.members",
            value=ensemble.members,
            remedy="Take an adapter such as lora.",
            code=Code.UNSUPPORTED,
        )
    if packing.halving:
        reason = "stops jobs by their selection MCC, which the members of an ensemble do not have in common"
        raise UserError(
            reason,
            key="pack.halving",
            value="true",
            remedy="Leave it out with ensemble.members.",
            code=Code.CONFLICT,
        )
    if ensemble.vary == ["dropout"] and not getattr(adapter, "dropout", 0):
        remedy = "Give adapter.dropout a value above 0, or let init or order vary too."
        reason = "without dropout the members would all be the same"
        raise UserError(reason, key="ensemble.vary", value=ensemble.vary, remedy=remedy, code=Code.CONFLICT)


def _check_tasks(made: Experiment) -> None:
    """Refuse tasks that cannot be learned together as asked."""
    data, names = made.data, list(made.tasks)
    if not names:
        said = data.tasks is not None  # of one task of a finished run
        need(
            said or data.share == "adapter",
            "data.share",
            data.share,
            "needs data.tasks: there is nothing to share",
            code=Code.CONFLICT,
        )
        reason = "says how often each of several tasks has its turn, and there is one"
        remedy = "Give data.tasks."
        need(said or data.temperature == 1, "data.temperature", data.temperature, reason, remedy, code=Code.CONFLICT)
        return
    reason = "has members that learn one task, so it cannot be one of the runs of several"
    remedy = "Leave out ensemble.members or data.tasks."
    members = made.ensemble.members
    need(members is None, "ensemble.members", members, reason, remedy, code=Code.CONFLICT)
    reason = "compares the texts beside one head, and a shared adapter has a head for each task"
    remedy = "Take adapter.matching=false or data.share=backbone."
    asked = made.adapter.matching
    matching = "null" if asked is None else "true"
    need(made.own_adapters or asked is False, "adapter.matching", matching, reason, remedy, code=Code.CONFLICT)
    if made.own_adapters:
        reason = f"{made.adapter.method} trains the backbone itself, which the tasks would share"
        remedy = "Take data.share=adapter."
        need(not made.adapter.trains_backbone, "data.share", data.share, reason, remedy, code=Code.UNSUPPORTED)
        reason = "stops jobs by their selection MCC, which a run with an adapter for each task has not one of"
        need(not made.pack.halving, "pack.halving", "true", reason, "Leave it out.", code=Code.CONFLICT)
        reason = "says how often each task has its turn in a shared adapter"
        remedy = "With data.share=backbone each is trained as it would be alone."
        need(data.temperature == 1, "data.temperature", data.temperature, reason, remedy, code=Code.CONFLICT)


@dataclass(frozen=True)
class Task:
    """The pairs of one task as the backbone's tokens."""

    data: config.Data
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
    def pairs(self) -> Pairs:
        """What training looks at."""
        return Pairs(self.tables["train"], self.tables["selection"], self.swapped)

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
        data: config.Data,
        splits: dict[str, Examples],
        described: dict[str, Any],
        backbone: Backbone,
        trainer: config.Trainer,
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
class Common:
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

    def courses(self, experiments: Sequence[Experiment], parts: Sequence[Sequence[int]]) -> list[Course]:
        """What the members of these runs learn: all the same, or each a task of its own.

        Args:
            experiments: one per run, alike in their tasks.
            parts: the pack's members of each.
        """
        pairs = {name: task.pairs for name, task in self.tasks.items()}
        first = experiments[0]
        if first.own_adapters:
            return [Course([part[i] for part in parts], {name: pairs[name]}) for i, name in enumerate(pairs)]
        return [Course([k for part in parts for k in part], pairs, first.data.temperature)]

    @classmethod
    def load(cls, experiment: Experiment) -> Common:
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


def load_splits(data: config.Data) -> tuple[dict[str, Examples], dict[str, Any]]:
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
    return splits, {**sources.describe(data, splits), **describe(data, reported, [train, selection])}


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
