"""All settings of a run, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from lora_bench.adapters.methods import method_class
from lora_bench.adapters.pack.member import Member
from lora_bench.config import build, schema
from lora_bench.config.canonical import settings_hash
from lora_bench.data.augmentation import choose_augmentations
from lora_bench.errors import Code, UserError, require
from lora_bench.evaluation.metrics import check_metrics
from lora_bench.evaluation.stress_splits import resolve_transforms
from lora_bench.extensions.entry_points import BACKBONES, METHODS, METRICS, versions
from lora_bench.records.finished_record import damaged
from lora_bench.records.settings import Settings
from lora_bench.run.inputs import SEEDS_APART
from lora_bench.run.preflight import check_sharding
from lora_bench.tracking.choices import build_trackers
from lora_bench.training.objective import check_objective
from lora_bench.training.precision import continued_precision, resolve_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from lora_bench.adapters.base import Adapter
    from lora_bench.backbones.family import Family
    from lora_bench.records.finished_record import FinishedRecord
    from lora_bench.records.job import Job
    from lora_bench.tracking.base import Tracker


@dataclass(frozen=True)
class Experiment:
    """All settings of one run, typed and checked."""

    model: Family
    adapter: Adapter
    head: schema.Head
    data: schema.Data
    optimizer: schema.Optimizer
    trainer: schema.Trainer
    pack: schema.Packing
    ensemble: schema.Ensemble
    metrics: dict[str, schema.Metric]
    trackers: dict[str, Tracker]
    seed: int
    tasks: dict[str, schema.Data] = field(default_factory=dict)
    """By name, if the run learns several tasks; `data` then holds the settings of the first."""

    @property
    def has_adapter_per_task(self) -> bool:
        """True if the run learns several tasks with an adapter for each."""
        return bool(self.tasks) and self.data.share == "backbone"

    @property
    def size(self) -> int:
        """Number of members that the run trains: one, one for each task, or those of its ensemble."""
        return len(self.tasks) if self.has_adapter_per_task else self.ensemble.size

    @property
    def by_task(self) -> dict[str, Experiment]:
        """The settings for each of several tasks, by name; itself under the empty name if there is one task."""
        return {name: replace(self, data=data, tasks={}) for name, data in self.tasks.items()} or {"": self}

    @property
    def identity(self) -> str:
        """A text that is equal for runs that learn the same: without settings of how it is computed."""
        learned = (self.model, self.adapter, self.head, self.data, self.optimizer, self.trainer, self.ensemble)
        return settings_hash((*learned, self.tasks, self.metrics, self.seed))

    def with_data(self, data: Sequence[schema.Data]) -> Experiment:
        """Return the settings with those of the data of each task replaced, in their order."""
        return replace(self, data=data[0], tasks=dict(zip(self.tasks, data, strict=True)) if self.tasks else {})

    def members(self, saved_ranks: Mapping[str, int | list[int]] | None = None) -> list[Member]:
        """Return the members that the run trains: one, one for each task, or those of its ensemble.

        The names of the classes must be known (`with_data`).

        The first member of an ensemble is the member of the run without an ensemble. The others have the seeds
        `seed` + 1,000,000, `seed` + 2,000,000, … for everything that `ensemble.vary` lists.

        Args:
            saved_ranks: by module, if saved tensors will be loaded; a list has the rank of each member.
        """
        members = []
        data = [single.data for single in self.by_task.values()]
        of_tasks = [of_task.outputs for of_task in data]
        for i in range(self.size):
            offset = 0 if self.has_adapter_per_task else i * SEEDS_APART
            seeds = dict.fromkeys(self.ensemble.vary, self.seed + offset)
            ranks = None
            if saved_ranks is not None:
                ranks = {name: rank[i] if isinstance(rank, list) else rank for name, rank in saved_ranks.items()}
            outputs = of_tasks[i : i + 1] if self.has_adapter_per_task else of_tasks
            head = self.head
            signed = head.has_signed_differences(data[i if self.has_adapter_per_task else 0])
            members.append(
                Member(self.adapter, self.seed, ranks, seeds, outputs, head.pair_features, signed, head.fit_batches)
            )
        return members

    @property
    def extension_versions(self) -> dict[str, str]:
        """Versions of the installed distributions that registered the method, the model family or a metric."""
        functions = (metric.function for metric in self.metrics.values() if metric.function is not None)
        names = [(METHODS, self.adapter.method), (BACKBONES, self.model.family)]
        return versions([*names, *((METRICS, function) for function in functions)])

    @classmethod
    def build(cls, cfg: DictConfig, settings: Settings | None = None) -> Experiment:
        """Build the settings from a composed config.

        Args:
            cfg: the composed config.
            settings: the part that was built from it already.

        Raises:
            UserError: a key is unknown or missing, or a value is out of range or excludes another.
        """
        settings = settings or Settings.build(cfg)
        metrics = build.build_metrics(cfg.metric)
        experiment = cls(
            adapter=build.build(method_class(str(cfg.adapter.method)), cfg.adapter, "adapter"),
            **vars(settings),
            metrics=metrics,
            trackers=build_trackers(cfg.get("tracking")),
            seed=cfg.seed,
        )
        _check_ensemble(experiment.ensemble, experiment.adapter, experiment.pack)
        _check_tasks(experiment)
        check_sharding(experiment, getattr(experiment.adapter, "quantize", None))
        _check_quantization(experiment)
        for single in experiment.by_task.values():
            _check_metrics(single)
            check_objective(single.trainer, single.data.text_columns)
            resolve_transforms(single.data)
            choose_augmentations(single.data, single.trainer.objective_of(single.data))
        return experiment

    @classmethod
    def of_job(cls, job: Job) -> Experiment:
        """Build the settings of a job. A run to resume goes on in its precision, where `auto` is another one here.

        Raises:
            UserError: as `build`; or the run to resume needs a GPU, and there is none.
        """
        experiment = cls.build(job.cfg, job.settings)
        if job.resumed is None:
            return experiment
        trainer, before = experiment.trainer, job.resumed.record["environment"].get("precision")
        precision = continued_precision(trainer.precision, before, resolve_device(trainer.device))
        return replace(experiment, trainer=replace(trainer, precision=precision))

    @classmethod
    def of_finished(cls, finished: FinishedRecord) -> Experiment:
        """Build the settings of a finished run, without its extra metrics: they are computed while it is trained.

        Raises:
            UserError: a part that another package registers cannot be used, or the record's config is not that of a
                run; record and key are named.
        """
        try:
            experiment = cls.build(OmegaConf.create(finished.config | {"metric": {}}))
            if experiment.tasks:
                return experiment
            return experiment.with_data([finished.data])
        except UserError as error:
            if error.code == Code.EXTENSION:
                raise
            raise damaged(finished.folder, error) from None


def _check_metrics(single: Experiment) -> None:
    """Refuse extra metrics and a main metric that do not suit a task, as far as its settings give its classes."""
    data = single.data
    if data.type == "classification" and data.label_names is None:
        forms = ("binary", "multiclass")
        errors = [error for form in forms if (error := _refusal(single.metrics, form)) is not None]
        if len(errors) == len(forms):
            raise errors[0]
        return
    check_metrics(single.metrics, data.form, data.outputs)
    single.trainer.main_metric_of(data)


def _refusal(metrics: Mapping[str, schema.Metric], form: str) -> UserError | None:
    """Return the refusal of metrics for a form of task (three classes, if there are more than two), or None."""
    try:
        check_metrics(metrics, form, 3)
    except UserError as error:
        return error
    return None


def _check_ensemble(ensemble: schema.Ensemble, adapter: Adapter, packing: schema.Packing) -> None:
    """Refuse an ensemble whose method trains the shared backbone, with halving, or whose members would all be equal.

    They would be if only `dropout` varies and the adapter has none. Without an ensemble nothing is checked.
    """
    if ensemble.members is None:
        return
    if adapter.trains_backbone:
        reason = f"the members share the backbone, which {adapter.method} trains"
        raise UserError(
            reason,
            key="ensemble.members",
            value=ensemble.members,
            remedy="Use an adapter method such as adapter=lora.",
            code=Code.UNSUPPORTED,
        )
    if packing.halving:
        reason = "eliminates runs by their selection scores, and each member of an ensemble has its own"
        raise UserError(
            reason,
            key="pack.halving",
            value="true",
            remedy="Leave out pack.halving or ensemble.members.",
            code=Code.CONFLICT,
        )
    if ensemble.vary == ["dropout"] and not getattr(adapter, "dropout", 0):
        remedy = "Set adapter.dropout above 0, or add init or order to ensemble.vary."
        reason = "the adapter has no dropout, so all members would be equal"
        raise UserError(reason, key="ensemble.vary", value=ensemble.vary, remedy=remedy, code=Code.CONFLICT)


def _check_quantization(experiment: Experiment) -> None:
    """Refuse quantised weights with a method that trains the weights themselves, and kernels for weights of no run."""
    model, adapter, kernels = experiment.model, experiment.adapter, experiment.trainer.quantization_kernels
    has_use = kernels != "bitsandbytes" or "nf4" in (model.quantize, getattr(adapter, "quantize", None))
    reason, remedy = "dequantises nf4 weights, and this run has none", "Set model.quantize=nf4, or leave it out."
    require(has_use, "trainer.quantization_kernels", kernels, reason, remedy, code=Code.CONFLICT)
    for key in ("quantize", "quantize_embeddings"):
        value = getattr(model, key)
        reason = f"holds codes in place of weights that {adapter.method} trains"
        remedy = f"Set model.{key}=null, or use adapter=lora."
        possible = value is None or not adapter.trains_backbone
        require(possible, f"model.{key}", value, reason, remedy, code=Code.CONFLICT)


def _check_tasks(settings: Experiment) -> None:
    """Refuse settings of several tasks that exclude one another, or that need several tasks if there is one.

    Several tasks exclude an ensemble, a shared adapter of them pair features; an adapter for each excludes `full`,
    halving and a temperature. One task excludes `data.share=backbone` and a temperature, except in the record of one of
    several tasks.
    """
    data, names = settings.data, list(settings.tasks)
    temperature = data.temperature
    if not names:
        is_one_of_several = data.tasks is not None  # the record of one task of a finished run
        shares = is_one_of_several or data.share == "adapter"
        require(shares, "data.share", data.share, "needs several tasks", "Set data.tasks.", code=Code.CONFLICT)
        mixes = is_one_of_several or temperature == 1
        reason = "sets the mixture of several tasks, and this run learns one"
        require(mixes, "data.temperature", temperature, reason, "Set data.tasks.", code=Code.CONFLICT)
        return
    reason = "trains an ensemble on one task, and this run learns several tasks"
    remedy = "Leave out ensemble.members or data.tasks."
    members = settings.ensemble.members
    require(members is None, "ensemble.members", members, reason, remedy, code=Code.CONFLICT)
    reason = "works with a single head, and a shared adapter has a head for each task"
    remedy = "Set head.pair_features=false or data.share=backbone."
    pair_features = settings.head.pair_features
    value = "null" if pair_features is None else "true"
    fits = settings.has_adapter_per_task or pair_features is False
    require(fits, "head.pair_features", value, reason, remedy, code=Code.CONFLICT)
    if settings.has_adapter_per_task:
        adapter = settings.adapter
        reason = f"the tasks would share the backbone, which {adapter.method} trains"
        remedy = "Use data.share=adapter."
        require(not adapter.trains_backbone, "data.share", data.share, reason, remedy, code=Code.UNSUPPORTED)
        reason = "eliminates runs by their selection scores, and each adapter of this run has its own"
        remedy = "Leave out pack.halving, or use data.share=adapter."
        require(not settings.pack.halving, "pack.halving", "true", reason, remedy, code=Code.CONFLICT)
        reason = "sets how often a shared adapter sees each task"
        remedy = "Use data.share=adapter, or leave it out."
        require(temperature == 1, "data.temperature", temperature, reason, remedy, code=Code.CONFLICT)
