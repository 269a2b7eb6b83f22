"""The settings of a run, typed and checked, and what runs have in common that train on one backbone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from lora_bench.adapters.methods import method_class
from lora_bench.adapters.pack.pack import Member
from lora_bench.config import build, schema
from lora_bench.config.canonical import settings_hash
from lora_bench.data.augmentation import augmentations
from lora_bench.errors import Code, UserError, require
from lora_bench.evaluation.metrics import check_metrics
from lora_bench.evaluation.stress_splits import perturbations
from lora_bench.run.inputs import SEEDS_APART
from lora_bench.tracking.choices import build_trackers
from lora_bench.training.objective import check_objective

if TYPE_CHECKING:
    from collections.abc import Mapping

    from omegaconf import DictConfig

    from lora_bench.adapters.base import Adapter
    from lora_bench.records.finished_record import FinishedRecord
    from lora_bench.tracking.base import Tracker

_GROUPS = ("model", "adapter", "data", "optimizer", "trainer", "metric", "pack", "ensemble", "tracking")


_KEYS = (*_GROUPS, "tasks", "seed", "resume", "dry_run")


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, typed and checked."""

    model: schema.Model
    adapter: Adapter
    data: schema.Data
    optimizer: schema.Optimizer
    trainer: schema.Trainer
    pack: schema.Packing
    ensemble: schema.Ensemble
    metrics: dict[str, schema.Metric]
    trackers: dict[str, Tracker]
    seed: int
    tasks: dict[str, schema.Data] = field(default_factory=dict)
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
        return settings_hash((*learned, self.tasks, self.metrics, self.seed))

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
    def build(cls, cfg: DictConfig, settings: build.Settings | None = None) -> Experiment:
        """From the composed config; refuses what is out of range, naming the key.

        Args:
            cfg: the composed config.
            settings: what was built of it already.
        """
        build.check_top(cfg, _KEYS)
        require("method" in cfg.adapter, "adapter", None, "is missing", "It cannot be left out.", code=Code.MISSING)
        metrics = build.build_metrics(cfg.metric)
        check_metrics(metrics)
        made = cls(
            adapter=build.build(method_class(str(cfg.adapter.method)), cfg.adapter, "adapter"),
            **vars(settings or build.Settings.build(cfg)),
            metrics=metrics,
            trackers=build_trackers(cfg.get("tracking")),
            seed=cfg.seed,
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


def _check_ensemble(ensemble: schema.Ensemble, adapter: Adapter, packing: schema.Packing) -> None:
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
        require(
            said or data.share == "adapter",
            "data.share",
            data.share,
            "needs data.tasks: there is nothing to share",
            code=Code.CONFLICT,
        )
        reason = "says how often each of several tasks has its turn, and there is one"
        remedy = "Give data.tasks."
        require(said or data.temperature == 1, "data.temperature", data.temperature, reason, remedy, code=Code.CONFLICT)
        return
    reason = "has members that learn one task, so it cannot be one of the runs of several"
    remedy = "Leave out ensemble.members or data.tasks."
    members = made.ensemble.members
    require(members is None, "ensemble.members", members, reason, remedy, code=Code.CONFLICT)
    reason = "compares the texts beside one head, and a shared adapter has a head for each task"
    remedy = "Take adapter.matching=false or data.share=backbone."
    asked = made.adapter.matching
    matching = "null" if asked is None else "true"
    require(made.own_adapters or asked is False, "adapter.matching", matching, reason, remedy, code=Code.CONFLICT)
    if made.own_adapters:
        reason = f"{made.adapter.method} trains the backbone itself, which the tasks would share"
        remedy = "Take data.share=adapter."
        require(not made.adapter.trains_backbone, "data.share", data.share, reason, remedy, code=Code.UNSUPPORTED)
        reason = "stops jobs by their selection MCC, which a run with an adapter for each task has not one of"
        require(not made.pack.halving, "pack.halving", "true", reason, "Leave it out.", code=Code.CONFLICT)
        reason = "says how often each task has its turn in a shared adapter"
        remedy = "With data.share=backbone each is trained as it would be alone."
        require(data.temperature == 1, "data.temperature", data.temperature, reason, remedy, code=Code.CONFLICT)
