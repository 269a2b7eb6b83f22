"""Inputs that the runs of a pack share: backbone, tokens, splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.bitsandbytes_kernels import choose_kernels
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.backbones.quantized_network import Quantization
from lora_bench.console.stages import stage
from lora_bench.console.text import note
from lora_bench.data.augmentation import training_tables
from lora_bench.data.tokenization import TokenTable, scoring_table, truncation_notes
from lora_bench.errors import UserError
from lora_bench.evaluation.metrics import check_metrics
from lora_bench.run.loaded_data import LoadedData
from lora_bench.run.model_memory import WeightMemory
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.memory import keep_freed_memory
from lora_bench.training.padding import check_padding
from lora_bench.training.precision import resolve_device, resolve_precision
from lora_bench.training.task_mixture import TaskData, TaskMixture
from lora_bench.training.threads import Load, fit_threads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.backbones.base import Backbone
    from lora_bench.config import schema
    from lora_bench.data.examples import Examples
    from lora_bench.run.packed_run import PackedRun
    from lora_bench.run.settings import Experiment

SEEDS_APART = 1_000_000
"""Distance between the seeds of an ensemble's members, so that ensembles of neighbouring seeds share no member."""


@dataclass(frozen=True)
class Task:
    """The data of one task as the backbone's tokens."""

    data: schema.Data
    tables: dict[str, TokenTable]
    """`train`, `selection`, and every split to report."""
    second_view: TokenTable | None
    """The second views of the training pairs, in reversed order or perturbed, if the objective has any."""
    described: dict[str, Any]
    """The description of the data for the record."""
    splits: dict[str, Examples]
    """The texts of all splits, if reported splits are also scored on unseen rows or perturbed; otherwise empty."""
    main_metric: str
    """The metric that chooses on the selection split."""

    @property
    def reported(self) -> list[str]:
        """Names of the splits that are scored once, at the end."""
        return [name for name in self.tables if name not in ("train", "selection")]

    @property
    def pairs(self) -> TaskData:
        """The splits that training uses."""
        return TaskData(self.tables["train"], self.tables["selection"], self.second_view, self.main_metric)

    def with_tables(self, tables: Mapping[str, TokenTable]) -> Task:
        """Return the task with these tables in place of its own: the same pairs, with cached hidden states.

        Args:
            tables: by split; `second_view` is that of the training split, `reversed_selection` of the selection split.
        """
        merged = self.tables | dict(tables)
        if "reversed_selection" in merged:
            merged["selection"] = replace(merged["selection"], reversed_view=merged.pop("reversed_selection"))
        if merged["train"].reversed_view is not None and "second_view" in merged:
            merged["train"] = replace(merged["train"], reversed_view=merged.pop("second_view"))
        second_view = merged.pop("second_view", self.second_view)
        return replace(self, tables=merged, second_view=second_view)

    @classmethod
    def read(cls, loaded: LoadedData, backbone: Backbone, trainer: schema.Trainer, *, head: int) -> Task:
        """Tokenize the data of a task.

        Args:
            loaded: the data; the truncated rows and the tokens of the longest row are added to its description, by
                split.
            backbone: gives the tokenizer.
            trainer: objective, and whether both orders are scored.
            head: number of the task, and of the head that learns it where a member has several.
        """
        data, splits, described = loaded.data, loaded.splits, loaded.described
        reader = backbone.for_task(data.task)
        train, second_view = training_tables(data, splits["train"], reader, trainer.objective_of(data), head)
        both = trainer.scores_both_orders_of(data)
        tables = {"train": train} | {
            name: scoring_table(split, data, reader, both_orders=both, head=head)
            for name, split in splits.items()
            if name != "train"
        }
        described["truncated"] = {name: table.truncated for name, table in tables.items()}
        described["longest"] = {name: table.longest for name, table in tables.items()}
        needs_texts = data.unseen or data.perturb is not None
        main_metric = trainer.main_metric_of(data)
        return cls(data, tables, second_view, described, splits if needs_texts else {}, main_metric)


@dataclass(frozen=True)
class SharedInputs:
    """Inputs that all runs of a pack share: the backbone, and the data as its tokens."""

    backbone: Backbone
    backbone_sha256: str
    """Hash of its weights as loaded."""
    tasks: dict[str, Task]
    """By name; a single task has the empty name."""

    @property
    def described(self) -> dict[str, Any]:
        """The description of the data for records; with several tasks, splits and warnings begin with the task."""
        if list(self.tasks) == [""]:
            return self.tasks[""].described
        merged: dict[str, Any] = {}
        for name, task in self.tasks.items():
            for key, value in task.described.items():
                if isinstance(value, dict):
                    merged.setdefault(key, {}).update({f"{name}/{split}": entry for split, entry in value.items()})
                elif isinstance(value, list):
                    merged.setdefault(key, []).extend(f"{name}: {entry}" for entry in value)
                else:
                    merged.setdefault(key, value)
        return merged

    def truncation_notes(self) -> list[str]:
        """Return sentences on the truncated examples of each task, which begin with its name if there are several."""
        return [
            f"{name}: {note}" if name else note
            for name, task in self.tasks.items()
            for note in truncation_notes(task.tables, task.data)
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest training pair."""
        return max(int(task.tables["train"].lengths.max()) for task in self.tasks.values())

    @property
    def orders(self) -> int:
        """Views of each training pair in a step: 2 if a task has second views, else 1."""
        return max(1 if task.second_view is None else 2 for task in self.tasks.values())

    def mixtures(self, runs: Sequence[PackedRun]) -> list[TaskMixture]:
        """Return the task mixtures of these runs' members: one of all tasks for all members.

        With an adapter for each task there is one mixture per task, for the member of each run that learns it. The
        settings are those of the first run.
        """
        data = {name: task.pairs for name, task in self.tasks.items()}
        if runs[0].experiment.has_adapter_per_task:
            return [TaskMixture([run.numbers[i] for run in runs], {name: data[name]}) for i, name in enumerate(data)]
        return [TaskMixture([k for run in runs for k in run.numbers], data, runs[0].experiment.data.temperature)]

    def with_classes(self, experiment: Experiment) -> Experiment:
        """Return the settings of a run of these inputs with the names of its classes."""
        return experiment.with_data([task.data for task in self.tasks.values()])

    @classmethod
    def load(
        cls,
        experiment: Experiment,
        processes: Processes = SINGLE_PROCESS,
        loaded: dict[str, LoadedData] | None = None,
    ) -> SharedInputs:
        """Load data and backbone, and tokenize the data.

        For the process it also sets the number of threads (`trainer.threads`, or those that the load leaves free) and
        makes the allocator keep freed memory.

        Args:
            experiment: the settings.
            processes: that will train together, and over which the backbone is sharded if the settings say so.
            loaded: the data of each task, if they are loaded already. They are taken out, so that the texts do not stay
                in memory.

        Raises:
            UserError: the data or the backbone cannot be loaded, or they do not fit together.
        """
        trainer, earlier = experiment.trainer, Load.now()
        keep_freed_memory()
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        if loaded is None:
            loaded = LoadedData.of_tasks(experiment)
        for of_task in loaded.values():
            check_metrics(experiment.metrics, of_task.data.form, of_task.data.outputs)
        experiment = experiment.with_data([of_task.data for of_task in loaded.values()])
        device = resolve_device(trainer.device)
        shards = processes.size if trainer.sharding == "fsdp" else 1
        precision = resolve_precision(trainer.precision, device)
        backbone, sha256 = load_backbone(experiment, device, precision, shards=shards)
        tasks = {name: Task.read(loaded.pop(name), backbone, trainer, head=i) for i, name in enumerate(list(loaded))}
        if not trainer.threads and device.type == "cpu" and (text := fit_threads(earlier)) and processes.is_leader:
            note(text)
        return cls(backbone, sha256, tasks)


def load_backbone(
    experiment: Experiment, device: torch.device, dtype: torch.dtype, *, shards: int = 1
) -> tuple[Backbone, str]:
    """Load the backbone onto its device, frozen unless the method trains it; with several shards it stays on the CPU.

    Args:
        experiment: the settings.
        device: of the backbone.
        dtype: of the matrix products.
        shards: number of processes over which it will be sharded.

    Returns:
        The backbone, with products in `dtype`, and the SHA-256 of its weights as they were loaded (`Backbone.hash`).

    Raises:
        UserError: it cannot be loaded, takes fewer tokens than a task's `data.max_length`, or cannot score a padded
            batch.
    """
    all_data = [single.data for single in experiment.by_task.values()]
    names = [data.label_names for data in all_data]
    with stage("loading the model"):
        tokenizer, task = load_tokenizer(experiment.model), all_data[0].task
        trained = experiment.adapter.trains_backbone
        memory = WeightMemory(experiment, device, dtype, shards)
        backbone = load(
            experiment.model,
            tokenizer,
            task=task,
            label_names=names,
            device=device,
            trained=trained,
            refusal=memory.refusal,
        )
        for data in all_data:
            backbone.require_length(data.max_length)
        check_padding(backbone)
        sha256 = backbone.hash()
        if shards > 1:
            backbone.to_shards(device, dtype, trained=trained)
            return backbone, sha256
        try:
            replaced = () if trained else experiment.adapter.replaced_weights(backbone)
        except UserError as error:
            raise error.under("adapter") from None
        kernels = experiment.trainer.quantization_kernels if "nf4" in memory.quant_types else "torch"
        choose_kernels(kernels, device)
        quantization = Quantization(experiment.model.quantize, experiment.model.quantize_embeddings)
        backbone.to(device, dtype, trained=trained, offload=replaced, quantization=quantization)
    return backbone, sha256


def attach(
    experiment: Experiment,
    device: torch.device,
    dtype: torch.dtype,
    saved_ranks: Mapping[str, int | list[int]] | None = None,
) -> tuple[Pack, str]:
    """Load the backbone and attach the run's members; return the pack and the hash of the backbone's weights.

    Tensors of a saved adapter are not loaded here.

    Args:
        experiment: settings of the run.
        device: of the backbone.
        dtype: of the matrix products.
        saved_ranks: rank by module (a list: of each member), if tensors of a saved adapter will be loaded.

    Raises:
        UserError: the backbone cannot be loaded, or a member does not fit it.
    """
    backbone, sha256 = load_backbone(experiment, device, dtype)
    return Pack(backbone, experiment.members(saved_ranks)), sha256
