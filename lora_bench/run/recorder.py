"""Records of the runs of a pack: each is started, logged, scored and ended as a single run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_bench.adapters.pack.weight_bytes import unquantised_bytes
from lora_bench.adapters.targets import unmatched_alternatives
from lora_bench.backbones.identity import refuse_other_tokenizer
from lora_bench.config.metric_names import EVALUATIONS_AT_TARGET
from lora_bench.console.format import format_number
from lora_bench.console.progress import show_result
from lora_bench.console.stages import stage
from lora_bench.console.text import note, sanitise
from lora_bench.errors import Code, LostFolderError, RunFailedError, UserError, shell_argument
from lora_bench.evaluation.chance import failure_notes
from lora_bench.records import environment
from lora_bench.records.run_folder import Run
from lora_bench.run.callbacks import CallbackCaller, CallbackStop
from lora_bench.run.final_evaluation import TrainedTask, report_tasks
from lora_bench.tracking.base import TrackedRun, track_run
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.member_run import isolate_failure
from lora_bench.training.objective import order_note
from lora_bench.training.prediction import predict
from lora_bench.training.threads import StarvationWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray
    from rich.console import Console

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.console.progress import Display
    from lora_bench.run.inputs import SharedInputs, Task
    from lora_bench.run.packed_run import PackedRun
    from lora_bench.run.settings import Experiment
    from lora_bench.training.member_run import MemberRun


@dataclass
class Recorder:
    """Keeps the records of a pack's runs; an error in one run ends that run alone.

    An exception that leaves it as a context manager ends the other runs too: as `failed`, or, if the process is being
    stopped, as `interrupted`.

    Args:
        pack: the pack that trains.
        runs: of the pack.
        inputs: what the runs share.
        console: where results are shown.
        processes: those that predict together.
        sharing: processes that train at the same time on the device.
    """

    pack: Pack
    runs: Sequence[PackedRun]
    inputs: SharedInputs
    console: Console
    processes: Processes = SINGLE_PROCESS
    sharing: int = 1
    display: Display | None = None
    environment_notes: list[str] = field(default_factory=list)
    """On resumed runs whose environment has changed."""
    callbacks: CallbackCaller = field(default_factory=CallbackCaller)
    starvation: StarvationWatch = field(default_factory=StarvationWatch)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the runs that have not ended, if an exception leaves the context; it is not suppressed.

        An `Exception` makes them `failed` (or `diverged`); KeyboardInterrupt or SystemExit makes them `interrupted`.
        """
        if isinstance(error, Exception):
            self._fail(error)
        elif error is not None:  # Ctrl-C, or a signal that became SystemExit
            self._interrupt(error)

    @property
    def in_sweep(self) -> bool:
        """True if the runs are jobs of a sweep, whose progress shows how they end."""
        return bool(self.runs[0].job.title)

    @property
    def running(self) -> list[PackedRun]:
        """Runs that have started and not ended."""
        return [run for run in self.runs if run.record is not None]

    # -- start --

    def start_runs(self) -> None:
        """Claim each run's folder, or set its record back to the checkpoint that it is resumed from.

        An error in one run closes that run alone and is not raised. A new run whose initialisation has failed is not
        claimed.
        """
        for run in self.runs:
            run.propagate_failure()
            if run.has_failed:
                continue
            with isolate_failure(run.progress):
                self._start(run)
            run.propagate_failure()
        for run in self.running:
            if run.has_failed:
                self._close(run)

    def _start(self, run: PackedRun) -> None:
        """Claim a new run's folder, or set a resumed run's record back to its checkpoint.

        Inputs, parameters, ranks and environment are recorded.

        Raises:
            UserError: the folder cannot be claimed, or the inputs are not those that the run was started with.
        """
        job, inputs = run.job, self.inputs
        newest = run.resumed_from[0] if run.resumed_from else None
        if job.sweep:
            job.sweep.check()
        differences = _refuse_other_inputs(job.resumed.record, inputs) if job.resumed else []
        record = run.record = job.resumed or Run.claim(
            job.folder, choices=job.choices, config=job.config, overrides=job.overrides
        )
        for folder in run.folders:
            folder.check = record.check
        if job.resumed:
            record.rewind(newest.step if newest else 0)
        notes = [note for preparation in run.preparations for note in preparation.notes]
        warnings = [*inputs.described["warnings"], *inputs.backbone.notes, *notes, *differences]
        record.update(
            data={**inputs.described, "warnings": list(dict.fromkeys(warnings))},
            params=run.parameters(),
            targets=run.ranks(),
            cost=self.pack.weight_bytes(run.numbers),
            environment=self._environment(
                run.experiment, record.record["environment"], newest.step if newest else None
            ),
        )
        run.record = track_run(record, run.experiment.trackers if self.processes.is_leader else {}, self.console)

    def _environment(self, experiment: Experiment, before: Mapping[str, Any], resumed_at: int | None) -> dict[str, Any]:
        """Describe the environment of the coming steps, and of a resumed run's earlier steps where it differs.

        Changes of a resumed run's environment are added to `environment_notes`.

        Args:
            experiment: the settings of the run.
            before: the environment in the record.
            resumed_at: the step that the run is resumed from; None: a new run.
        """
        backbone = self.inputs.backbone
        described = environment.describe()
        now = {
            **described,
            "versions": described["versions"] | experiment.extension_versions,
            "device": str(backbone.device),
            "precision": str(backbone.compute_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
            "activation_checkpointing": self.pack.recomputes_activations,
            "backbone_sha256": self.inputs.backbone_sha256,
            **backbone.tokenizer_identity,
        }
        earlier = [] if resumed_at is None else environment.history(before, now, resumed_at)
        if resumed_at is not None and (changes := environment.changes(before, now)):
            self.environment_notes.append(f"resumed in another environment: {', '.join(changes)}")
        return now | {"history": earlier} if earlier or "history" in before else now

    def notes(self) -> list[str]:
        """Return notes for the user before the members train, each once.

        They are those of `_notes`, the share of truncated examples of each split, changes of the environment, damaged
        checkpoints and warm starts.
        """
        notes = list(self.environment_notes)
        for run in self.running:
            assert run.record is not None
            notes += [*_notes(run, run.record.record), *self.inputs.truncation_notes()]
            damaged = [checkpoint for folder in run.folders for checkpoint in folder.damaged]
            notes += [f"skipped a damaged checkpoint, {checkpoint}" for checkpoint in damaged]
        notes += [run.warm_start.note() for run in self.runs if run.warm_start]
        notes += self._memory_notes()
        return list(dict.fromkeys(notes))

    def _memory_notes(self) -> list[str]:
        """Return sentences on quantised weights, and on activations that are recomputed without a setting of it."""
        notes = _describe_weights(self.pack.weight_bytes(range(self.pack.size)))
        if self.pack.backbone.offloaded and (rest := unquantised_bytes(self.pack)):
            quant_type = getattr(self.runs[0].experiment.adapter, "quantize", None)
            held = format_number(rest, "B")
            remedy = f"model.quantize={quant_type} quantises them too"
            notes.append(f"linears that are not adapted take {held} of it; {remedy}.")
        trainer = self.runs[0].experiment.trainer
        if self.pack.recomputes_activations and trainer.activation_checkpointing == "auto":
            reason = "weights are sharded" if self.pack.backbone.is_sharded else "activations would not fit into memory"
            notes.append(f"{reason}, so activations are recomputed in the backward pass.")
        return notes

    # -- while they train --

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        """Pass the losses of each run's members to its trackers, progress file and callbacks, and to the display."""
        for run in self.running:
            assert run.record is not None
            run_losses = [losses[k] for k in run.numbers if k in losses]
            if not run_losses:
                continue
            loss = sum(run_losses) / len(run_losses)
            if isinstance(run.record, TrackedRun):
                run.record.stepped(loss)
            run.live_progress.stepped(run.record, step, loss, pairs)
            self.callbacks.stepped(run, step, run_losses, pairs)
        if self.display:
            self.display.stepped(step, losses, pairs)
            if text := self.starvation.update():
                note(text)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        """Log a member's evaluation in the record of its run, with several tasks a line for each, and show it.

        The callbacks are called last.

        The split is `selection`, followed by `/<member>` if the run has several, and by `/<task>` for a shared adapter.
        """
        run = self._run_of(member)
        assert run.record is not None
        name = run.member_name(member)
        split = f"{line['split']}/{name}" if name else line["split"]
        line = dict(line)
        by_task = line.pop("tasks", {})
        run.record.log(line | {"split": split})
        for task, metrics in by_task.items():
            run.record.log(line | {"split": f"{line['split']}/{task}", "metrics": metrics})
        if self.display:
            main_metric = next(one.progress.main_metric for one in run.members if one.index == member)
            self.display.evaluated(member, line, main_metric)
        self.callbacks.evaluated(run, name, line)

    def ended(self, members: Sequence[int]) -> None:
        """Record and close the runs of these members in which no member trains any more; score those that are done.

        If one member of a run has diverged or failed, the others end with it. A run is done if all its members are:
        only then its splits are predicted and its metrics, predictions and adapters written. Costs are recorded for
        every ended run, and its status is that of its members. An error while one run is recorded ends that run alone;
        an error in the prediction, which the runs share, is raised. Callbacks are called once all are recorded.
        """
        runs = list(dict.fromkeys(map(self._run_of, members)))
        for run in runs:
            run.propagate_failure()
        ended = [run for run in runs if run.has_ended]
        records = [run.record for run in ended]
        trained = self._trained_tasks([run for run in ended if run.is_done])
        for run in ended:
            with isolate_failure(run.progress), stage("writing results"):
                self._record_cost(run)
                self._record_micro_batches(run)
                if run in trained:
                    self._report(run, trained[run])
            self._close(run)
        for record in records:
            assert record is not None
            self.callbacks.ended(record)

    # -- end --

    def _close(self, run: PackedRun) -> None:
        """Record how a run ended and give up its claim.

        A run without an error ends as `done` or `eliminated`: `done` deletes its checkpoints and prints its result. An
        error is recorded as in `Run.fail`, which writes a traceback to the run's log.
        """
        record, run.record = run.record, None
        assert record is not None
        if run.progress.status == "eliminated":
            with isolate_failure(run.progress):
                self._close_eliminated(run, record)
                return
        if run.progress.error is None:
            with isolate_failure(run.progress):
                record.finish("done")
                for folder in run.folders:
                    folder.clear()
                if not self.in_sweep:
                    show_result(self.console, record.folder, record.record)
                    for note in failure_notes(record.record):
                        self.console.print(sanitise(f"note: {note}"))
        if run.progress.error is not None:
            try:
                record.check()
            except LostFolderError as lost:  # the cause of whatever else failed
                run.progress.error = lost
            record.fail(run.progress.error)

    def _close_eliminated(self, run: PackedRun, record: Run) -> None:
        """Record that halving eliminated a run; it reports nothing."""
        steps = run.progress.steps
        record.update(selection={"stopped_at_step": steps})
        reason = f"eliminated by pack.halving at step {steps}: others ranked higher on the selection split"
        record.finish("eliminated", reason)

    def _fail(self, error: Exception) -> None:
        """Close all runs that have not ended, after an error in something that they share."""
        for run in self.running:
            run.progress.error = error
            self._close(run)

    def _interrupt(self, stop: BaseException) -> None:
        """Record the runs that have not ended as interrupted: the process was stopped, and they can be resumed.

        What is kept of a single run, and how to resume it, is a note of the exception. A record that cannot be written
        is reported and left.
        """
        reason = "stopped from outside"
        if isinstance(stop, CallbackStop):
            reason = f"a callback raised {type(stop.error).__name__}: {stop.error}"
        for run in self.running:
            assert run.record is not None
            try:
                run.record.finish("interrupted", reason)
            except RunFailedError as error:
                self.console.print(sanitise(error))
                continue
            if not self.in_sweep:
                step = run.folders[0].newest_step()
                kept = f"The run is kept up to step {step}." if step else "No step of the run is kept."
                stop.add_note(f"{kept} Resume it with: lora-bench train {shell_argument('resume', run.record.folder)}")

    def _run_of(self, member: int) -> PackedRun:
        return next(run for run in self.runs if member in run.numbers)

    def _trained_tasks(self, runs: Sequence[PackedRun]) -> dict[PackedRun, dict[str, TrainedTask]]:
        """Predict selection and every reported split of these runs, by task; all members are at their best states.

        Returns:
            The trained tasks of each run by name; empty without runs.
        """
        trained: dict[PackedRun, dict[str, TrainedTask]] = {run: {} for run in runs}
        for number, (name, task) in enumerate(self.inputs.tasks.items() if runs else ()):
            predicted = self._predict(name, task, [member for run in runs for member in run.learners(number)])
            for run in runs:
                learners = run.learners(number)
                trained[run][name] = TrainedTask(
                    self.pack,
                    run.experiment.by_task[name],
                    task,
                    [member.index for member in learners],
                    [best for member in learners if (best := member.progress.best) is not None],
                    {
                        split: (np.stack([scores[member.index] for member in learners]), seconds)
                        for split, (scores, seconds) in predicted.items()
                    },
                    self.processes,
                    self._print,
                )
        return trained

    def _predict(
        self, name: str, task: Task, members: Sequence[MemberRun]
    ) -> dict[str, tuple[dict[int, NDArray[Any]], float]]:
        """Return scores (N,) by member and the seconds taken, for selection and every reported split of a task.

        Scores of the selection split are those of each member's best evaluation. Checkpoints of version 0.1 do not
        hold them; then the split is predicted again.
        """
        predicted = {}
        numbers = [member.index for member in members]
        best = {member.index: member.progress.scores.get(name) for member in members}
        is_known = all(scores is not None and len(scores) == len(task.tables["selection"]) for scores in best.values())
        with self.pack.only(numbers):
            for split in ("selection", *task.reported):
                began = time.perf_counter()
                if split == "selection" and is_known:
                    by_member = {k: scores for k, scores in best.items() if scores is not None}
                else:
                    batch_size = self.runs[0].experiment.trainer.eval_batch_size
                    scores = predict(self.pack, task.tables[split], batch_size, self.processes)  # (K, N)
                    by_member = dict(zip(numbers, scores, strict=True))
                predicted[split] = by_member, round(time.perf_counter() - began, 3)
        return predicted

    def _report(self, run: PackedRun, trained: Mapping[str, TrainedTask]) -> None:
        """Write metrics, predictions and adapters; of several tasks in a folder each."""
        record, experiment = run.record, run.experiment
        assert record is not None
        if not experiment.tasks:
            trained[""].report(record)
            trained[""].save(record)
            return
        sections = {}
        for number, (name, task) in enumerate(trained.items()):
            learners = run.learners(number)
            task_cost = run.cost(learners, exclusive=False) if experiment.has_adapter_per_task else {}
            sections[name] = {
                "data": task.task.described,
                "params": run.parameters(learners, one_head=True),
                "targets": run.ranks(learners),
                "environment": record.record["environment"],
                "cost": record.record["cost"] | task_cost,
            }
        report_tasks(record, trained, sections)

    def _record_cost(self, run: PackedRun) -> None:
        """Record a run's costs and the rank of each target, which the method may have reduced.

        Seconds and memory are null unless the run had the pack and the device to itself.
        """
        assert run.record is not None
        exclusive = run.pack_size == len(run.numbers) and self.sharing == 1
        run.record.update(cost=run.cost(exclusive=exclusive), targets=run.ranks())  # a method may have pruned

    def _record_micro_batches(self, run: PackedRun) -> None:
        """Record the pairs per forward pass in training and in evaluation, as `cost` of the record.

        A note is printed for each number that is smaller than requested because memory did not suffice.
        """
        assert run.record is not None
        trainer, fitting = run.experiment.trainer, self.pack.max_micro_batch
        sizes = {
            "micro_batch_size": fitting.get("training", trainer.micro_batch_size),
            "eval_batch_size": fitting.get("evaluation", trainer.eval_batch_size),
        }
        run.record.update(cost=sizes)
        for key, pairs in sizes.items():
            if pairs != getattr(trainer, key):
                self.console.print(
                    sanitise(f"note: memory did not suffice, so the run continued with trainer.{key}={pairs}.")
                )

    def _print(self, line: str) -> None:
        if not self.in_sweep:
            self.console.print(sanitise(line))


def _refuse_other_inputs(before: Mapping[str, Any], inputs: SharedInputs) -> list[str]:
    """Refuse to resume a run with other data, another backbone or a tokenizer that gives other token ids.

    What the record does not hold is not compared.

    Args:
        before: the record of the run.
        inputs: of the resumed run.

    Returns:
        Notes on differences that do not change the inputs.

    Raises:
        UserError: they are not the inputs that the run was started with.
    """
    for split, fingerprint in before["data"].get("fingerprint", {}).items():
        if inputs.described["fingerprint"].get(split) != fingerprint:
            raise UserError(
                f"the {split} split is not the one that the run was started with", key="resume", code=Code.MISMATCH
            )
    if before["environment"].get("backbone_sha256") not in (None, inputs.backbone_sha256):
        raise UserError("the backbone is not the one that the run was started with", key="resume", code=Code.MISMATCH)

    def refusal(reason: str, remedy: str) -> UserError:
        return UserError(reason, key="resume", remedy=remedy, code=Code.NOT_RESUMABLE)

    return refuse_other_tokenizer(before["environment"], inputs.backbone.tokenizer_identity, refusal)


def _describe_weights(sizes: Mapping[str, int]) -> list[str]:
    """Return sentences on the result of `PackState.weight_bytes`, for the user."""
    if not sizes:
        return []
    text = {key: format_number(size, "B") for key, size in sizes.items()}
    linears, embeddings = text["backbone_linears_bytes"], text["backbone_embeddings_bytes"]
    fp32 = format_number(2 * sizes["backbone_bf16_bytes"], "B")
    notes = [
        f"the backbone takes {text['backbone_bytes']}, of it {linears} for linears and {embeddings} for embeddings; "
        f"in bf16 it would take {text['backbone_bf16_bytes']}, in fp32 {fp32}."
    ]
    if "quantized_codes_bytes" in text:
        codes, scales = text["quantized_codes_bytes"], text["quantized_scales_bytes"]
        bf16 = text["quantized_bf16_bytes"]
        notes.insert(
            0, f"quantised linears: {codes} of codes and {scales} of scales are held instead of {bf16} in bf16."
        )
    return notes


def _notes(run: PackedRun, record: Mapping[str, Any]) -> list[str]:
    """Return notes for the user on a run before it trains; an empty list if there are none.

    They are the warnings in the record (on the data, the backbone and initialisations), settings that reverse texts
    whose order matters, a `trainer.stop_at` that cannot stop it, and the alternatives of `adapter.target_modules` that
    match no linear.
    """
    notes = list(record["data"]["warnings"])
    order_notes = (order_note(single.trainer, single.data.relation) for single in run.experiment.by_task.values())
    notes += [note for note in order_notes if note]
    evaluations = run.members[0].schedule.evaluations
    if run.experiment.trainer.stop_at is not None and evaluations <= EVALUATIONS_AT_TARGET:
        needed = f"trainer.stop_at stops a run after {EVALUATIONS_AT_TARGET} evaluations in a row that reach it"
        notes.append(f"{needed}, and this run has {evaluations} in all; a smaller trainer.eval_every lets it stop.")
    pattern = getattr(run.experiment.adapter, "target_modules", "all")
    for alternative in unmatched_alternatives(pattern, list(record["targets"])):
        notes.append(f"adapter.target_modules: no linear matches {alternative!r}.")
    return notes
