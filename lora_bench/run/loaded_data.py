"""The data of a task, read and split without torch, so that a fault in a file is answered quickly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_bench.console.stages import stage
from lora_bench.data import sources
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.stress_splits import describe_stress_splits, resolve_transforms

if TYPE_CHECKING:
    from lora_bench.config.schema import Data
    from lora_bench.data.examples import Examples
    from lora_bench.records.settings import Settings
    from lora_bench.run.settings import Experiment


@dataclass(frozen=True)
class LoadedData:
    """The splits of one task that training and its final evaluation need."""

    data: Data
    """The settings, with the names of the classes."""
    splits: dict[str, Examples]
    """`train`, `selection`, which is a part of the train split, and every labelled split to report."""

    @cached_property
    def described(self) -> dict[str, Any]:
        """The description of the data for the record; it takes as long as reading them, and a check needs none."""
        seen = [self.splits["train"], self.splits["selection"]]
        reported = {name: split for name, split in self.splits.items() if name not in ("train", "selection")}
        with stage(f"checking {self.data.task}"):
            described = sources.describe_data(self.data, self.splits)
            return described | describe_stress_splits(self.data, reported, seen)

    @classmethod
    def load(cls, data: Data) -> LoadedData:
        """Load and check the data; with `data.report=false` no split is reported.

        Raises:
            UserError: the source cannot be read, has no train split, no labelled split to report, or only one label;
                or `data.perturb` names no transform that suits them.
        """
        with stage(f"reading {data.task}"):
            data, loaded = sources.load(data)
        if "train" not in loaded:
            raise UserError(
                "there is no train split",
                key="data",
                remedy=f"The data has only: {', '.join(loaded)}. Training needs a train file with labels.",
                code=Code.EMPTY,
            )
        reported = sources.reported_splits(loaded) if data.report else {}
        if data.report and not reported:
            raise UserError(
                "there is no labelled split to report on",
                key="data",
                remedy="Add a validation file with labels: scores on the training pairs are no evidence.",
                code=Code.EMPTY,
            )
        _require_two_labels(data, loaded["train"])
        resolve_transforms(data)
        train, selection = sources.split_selection(loaded["train"], data)
        return cls(data, {"train": train, "selection": selection, **reported})

    @classmethod
    def of_tasks(cls, settings: Settings | Experiment) -> dict[str, LoadedData]:
        """Load the data of each task of a run, by name; a single task has the empty name.

        Raises:
            UserError: as `load`, or the metric that chooses on the selection split does not suit a task.
        """
        loaded = {name: cls.load(data) for name, data in (settings.tasks or {"": settings.data}).items()}
        for of_task in loaded.values():
            settings.trainer.main_metric_of(of_task.data)
        return loaded


def _require_two_labels(data: Data, train: Examples) -> None:
    """Refuse training data whose labels are all the same, from which nothing can be learned."""
    if train.labels is None or len(train) == 0 or train.labels.min() < train.labels.max():
        return
    label = f"{train.labels[0]:g}" if data.label_names is None else data.label_names[int(train.labels[0])]
    raise UserError(
        f"all {len(train):,} rows of train have the label {label}",
        key="data.label_column",
        value=data.label_column,
        remedy="Name the column of the labels, and give examples of at least two.",
        code=Code.INVALID_DATA,
    )
