"""The records of a pack's members, each written as if it had trained alone: begun, logged, scored and ended apart."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench import environment
from lora_bench.adapters import peft_format
from lora_bench.adapters.targets import unmatched_alternatives
from lora_bench.backbones.load import public_place
from lora_bench.besides import score_besides
from lora_bench.data.pairs import tokenize
from lora_bench.errors import RunFailedError, UserError
from lora_bench.evaluation.calibration import fit_temperature, score_calibrated
from lora_bench.evaluation.cost import peak_memory_bytes
from lora_bench.evaluation.metrics import score
from lora_bench.progress import show_result
from lora_bench.record import Run
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


@dataclass(frozen=True)
class Preparation:
    """What came before the first step and cost something."""

    seconds: float
    """Of looking at data: starts and ranks."""
    flops: float
    prefix_seconds: float | None = None
    """Of making what the frozen prefix makes of the pairs; None where that is not kept."""
    prefix_flops: float | None = None

    @property
    def all_seconds(self) -> float:
        return self.seconds + (self.prefix_seconds or 0)


@dataclass
class Recorder:
    """Keeps the run folders of a pack's members; what one of them cannot be given ends that member alone.

    Args:
        pack, common: what trains, on what.
        jobs, experiments, outcomes, preparations, checkpoints, pack_sizes: one per member.
        console: where to tell how runs end.
        brief: one line for a result instead of a table.
    """

    pack: Pack
    common: Common
    jobs: Sequence[Job]
    experiments: Sequence[Experiment]
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
    """Those that have begun and not ended."""
    display: Display | None = None

    def begin(self, member: int, newest: Checkpoint | None) -> None:
        """Claim the member's folder, or set its record back to the checkpoint that it goes on from."""
        job, common = self.jobs[member], self.common
        if job.begun:
            _refuse_another(job.begun.record, common)
        run = job.begun or Run.claim(job.folder, choices=job.choices, config=job.config, overrides=job.overrides)
        self.runs[member] = run
        if job.begun:
            run.rewind(newest.step if newest else 0)
        run.update(
            data=common.described,
            params=self.pack.count_parameters(member),
            targets=self.pack.ranks(member),
            environment={
                **environment.describe(),
                "device": str(common.backbone.device),
                "precision": str(common.backbone.compute_dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "processes": self.processes.size,
                "backbone_sha256": common.backbone_sha256,
            },
        )
        self.runs[member] = follow(run, self.experiments[member].trackers if self.processes.leads else {}, self.console)

    def notes(self) -> list[str]:
        """What the user should know before the members train."""
        found = []
        for member, run in self.runs.items():
            found += _notes(self.experiments[member], run.record)
            found += [f"passed over a damaged checkpoint, {what}" for what in self.checkpoints[member].damaged]
        return list(dict.fromkeys(found))

    # -- while they train --

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        for member, loss in losses.items():
            if isinstance(run := self.runs.get(member), TrackedRun):
                run.stepped(loss)
        if self.display:
            self.display.stepped(step, losses, pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        self.runs[member].log(line)
        if self.display:
            self.display.evaluated(member, line)

    # -- when they end --

    def ended(self, members: Sequence[int]) -> None:
        """Score, save and close the runs of members that training is over for."""
        done = [k for k in members if self.outcomes[k].status == "done"]
        predicted = self._predict(done) if done else []
        for k in members:
            with contained(self.outcomes[k]):
                self._record_cost(k)
                self._tell_room(k)
                if k in done:
                    self._evaluate(k, {name: (scores[done.index(k)], spent) for name, scores, spent in predicted})
                    place = public_place(self.experiments[k].model)
                    peft_format.save(self.runs[k].adapter_folder, self.pack, k, place)
            self.close(k)

    def close(self, member: int) -> None:
        """Say in the member's record how it ended; a traceback goes to its log."""
        run, outcome = self.runs.pop(member), self.outcomes[member]
        if outcome.status == "stopped":
            with contained(outcome):
                self._close_stopped(run, self.jobs[member], outcome)
                return
        if outcome.error is None:
            with contained(outcome):
                run.finish("done")
                self.checkpoints[member].clear()
                title = self.jobs[member].title if len(self.jobs) > 1 else ""
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
        for member in list(self.runs):
            self.outcomes[member].error = error
            self.close(member)

    def interrupt(self) -> None:
        """Someone stopped the process: the runs that have not ended can be gone on with."""
        for run in self.runs.values():
            with suppress(RunFailedError):
                run.finish("interrupted", "stopped from outside")
            if not self.brief:
                self.console.print(shown(f"go on with: lora-bench train resume={run.folder}"), soft_wrap=True)

    def _predict(self, members: Sequence[int]) -> list[tuple[str, NDArray[Any], float]]:
        """Selection and each reported split, its scores (K, N) at the members' best states, and the seconds taken."""
        found = []
        with self.pack.only(members):
            for name in ("selection", *self.common.reported):
                began = time.perf_counter()
                table, size = self.common.tables[name], self.experiments[0].trainer.eval_batch_size
                scores = predict(self.pack, table, size, self.processes)
                found.append((name, scores, round(time.perf_counter() - began, 3)))
        return found

    def _evaluate(self, member: int, predicted: Mapping[str, tuple[NDArray[Any], float]]) -> None:
        """Every reported split is scored once, with the member's best state."""
        run, outcome = self.runs[member], self.outcomes[member]
        assert outcome.best is not None
        best = {key: outcome.best[key] for key in ("step", "epoch")}
        metrics = {f"selection/{name}": value for name, value in outcome.best["metrics"].items()}
        selection = self.common.tables["selection"].labels
        assert selection is not None
        temperature = fit_temperature(predicted["selection"][0], selection)
        for name in self.common.reported:
            scores, seconds = predicted[name]
            table = self.common.tables[name]
            assert table.labels is not None
            values = score(scores, table.labels, self.experiments[member].metrics)
            more = score_calibrated(scores, table.labels, temperature)
            more |= self._besides(member, name, scores) if self.common.splits else {}
            metrics |= {f"{name}/{key}": value for key, value in (values | more).items()}
            run.log({**best, "split": name, "metrics": values, "seconds": seconds})
            run.write_predictions(name, table.ids, table.labels, scores)
        run.update(metrics=metrics, selection={**best, "metric": "mcc", "temperature": temperature})

    def _besides(self, member: int, name: str, scores: NDArray[Any]) -> dict[str, float | None]:
        """A reported split on its unseen rows and perturbed, as far as the settings ask for it."""
        data, splits, backbone = self.experiments[member].data, self.common.splits, self.common.backbone

        def scored(examples: Examples) -> NDArray[Any]:
            table = tokenize(examples, data.text_columns, backbone, data.max_length, cached=False)
            with self.pack.only([member]):
                size = self.experiments[member].trainer.eval_batch_size
                (found,) = predict(self.pack, table, size, self.processes)
            return found  # type: ignore[no-any-return]

        seen, metrics = (splits["train"], splits["selection"]), self.experiments[member].metrics
        return score_besides(data, splits[name], scores, scored, seen=seen, metrics=metrics, tell=self._tell)

    def _tell(self, line: str) -> None:
        if not self.brief:
            self.console.print(shown(line))

    def _record_cost(self, member: int) -> None:
        """Seconds and FLOPs of training hold those of preparation (a start that looks at data is not free) and of the
        kept prefix.

        Seconds and memory of a pack are no member's own, so there they are null.
        """
        outcome, preparation, alone = self.outcomes[member], self.preparations[member], self.pack_sizes[member] == 1
        rate = outcome.pairs / outcome.seconds if outcome.seconds else None
        self.runs[member].update(
            cost={
                "train_seconds": preparation.all_seconds + outcome.seconds if alone else None,
                "train_flops": preparation.flops + (preparation.prefix_flops or 0) + outcome.flops,
                "prepare_seconds": preparation.seconds if alone else None,
                "prefix_fill_seconds": preparation.prefix_seconds if alone else None,
                "prefix_fill_flops": preparation.prefix_flops,
                "peak_memory_bytes": peak_memory_bytes(self.common.backbone.device) if alone else None,
                "pairs_per_second": rate if alone else None,
                "steps": outcome.steps,
                "train_tokens": outcome.tokens,
                "train_padding_tokens": outcome.padding,
                "pack_size": self.pack_sizes[member],
            },
            targets=self.pack.ranks(member),  # a method may have pruned
        )

    def _tell_room(self, member: int) -> None:
        """Record the portions in which pairs went through the network, and tell where memory made them smaller."""
        trainer, room = self.experiments[member].trainer, self.pack.room
        found = {"micro_batch_size": trainer.micro_batch_size, "eval_batch_size": trainer.eval_batch_size}
        if "training" in room:
            found["micro_batch_size"] = room["training"]
        if "evaluation" in room:
            found["eval_batch_size"] = room["evaluation"]
        self.runs[member].update(cost=found)
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
