"""The records of a pack's runs, each written as if it had trained alone: begun, logged, scored and ended apart.

A run has one member of the pack, or those of its ensemble: they begin and end together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.adapters.targets import unmatched_alternatives
from lora_bench.backbones.identity import refuse_another
from lora_bench.console.progress import show_result
from lora_bench.console.text import shown
from lora_bench.errors import Code, LostFolderError, RunFailedError, UserError, argument
from lora_bench.evaluation.cost import peak_memory_bytes
from lora_bench.records import environment
from lora_bench.records.run_folder import Run
from lora_bench.run.final_evaluation import Learned, report_tasks
from lora_bench.tracking.base import TrackedRun, follow
from lora_bench.training.distributed import ALONE, Processes
from lora_bench.training.loop import predict
from lora_bench.training.training_state import contained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.console.progress import Display
    from lora_bench.records.job import Job
    from lora_bench.run.final_evaluation import Predicted
    from lora_bench.run.inputs import Common
    from lora_bench.run.settings import Experiment
    from lora_bench.training.checkpoint import Checkpoint, Checkpoints
    from lora_bench.training.training_state import Outcome


@dataclass(frozen=True)
class Preparation:
    """What came before the first step and cost something."""

    seconds: float
    """Of looking at data: starts and ranks."""
    flops: float
    prefix_seconds: float | None = None
    """Of making what the frozen prefix makes of the pairs; None where that is not kept."""
    prefix_flops: float | None = None
    notes: Sequence[str] = ()
    """What it could not look at, and what was done instead."""


@dataclass
class Recorder:
    """Keeps the run folders of a pack; what one run cannot be given ends that run alone.

    Args:
        pack, common: what trains, on what.
        jobs, experiments: one per run.
        parts: the pack's members of each run.
        outcomes, preparations, checkpoints, pack_sizes: one per member.
        console: where to tell how runs end.
        brief: one line for a result instead of a table.
    """

    pack: Pack
    common: Common
    jobs: Sequence[Job]
    experiments: Sequence[Experiment]
    parts: Sequence[Sequence[int]]
    outcomes: Sequence[Outcome]
    preparations: Sequence[Preparation]
    checkpoints: Sequence[Checkpoints]
    pack_sizes: Sequence[int]
    """Members that each trained with, at most."""
    console: Console
    processes: Processes = ALONE
    """Those that predict together."""
    sharing: int = 1
    """Processes that train at the same time on the device."""
    brief: bool = False
    runs: dict[int, Run] = field(default_factory=dict)
    """Those that have begun and not ended, by job."""
    display: Display | None = None
    resumed_elsewhere: list[str] = field(default_factory=list)
    """Notes on resumed runs whose environment has changed."""

    def outcome(self, job: int) -> Outcome:
        """What became of a job: of the member that ended it before its time, else of its first."""
        of_members = [self.outcomes[k] for k in self.parts[job]]
        return next((outcome for outcome in of_members if outcome.error is not None), of_members[0])

    def end_together(self, job: int) -> None:
        """What ends one member of a job before its time ends the others too."""
        ended = self.outcome(job)
        for k in self.parts[job]:
            if ended.error is not None and self.outcomes[k].status == "running":
                self.outcomes[k].status, self.outcomes[k].error = ended.status, ended.error

    def begin(self, job: int, newest: Checkpoint | None) -> None:
        """Claim the job's folder, or set its record back to the checkpoint that it goes on from."""
        asked, common = self.jobs[job], self.common
        if asked.sweep:
            asked.sweep.check()
        same_but = _refuse_another(asked.begun.record, common) if asked.begun else []
        run = asked.begun or Run.claim(
            asked.folder, choices=asked.choices, config=asked.config, overrides=asked.overrides
        )
        self.runs[job] = run
        for k in self.parts[job]:
            self.checkpoints[k].check = run.check
        if asked.begun:
            run.rewind(newest.step if newest else 0)
        notes = [note for k in self.parts[job] for note in self.preparations[k].notes]
        notes = [*common.backbone.notes, *notes, *same_but]
        warnings = list(dict.fromkeys([*common.described["warnings"], *notes]))
        run.update(
            data={**common.described, "warnings": warnings},
            params=self._params(self.parts[job]),
            targets=self._ranks(self.parts[job]),
            environment=self._environment(run.record["environment"], newest),
        )
        self.runs[job] = follow(run, self.experiments[job].trackers if self.processes.leads else {}, self.console)

    def _environment(self, before: Mapping[str, Any], newest: Checkpoint | None) -> dict[str, Any]:
        """The environment of the steps to come; of a resumed run also those of its earlier steps, where they differ."""
        found = {
            **environment.describe(),
            "device": str(self.common.backbone.device),
            "precision": str(self.common.backbone.compute_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
            "backbone_sha256": self.common.backbone_sha256,
            **self.common.backbone.tokenizer_identity,
        }
        earlier = environment.history(before, found, newest.step) if newest else []
        if newest and (changes := environment.changes(before, found)):
            self.resumed_elsewhere.append(f"resumed in another environment: {', '.join(changes)}")
        return found | {"history": earlier} if earlier or "history" in before else found

    def notes(self) -> list[str]:
        """What the user should know before the members train."""
        found = list(self.resumed_elsewhere)
        for job, run in self.runs.items():
            found += _notes(self.experiments[job], run.record)
            damaged = [what for k in self.parts[job] for what in self.checkpoints[k].damaged]
            found += [f"passed over a damaged checkpoint, {what}" for what in damaged]
        return list(dict.fromkeys(found))

    # -- while they train --

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        for job, run in self.runs.items():
            own = [losses[k] for k in self.parts[job] if k in losses]
            if own and isinstance(run, TrackedRun):
                run.stepped(sum(own) / len(own))
        if self.display:
            self.display.stepped(step, losses, pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        job = self._job_of(member)
        experiment, number = self.experiments[job], self.parts[job].index(member)
        whose = f"/member_{number}" if len(self.parts[job]) > 1 else ""
        if experiment.own_adapters:
            whose = f"/{list(experiment.tasks)[number]}"
        line = dict(line)
        of_tasks = line.pop("tasks", {})
        self.runs[job].log(line | {"split": line["split"] + whose})
        for name, metrics in of_tasks.items():
            self.runs[job].log(line | {"split": f"{line['split']}/{name}", "metrics": metrics})
        if self.display:
            self.display.evaluated(member, line)

    # -- when they end --

    def ended(self, members: Sequence[int]) -> None:
        """Score, save and close the runs that training is over for, now that these members have ended."""
        jobs = list(dict.fromkeys(self._job_of(k) for k in members))
        for job in jobs:
            self.end_together(job)
        over = [job for job in jobs if all(self.outcomes[k].status != "running" for k in self.parts[job])]
        done = [job for job in over if all(self.outcomes[k].status == "done" for k in self.parts[job])]
        learned = self._learned(done) if done else {}
        for job in over:
            with contained(self.outcome(job)):
                self._record_cost(job)
                self._tell_room(job)
                if job in done:
                    self._report(job, learned[job])
            self.close(job)

    def close(self, job: int) -> None:
        """Say in the job's record how it ended; a traceback goes to its log."""
        run, outcome = self.runs.pop(job), self.outcome(job)
        if outcome.status == "stopped":
            with contained(outcome):
                self._close_stopped(run, self.jobs[job], outcome)
                return
        if outcome.error is None:
            with contained(outcome):
                run.finish("done")
                for k in self.parts[job]:
                    self.checkpoints[k].clear()
                title = self.jobs[job].title if len(self.jobs) > 1 else ""
                show_result(self.console, run.folder, run.record, title=title, brief=self.brief)
        if outcome.error is not None:
            try:
                run.check()
            except LostFolderError as lost:  # whatever failed, failed for this
                outcome.error = lost
            run.fail(outcome.error)

    def _close_stopped(self, run: Run, job: Job, outcome: Outcome) -> None:
        """Halving stopped it: not done, and nothing is reported, but it can be gone on with."""
        reason = f"stopped by pack.halving at step {outcome.steps}: others had a better selection MCC"
        run.update(selection={"stopped_at_step": outcome.steps})
        run.finish("interrupted", reason)
        name = job.title.partition(":")[0]
        self.console.print(shown(f"{name}: {reason}; go on with it: lora-bench train {argument('resume', run.folder)}"))

    def fail(self, error: Exception) -> None:
        """What all members share has failed: close the runs that have not ended."""
        for job in list(self.runs):
            self.outcome(job).error = error
            self.close(job)

    def interrupt(self) -> None:
        """Someone stopped the process: the runs that have not ended can be gone on with."""
        for run in self.runs.values():
            try:
                run.finish("interrupted", "stopped from outside")
            except RunFailedError as error:
                self.console.print(shown(error))
                continue
            if not self.brief:
                self.console.print(
                    shown(f"go on with: lora-bench train {argument('resume', run.folder)}"), soft_wrap=True
                )

    def _job_of(self, member: int) -> int:
        return next(job for job, part in enumerate(self.parts) if member in part)

    def _learned(self, jobs: Sequence[int]) -> dict[int, dict[str, Learned]]:
        """What the members of these jobs say of selection and each reported split, by task; all are at their best."""
        found: dict[int, dict[str, Learned]] = {job: {} for job in jobs}
        size = self.experiments[0].trainer.eval_batch_size
        for number, (name, task) in enumerate(self.common.tasks.items()):
            own = {job: self._learners(job, number) for job in jobs}
            members = [k for part in own.values() for k in part]
            predicted: dict[int, Predicted] = {job: {} for job in jobs}
            with self.pack.only(members):
                for split in ("selection", *task.reported):
                    began = time.perf_counter()
                    scores = predict(self.pack, task.tables[split], size, self.processes)
                    seconds = round(time.perf_counter() - began, 3)
                    for job, part in own.items():
                        predicted[job][split] = scores[[members.index(k) for k in part]], seconds
            for job, part in own.items():
                found[job][name] = Learned(
                    self.pack,
                    self.experiments[job].each[name],
                    task,
                    part,
                    [best for k in part if (best := self.outcomes[k].best) is not None],
                    predicted[job],
                    self.processes,
                    self._tell,
                )
        return found

    def _learners(self, job: int, task: int) -> Sequence[int]:
        """The members of a job that learned its task of this number."""
        part = self.parts[job]
        return [part[task]] if self.experiments[job].own_adapters else part

    def _report(self, job: int, learned: Mapping[str, Learned]) -> None:
        """Figures, predictions and adapters; of several tasks in a folder each."""
        run, experiment = self.runs[job], self.experiments[job]
        if not experiment.tasks:
            learned[""].report(run)
            learned[""].save(run)
            return
        sections = {}
        for name, each in learned.items():
            own = experiment.own_adapters
            sections[name] = {
                "data": each.task.described,
                "params": self._params(each.members, one_head=True),
                "targets": self._ranks(each.members),
                "environment": run.record["environment"],
                "cost": run.record["cost"] | (self._cost(each.members, alone=False) if own else {}),
            }
        report_tasks(run, learned, sections)

    def _tell(self, line: str) -> None:
        if not self.brief:
            self.console.print(shown(line))

    def _params(self, part: Sequence[int], *, one_head: bool = False) -> dict[str, int]:
        """Numbers of parameters of a run's members, which have the backbone in common; with one of each one's heads."""
        counts = [self.pack.count_parameters(k, head=0 if one_head else None) for k in part]
        found = {name: sum(count[name] for count in counts) for name in ("adapter", "head", "trainable")}
        return found | {"total": counts[0]["total"] + found["trainable"] - counts[0]["trainable"]}

    def _ranks(self, part: Sequence[int]) -> dict[str, int | list[int]]:
        """The rank of each target; where members of a run differ in it, each one's."""
        of_each = [self.pack.ranks(k) for k in part]
        ranks = {name: [own[name] for own in of_each] for name in of_each[0]}
        return {name: own[0] if len(set(own)) == 1 else own for name, own in ranks.items()}

    def _record_cost(self, job: int) -> None:
        part = self.parts[job]
        cost = self._cost(part, alone=self.pack_sizes[part[0]] == len(part) and self.sharing == 1)
        self.runs[job].update(cost=cost, targets=self._ranks(part))  # a method may have pruned

    def _cost(self, part: Sequence[int], *, alone: bool) -> dict[str, Any]:
        """Seconds and FLOPs of training hold those of preparation (a start that looks at data is not free) and of the
        kept prefix.

        Seconds and memory are no run's own where it trains with others, in its pack or on its device, so there they
        are null.
        """
        outcomes, preparations = [self.outcomes[k] for k in part], [self.preparations[k] for k in part]
        over = sum if self.experiments[0].own_adapters else max  # members of an ensemble share batches
        seconds = over(outcome.seconds for outcome in outcomes)
        prepared = sum(preparation.seconds for preparation in preparations)
        filled, filling = preparations[0].prefix_seconds, preparations[0].prefix_flops  # once for all
        rate = over(outcome.pairs for outcome in outcomes) / seconds if seconds else None
        looking = sum(preparation.flops for preparation in preparations)
        return {
            "train_seconds": prepared + (filled or 0) + seconds if alone else None,
            "train_flops": sum(outcome.flops for outcome in outcomes) + looking + (filling or 0),
            "prepare_seconds": prepared if alone else None,
            "prepare_flops": looking,
            "prefix_fill_seconds": filled if alone else None,
            "prefix_fill_flops": filling,
            "peak_memory_bytes": peak_memory_bytes(self.common.backbone.device) if alone else None,
            "pairs_per_second": rate if alone else None,
            "steps": max(outcome.steps for outcome in outcomes),
            "train_tokens": sum(outcome.tokens for outcome in outcomes),
            "train_padding_tokens": sum(outcome.padding for outcome in outcomes),
            "pack_size": self.pack_sizes[part[0]],
        }

    def _tell_room(self, job: int) -> None:
        """Record the portions in which pairs went through the network, and tell where memory made them smaller."""
        trainer, room = self.experiments[job].trainer, self.pack.room
        found = {"micro_batch_size": trainer.micro_batch_size, "eval_batch_size": trainer.eval_batch_size}
        if "training" in room:
            found["micro_batch_size"] = room["training"]
        if "evaluation" in room:
            found["eval_batch_size"] = room["evaluation"]
        self.runs[job].update(cost=found)
        for key, pairs in found.items():
            if pairs != getattr(trainer, key):
                self.console.print(shown(f"note: memory was short, so the run went on with trainer.{key}={pairs}."))


def _refuse_another(began: Mapping[str, Any], common: Common) -> list[str]:
    """An interrupted run goes on with the data, the backbone and the tokenizer that it began with.

    Returns:
        Notes on what differs without changing anything.
    """
    for split, found in began["data"].get("fingerprint", {}).items():
        if common.described["fingerprint"].get(split) != found:
            raise UserError(
                f"the {split} split is not the one that the run began with", key="resume", code=Code.MISMATCH
            )
    if began["environment"].get("backbone_sha256") not in (None, common.backbone_sha256):
        raise UserError("the backbone is not the one that the run began with", key="resume", code=Code.MISMATCH)

    def refusal(reason: str, remedy: str) -> UserError:
        return UserError(reason, key="resume", remedy=remedy, code=Code.NOT_RESUMABLE)

    return refuse_another(began["environment"], common.backbone.tokenizer_identity, refusal)


def _notes(experiment: Experiment, record: Mapping[str, Any]) -> list[str]:
    """What the user should know of a run before it trains."""
    notes = list(record["data"]["warnings"])
    truncated = sum(record["data"]["truncated"].values())
    if truncated:
        limit = experiment.data.max_length
        notes.append(f"{truncated:,} pairs are longer than data.max_length={limit} and are truncated.")
    pattern = getattr(experiment.adapter, "target_modules", "all")
    for alternative in unmatched_alternatives(pattern, list(record["targets"])):
        notes.append(f"adapter.target_modules: no linear matches {alternative!r}.")
    return notes
