"""What a run leaves when its training is over: figures, predictions and adapters; of several tasks in a folder each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.adapters.peft import files
from lora_bench.backbones.load import public_place
from lora_bench.data.tokenization import scoring_table
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import mean_metrics, score
from lora_bench.evaluation.stress_splits import score_stress_splits
from lora_bench.records import metrics_log
from lora_bench.records.run_folder import METRICS_FILE, Run, adapter_folders
from lora_bench.records.task_folders import TASKS, task_folder
from lora_bench.training.prediction import predict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.examples import Examples
    from lora_bench.run.inputs import Task
    from lora_bench.run.settings import Experiment
    from lora_bench.training.distributed import Processes

Predicted: TypeAlias = "dict[str, tuple[NDArray[Any], float]]"
"""By split: scores (M, N) of the members that learned a task, and the seconds taken."""


@dataclass(frozen=True)
class TrainedTask:
    """One task of a run that is over, with those members at their best states that learned it."""

    pack: Pack
    experiment: Experiment
    """Of this task alone."""
    task: Task
    members: Sequence[int]
    bests: Sequence[dict[str, Any]]
    """The line of each member's best look."""
    predicted: Predicted
    processes: Processes
    tell: Callable[[str], None]

    @property
    def head(self) -> int:
        """Of the members' heads, the one that answers it."""
        return self.task.tables["selection"].head

    def report(self, run: Run) -> None:
        """Every reported split is scored once, with the best state; an ensemble's by its members' mean probability."""
        task, extra = self.task, self.experiment.metrics
        looks = [{key: best[key] for key in ("step", "epoch")} for best in self.bests]
        best = max(looks, key=lambda look: look["step"])
        selected, _ = self.predicted["selection"]  # (M, N)
        labels = task.tables["selection"].labels
        assert labels is not None
        calibration = Calibration.fit(selected.mean(axis=0), labels)
        chosen: dict[str, Any] = {**best, "metric": "mcc", **calibration.to_json()}
        of_each: list[Calibration] = []
        if len(looks) > 1:
            of_each = [Calibration.fit(own, labels) for own in selected]
            chosen["members"] = [look | own.to_json() for look, own in zip(looks, of_each, strict=True)]
        alone = len(looks) == self.pack.members[self.members[0]].heads == 1
        values = self.bests[0]["metrics"] if alone else score(selected.mean(axis=0), labels, extra)
        metrics = {f"selection/{name}": value for name, value in values.items()}
        for name in task.reported:
            scores, seconds = self.predicted[name]
            pooled, table = scores.mean(axis=0), task.tables[name]
            assert table.labels is not None
            values = score(pooled, table.labels, extra)
            more = score_calibrated(pooled, table.labels, calibration)
            if of_each:
                more |= score_members(scores, table.labels, extra, of_each)
            more |= self._besides(name, pooled) if task.splits else {}
            metrics |= {f"{name}/{key}": value for key, value in (values | more).items()}
            run.log({**best, "split": name, "metrics": values, "seconds": seconds})
            run.write_predictions(name, table.ids, table.labels, pooled)
        run.update(metrics=metrics, selection=chosen)

    def _besides(self, name: str, scores: NDArray[Any]) -> dict[str, float | None]:
        """A reported split on its unseen rows and perturbed, as far as the settings ask for it."""
        data, splits, trainer = self.task.data, self.task.splits, self.experiment.trainer
        reader = self.pack.backbone.for_task(data.task)

        def scored(examples: Examples) -> NDArray[Any]:
            both = trainer.score_both_orders
            table = scoring_table(examples, data, reader, both_orders=both, cached=False, head=self.head)
            with self.pack.only(self.members):
                found = predict(self.pack, table, trainer.eval_batch_size, self.processes)
            return found.mean(axis=0)  # type: ignore[no-any-return]

        seen, metrics = (splits["train"], splits["selection"]), self.experiment.metrics
        return score_stress_splits(data, splits[name], scores, scored, seen=seen, metrics=metrics, log=self.tell)

    def save(self, run: Run) -> None:
        """Each member's adapter and head."""
        run.check()
        folders = adapter_folders(run.folder, len(self.members))
        if len(self.members) > 1:
            folders[0].parent.mkdir(exist_ok=True)
        for k, folder in zip(self.members, folders, strict=True):
            run.check()
            place, names = public_place(self.experiment.model), self.experiment.data.label_names
            files.save(folder, self.pack, k, place, head=self.head, label_names=names)
        run.note_files(path for folder in folders for path in folder.glob("*.safetensors"))


def report_tasks(run: Run, learned: Mapping[str, TrainedTask], sections: Mapping[str, dict[str, Any]]) -> None:
    """Leave a folder for each task of a run, and in the run's own record their figures and means.

    Args:
        run: of several tasks.
        learned: by task.
        sections: by task, what its record says besides.
    """
    run.check()
    shutil.rmtree(run.folder / TASKS, ignore_errors=True)  # of a process that was stopped here
    of_tasks: dict[str, dict[str, Any]] = {}
    chosen: dict[str, Any] = {}
    for name, each in learned.items():
        run.check()
        own = _begun(run, name)
        own.update(**sections[name])
        each.report(own)
        each.save(own)
        own.finish("done")
        of_tasks[name], chosen[name] = own.record["metrics"], own.record["selection"]
    metrics = {f"{k.replace('/', f'/{name}/', 1)}": value for name, own in of_tasks.items() for k, value in own.items()}
    everywhere = set.intersection(*(set(own) for own in of_tasks.values()))
    means = mean_metrics([{k: v for k, v in own.items() if k in everywhere} for own in of_tasks.values()])
    latest = max(chosen.values(), key=lambda own: own["step"])
    looks = {key: latest[key] for key in ("step", "epoch", "metric")}
    run.update(metrics=means | metrics, selection={**looks, "tasks": chosen})


def _begun(run: Run, task: str) -> Run:
    """The folder of one task, with the run's own lines about it."""
    asked = run.record
    config = {key: value for key, value in asked["config"].items() if key != "tasks"}
    config["data"] = asked["config"]["tasks"][task]
    choices = asked["choices"] | {"data": task}
    own = Run.claim(task_folder(run.folder, task), choices=choices, config=config, overrides=asked["overrides"])
    for line in metrics_log.read_lines(run.folder / METRICS_FILE):
        if line["split"] == f"selection/{task}":
            own.log(line | {"split": "selection"})
    return own
