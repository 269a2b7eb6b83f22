"""Results of a run whose training has ended: metrics, predictions and adapters, with a folder for each task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.adapters.peft import files
from lora_bench.backbones.load import public_location
from lora_bench.data.tokenization import scoring_table
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import class_metrics, score
from lora_bench.evaluation.stress_splits import score_stress_splits
from lora_bench.records import metrics_log
from lora_bench.records.run_folder import METRICS_FILE, Run, adapter_folders
from lora_bench.records.task_folders import task_folder
from lora_bench.training.model_selection import mean_of_tasks
from lora_bench.training.prediction import predict
from lora_bench.training.task_mixture import MEAN_OF_MAIN_METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.examples import Examples
    from lora_bench.run.inputs import Task
    from lora_bench.run.settings import Experiment
    from lora_bench.training.distributed import Processes

Predicted: TypeAlias = "dict[str, tuple[NDArray[Any], float]]"
"""By split: scores (M, N) or (M, N, C) of the M members that learned a task, and the seconds taken."""


@dataclass(frozen=True)
class TrainedTask:
    """One task of a run whose training has ended, and the members that learned it, at their best states."""

    pack: Pack
    experiment: Experiment
    """The run's settings for this task."""
    task: Task
    members: Sequence[int]
    """Numbers in the pack of the members that learned the task."""
    bests: Sequence[dict[str, Any]]
    """The log line of each member's best evaluation."""
    predicted: Predicted
    processes: Processes
    print_line: Callable[[str], None]
    """Prints a line about progress."""

    @property
    def head(self) -> int:
        """Number of the head that learned the task."""
        return self.task.tables["selection"].head

    def report(self, run: Run) -> None:
        """Write the metrics of all splits to the record, and the predictions of the reported ones to files.

        Both are from the members' mean probability; the predictions are not calibrated. Each reported split adds a line
        to the log. Calibration and threshold are fitted on the selection split, for the mean and for each member of an
        ensemble, and recorded as `selection`.
        """
        task, extra = self.task, self.experiment.metrics
        steps = [{key: best[key] for key in ("step", "epoch")} for best in self.bests]
        best = max(steps, key=lambda entry: entry["step"])
        selected, _ = self.predicted["selection"]  # (M, N)
        labels = task.tables["selection"].labels
        assert labels is not None
        calibration = Calibration.fit(selected.mean(axis=0), labels)
        chosen: dict[str, Any] = {**best, "metric": task.main_metric, **_to_json(calibration)}
        by_member: list[Calibration | None] = []
        if len(steps) > 1:
            by_member = [Calibration.fit(scores, labels) for scores in selected]
            chosen["members"] = [entry | _to_json(fitted) for entry, fitted in zip(steps, by_member, strict=True)]
        is_single = len(steps) == self.pack.heads(self.members[0]) == 1
        values = self.bests[0]["metrics"] if is_single else score(selected.mean(axis=0), labels, extra)
        metrics = {f"selection/{name}": value for name, value in values.items()}
        per_class: dict[str, Any] = {}
        for name in task.reported:
            scores, seconds = self.predicted[name]
            pooled, table = scores.mean(axis=0), task.tables[name]
            assert table.labels is not None
            values = score(pooled, table.labels, extra)
            further = score_calibrated(pooled, table.labels, calibration)
            if by_member:
                further |= score_members(scores, table.labels, extra, by_member)
            further |= self._score_stress_splits(name, pooled) if task.splits else {}
            metrics |= {f"{name}/{key}": value for key, value in (values | further).items()}
            if task.data.form == "multiclass":
                per_class[name] = class_metrics(pooled, table.labels, task.data.label_names or [])
            run.log({**best, "split": name, "metrics": values, "seconds": seconds})
            run.write_predictions(name, table.ids, table.labels, pooled)
        run.update(metrics=metrics, selection=chosen, **({"per_class": per_class} if per_class else {}))

    def _score_stress_splits(self, name: str, scores: NDArray[Any]) -> dict[str, float | None]:
        """Return metrics of a reported split on its unseen rows and perturbed; empty if the settings ask for neither.

        Args:
            name: of the split.
            scores: the members' mean scores, (N,) or (N, C).
        """
        data, splits, trainer = self.task.data, self.task.splits, self.experiment.trainer
        reader = self.pack.backbone.for_task(data.task)

        def scored(examples: Examples) -> NDArray[Any]:
            """Return the members' mean scores of each example: (N,) or (N, C)."""
            both = trainer.scores_both_orders_of(data)
            table = scoring_table(examples, data, reader, both_orders=both, cached=False, head=self.head)
            with self.pack.only(self.members):
                member_scores = predict(self.pack, table, trainer.eval_batch_size, self.processes)
            return member_scores.mean(axis=0)  # type: ignore[no-any-return]

        seen, metrics = (splits["train"], splits["selection"]), self.experiment.metrics
        return score_stress_splits(data, splits[name], scores, scored, seen=seen, metrics=metrics, log=self.print_line)

    def save(self, run: Run) -> None:
        """Write each member's adapter and head to `adapter/` of the run, or below it, and record their SHA-256.

        The leader of several processes writes; the others take part in gathering sharded weights.

        Raises:
            LostFolderError: the run's folder is gone, or another run's by now.
        """
        if not self.processes.is_leader:
            for k in self.members:
                self.pack.state(k, self.head, keep=False)
            return
        run.check()
        folders = adapter_folders(run.folder, len(self.members))
        if len(self.members) > 1:
            folders[0].parent.mkdir(exist_ok=True)
        for k, folder in zip(self.members, folders, strict=True):
            run.check()
            base_model, names = public_location(self.experiment.model), self.task.data.label_names
            files.save(folder, self.pack, k, base_model, head=self.head, label_names=names)
        run.note_files(path for folder in folders for path in folder.glob("*.safetensors"))


def report_tasks(run: Run, trained_tasks: Mapping[str, TrainedTask], sections: Mapping[str, dict[str, Any]]) -> None:
    """Write a folder for each task of a run, and their metrics and means to the record of the run.

    Earlier task folders are removed. The means are over the metrics that all tasks have.

    Args:
        run: of several tasks.
        trained_tasks: by name.
        sections: by task, further sections of its record.
    """
    run.check()
    shutil.rmtree(run.folder / "tasks", ignore_errors=True)  # left by a process that was stopped at this point
    metrics_by_task: dict[str, dict[str, Any]] = {}
    selections: dict[str, Any] = {}
    for name, trained in trained_tasks.items():
        run.check()
        task_run = _claim_task_folder(run, name)
        task_run.update(**sections[name])
        trained.report(task_run)
        trained.save(task_run)
        task_run.finish("done")
        metrics_by_task[name], selections[name] = task_run.record["metrics"], task_run.record["selection"]
    by_task = {
        key.replace("/", f"/{name}/", 1): value
        for name, metrics in metrics_by_task.items()
        for key, value in metrics.items()
    }
    means = _mean_of_splits(
        metrics_by_task, {name: trained.task.main_metric for name, trained in trained_tasks.items()}
    )
    latest = max(selections.values(), key=lambda selection: selection["step"])
    main_metrics = {selection["metric"] for selection in selections.values()}
    main_metric = main_metrics.pop() if len(main_metrics) == 1 else MEAN_OF_MAIN_METRICS
    position = {"step": latest["step"], "epoch": latest["epoch"], "metric": main_metric}
    run.update(metrics=means | by_task, selection={**position, "tasks": selections})


def _mean_of_splits(by_task: Mapping[str, Mapping[str, Any]], main_metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return means over tasks of the metrics that all have, by `<split>/<name>` (`mean_of_tasks` for each split)."""
    means: dict[str, Any] = {}
    splits_by_task = [{key.split("/")[0] for key in metrics} for metrics in by_task.values()]
    for split in sorted(set.intersection(*splits_by_task)):
        of_split = {
            task: {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{split}/")}
            for task, metrics in by_task.items()
        }
        means |= {f"{split}/{key}": value for key, value in mean_of_tasks(of_split, main_metrics).items()}
    return means


def _to_json(calibration: Calibration | None) -> dict[str, float | None]:
    """Return the entries of a record about a calibration; none without one."""
    return {} if calibration is None else calibration.to_json()


def _claim_task_folder(run: Run, task: str) -> Run:
    """Claim the folder of one task of a run, and copy the task's evaluations on the selection split to its log.

    They are the lines of the run's log whose split is `selection/<task>`; in the copies the split is `selection`. The
    config in the task's record is that of a run of this task alone.
    """
    record = run.record
    config = {key: value for key, value in record["config"].items() if key != "tasks"}
    config["data"] = record["config"]["tasks"][task]
    choices = record["choices"] | {"data": task}
    folder, overrides = task_folder(run.folder, task), record["overrides"]
    task_run = Run.claim(folder, choices=choices, config=config, overrides=overrides, is_task=True)
    for line in metrics_log.read_lines(run.folder / METRICS_FILE):
        if line["split"] == f"selection/{task}":
            task_run.log(line | {"split": "selection"})
    return task_run
