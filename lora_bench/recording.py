"""The records of a pack's runs, each written as if it had trained alone: begun, logged, scored and ended apart.

A run has one member of the pack, or those of its ensemble: they begin and end together.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lora_bench import environment
from lora_bench.adapters import peft_format
from lora_bench.adapters.targets import unmatched_alternatives
from lora_bench.backbones.load import public_place
from lora_bench.besides import score_besides
from lora_bench.data.pairs import scoring_table
from lora_bench.errors import RunFailedError, UserError
from lora_bench.evaluation.calibration import fit_temperature, score_calibrated
from lora_bench.evaluation.cost import peak_memory_bytes
from lora_bench.evaluation.ensemble import score_members
from lora_bench.evaluation.metrics import score
from lora_bench.progress import show_result
from lora_bench.record import Run, adapter_folders
from lora_bench.screen import shown
from lora_bench.tracking.base import TrackedRun, follow
from lora_bench.training.distributed import ALONE, Processes
from lora_bench.training.loop import predict
from lora_bench.training.state import contained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from rich.console import Console

    from lora_bench.adapters.pack import Pack
    from lora_bench.data.examples import Examples
    from lora_bench.experiment import Common, Experiment
    from lora_bench.job import Job
    from lora_bench.progress import Display
    from lora_bench.training.checkpoint import Checkpoint, Checkpoints
    from lora_bench.training.state import Outcome


_Predicted: TypeAlias = "dict[str, tuple[NDArray[Any], float]]"
"""By split: scores (M, N) of a run's members, and the seconds taken."""


@dataclass(frozen=True)
class Preparation:
    """What came before the first step and cost something."""

    seconds: float
    """Of looking at data: starts and ranks."""
    flops: float
    prefix_seconds: float | None = None
    """Of making what the frozen prefix makes of the pairs; None where that is not kept."""
    prefix_flops: float | None = None


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
    brief: bool = False
    runs: dict[int, Run] = field(default_factory=dict)
    """Those that have begun and not ended, by job."""
    display: Display | None = None

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
        if asked.begun:
            _refuse_another(asked.begun.record, common)
        run = asked.begun or Run.claim(
            asked.folder, choices=asked.choices, config=asked.config, overrides=asked.overrides
        )
        self.runs[job] = run
        if asked.begun:
            run.rewind(newest.step if newest else 0)
        run.update(
            data=common.described,
            params=self._params(job),
            targets=self._ranks(job),
            environment={
                **environment.describe(),
                "device": str(common.backbone.device),
                "precision": str(common.backbone.compute_dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "processes": self.processes.size,
                "backbone_sha256": common.backbone_sha256,
            },
        )
        self.runs[job] = follow(run, self.experiments[job].trackers if self.processes.leads else {}, self.console)

    def notes(self) -> list[str]:
        """What the user should know before the members train."""
        found = []
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
        part = self.parts[job]
        whose = f"/member_{part.index(member)}" if len(part) > 1 else ""
        self.runs[job].log(line | {"split": line["split"] + whose})
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
        predicted = self._predict(done) if done else {}
        for job in over:
            with contained(self.outcome(job)):
                self._record_cost(job)
                self._tell_room(job)
                if job in done:
                    self._evaluate(job, predicted[job])
                    self._save(job)
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
            if not run.folder.exists():
                outcome.error = RunFailedError("was deleted or moved while the run trained", file=run.folder)
            run.fail(outcome.error)

    def _close_stopped(self, run: Run, job: Job, outcome: Outcome) -> None:
        """Halving stopped it: not done, and nothing is reported, but it can be gone on with."""
        reason = f"stopped by pack.halving at step {outcome.steps}: others had a better selection MCC"
        run.update(selection={"stopped_at_step": outcome.steps})
        run.finish("interrupted", reason)
        name = job.title.partition(":")[0]
        self.console.print(shown(f"{name}: {reason}; go on with it: lora-bench train resume={run.folder}"))

    def fail(self, error: Exception) -> None:
        """What all members share has failed: close the runs that have not ended."""
        for job in list(self.runs):
            self.outcome(job).error = error
            self.close(job)

    def interrupt(self) -> None:
        """Someone stopped the process: the runs that have not ended can be gone on with."""
        for run in self.runs.values():
            with suppress(RunFailedError):
                run.finish("interrupted", "stopped from outside")
            if not self.brief:
                self.console.print(shown(f"go on with: lora-bench train resume={run.folder}"), soft_wrap=True)

    def _job_of(self, member: int) -> int:
        return next(job for job, part in enumerate(self.parts) if member in part)

    def _predict(self, jobs: Sequence[int]) -> dict[int, _Predicted]:
        """Selection and each reported split of these jobs: scores (M, N) of each one's members, and the seconds taken.

        All members are at their best states.
        """
        members = [k for job in jobs for k in self.parts[job]]
        found: dict[int, _Predicted] = {job: {} for job in jobs}
        with self.pack.only(members):
            for name in ("selection", *self.common.reported):
                began = time.perf_counter()
                table, size = self.common.tables[name], self.experiments[0].trainer.eval_batch_size
                scores = predict(self.pack, table, size, self.processes)
                seconds = round(time.perf_counter() - began, 3)
                for job in jobs:
                    found[job][name] = scores[[members.index(k) for k in self.parts[job]]], seconds
        return found

    def _evaluate(self, job: int, predicted: _Predicted) -> None:
        """Every reported split is scored once, with the best state; an ensemble's by its members' mean probability."""
        run, extra = self.runs[job], self.experiments[job].metrics
        bests = [self.outcomes[k].best for k in self.parts[job]]
        looks = [{key: best[key] for key in ("step", "epoch")} for best in bests if best is not None]
        best = max(looks, key=lambda look: look["step"])
        selected, _ = predicted["selection"]  # (M, N)
        labels = self.common.tables["selection"].labels
        assert labels is not None
        temperature = fit_temperature(selected.mean(axis=0), labels)
        chosen: dict[str, Any] = {**best, "metric": "mcc", "temperature": temperature}
        of_each: list[float] = []
        if len(looks) > 1:
            values = score(selected.mean(axis=0), labels, extra)
            of_each = [fit_temperature(own, labels) for own in selected]
            own = [look | {"temperature": fitted} for look, fitted in zip(looks, of_each, strict=True)]
            chosen["members"] = own
        else:
            assert bests[0] is not None
            values = bests[0]["metrics"]
        metrics = {f"selection/{name}": value for name, value in values.items()}
        for name in self.common.reported:
            scores, seconds = predicted[name]
            pooled, table = scores.mean(axis=0), self.common.tables[name]
            assert table.labels is not None
            values = score(pooled, table.labels, extra)
            more = score_calibrated(pooled, table.labels, temperature)
            if of_each:
                more |= score_members(scores, table.labels, extra, of_each)
            more |= self._besides(job, name, pooled) if self.common.splits else {}
            metrics |= {f"{name}/{key}": value for key, value in (values | more).items()}
            run.log({**best, "split": name, "metrics": values, "seconds": seconds})
            run.write_predictions(name, table.ids, table.labels, pooled)
        run.update(metrics=metrics, selection=chosen)

    def _besides(self, job: int, name: str, scores: NDArray[Any]) -> dict[str, float | None]:
        """A reported split on its unseen rows and perturbed, as far as the settings ask for it."""
        data, trainer, splits = self.experiments[job].data, self.experiments[job].trainer, self.common.splits
        both = trainer.score_both_orders

        def scored(examples: Examples) -> NDArray[Any]:
            table = scoring_table(examples, data, self.common.backbone, both_orders=both, cached=False)
            with self.pack.only(self.parts[job]):
                found = predict(self.pack, table, trainer.eval_batch_size, self.processes)
            return found.mean(axis=0)  # type: ignore[no-any-return]

        seen, metrics = (splits["train"], splits["selection"]), self.experiments[job].metrics
        return score_besides(data, splits[name], scores, scored, seen=seen, metrics=metrics, tell=self._tell)

    def _save(self, job: int) -> None:
        """Each member's adapter and head."""
        part, run = self.parts[job], self.runs[job]
        folders = adapter_folders(run.folder, len(part))
        if len(part) > 1:
            folders[0].parent.mkdir(exist_ok=True)
        for k, folder in zip(part, folders, strict=True):
            peft_format.save(folder, self.pack, k, public_place(self.experiments[job].model))

    def _tell(self, line: str) -> None:
        if not self.brief:
            self.console.print(shown(line))

    def _params(self, job: int) -> dict[str, int]:
        """Numbers of parameters; an ensemble's members have the backbone in common."""
        counts = [self.pack.count_parameters(k) for k in self.parts[job]]
        found = {name: sum(count[name] for count in counts) for name in ("adapter", "head", "trainable")}
        return found | {"total": counts[0]["total"] + found["trainable"] - counts[0]["trainable"]}

    def _ranks(self, job: int) -> dict[str, int | list[int]]:
        """The rank of each target; where members of an ensemble differ in it, each one's."""
        of_each = [self.pack.ranks(k) for k in self.parts[job]]
        ranks = {name: [own[name] for own in of_each] for name in of_each[0]}
        return {name: own[0] if len(set(own)) == 1 else own for name, own in ranks.items()}

    def _record_cost(self, job: int) -> None:
        """Seconds and FLOPs of training hold those of preparation (a start that looks at data is not free) and of the
        kept prefix.

        Seconds and memory of a pack are no run's own where it trains with others, so there they are null.
        """
        part = self.parts[job]
        outcomes, preparations = [self.outcomes[k] for k in part], [self.preparations[k] for k in part]
        alone = self.pack_sizes[part[0]] == len(part)
        seconds = max(outcome.seconds for outcome in outcomes)
        prepared = sum(preparation.seconds for preparation in preparations)
        filled, filling = preparations[0].prefix_seconds, preparations[0].prefix_flops  # once for all
        rate = max(outcome.pairs for outcome in outcomes) / seconds if seconds else None
        looking = sum(preparation.flops for preparation in preparations)
        self.runs[job].update(
            cost={
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
            },
            targets=self._ranks(job),  # a method may have pruned
        )

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


def _refuse_another(began: Mapping[str, Any], common: Common) -> None:
    """An interrupted run goes on with the data and the backbone that it began with."""
    for split, found in began["data"].get("fingerprint", {}).items():
        if common.described["fingerprint"].get(split) != found:
            raise UserError(f"the {split} split is not the one that the run began with", key="resume")
    if began["environment"].get("backbone_sha256") not in (None, common.backbone_sha256):
        raise UserError("the backbone is not the one that the run began with", key="resume")


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
