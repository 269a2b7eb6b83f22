"""One run of a pack: its job and settings, the members that it trains, and the record that it leaves."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch.utils.flop_counter import FlopCounterMode

from lora_bench.errors import Code, UserError
from lora_bench.evaluation.cost import peak_memory_bytes
from lora_bench.records.live_progress import ProgressWriter
from lora_bench.records.run_folder import CHECKPOINTS
from lora_bench.run.settings import Experiment
from lora_bench.run.warm_start import WarmStart
from lora_bench.training.checkpoint import Checkpoint, Checkpoints
from lora_bench.training.loop import prepare
from lora_bench.training.member_run import MemberProgress, MemberRun, isolate_failure
from lora_bench.training.precision import resolve_device, resolve_precision
from lora_bench.training.training_state import reject_foreign_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Trainer
    from lora_bench.records.job import Job
    from lora_bench.records.run_folder import Run
    from lora_bench.run.inputs import SharedInputs
    from lora_bench.training.task_mixture import TaskMixture


@dataclass(frozen=True)
class Preparation:
    """Costs and notes of a member's preparation before its first step."""

    seconds: float = 0.0
    """Seconds of data-driven initialisation and rank allocation."""
    flops: float = 0.0
    """FLOPs of these."""
    prefix_seconds: float | None = None
    """Seconds of computing the cached prefix; None if it is not cached."""
    prefix_flops: float | None = None
    notes: Sequence[str] = ()
    """Notes on initialisations that had too few pairs."""


@dataclass(eq=False)
class PackedRun:
    """One run of a pack.

    A run trains one member, one for each of its tasks, or those of its ensemble; they start and end together.

    Args:
        job: the request, and the folder of its record.
        experiment: its settings.
        numbers: of its members in the pack.
        folders: checkpoints of each member.
        resumed_from: the checkpoint of each member that the run is resumed from, all of one step; None: a new run.
    """

    job: Job
    experiment: Experiment
    numbers: range
    folders: list[Checkpoints]
    resumed_from: list[Checkpoint] | None = None
    warm_start: WarmStart | None = None
    """The finished run that its adapter is initialised from."""
    members: list[MemberRun] = field(default_factory=list)
    preparations: list[Preparation] = field(default_factory=list)
    pack_size: int = 0
    """Members of the largest pack that it trained in."""
    record: Run | None = None
    """Its folder, from the start of the run to its end."""

    @cached_property
    def live_progress(self) -> ProgressWriter:
        """The writer of the run's progress, which begins with the members' next step."""
        schedule = self.members[0].schedule
        return ProgressWriter(schedule.last_step, schedule.steps_per_epoch)

    # -- before a pack exists --

    @classmethod
    def open_all(cls, jobs: Sequence[Job]) -> list[PackedRun]:
        """Build the settings of these jobs and find the checkpoints that they are resumed from.

        Raises:
            UserError: a setting is wrong, a tracker is not installed, or a run cannot be resumed here or was edited.
        """
        experiments = [Experiment.of_job(job) for job in jobs]
        for experiment in experiments:
            for tracker in experiment.trackers.values():
                tracker.check()
        ends = list(accumulate(experiment.size for experiment in experiments))
        runs = [
            cls(
                job,
                experiment,
                range(end - experiment.size, end),
                Checkpoints.of_members(job.folder / CHECKPOINTS, experiment.size),
            )
            for job, experiment, end in zip(jobs, experiments, ends, strict=True)
        ]
        _find_checkpoints(runs)
        for run in runs:
            for checkpoint in run.resumed_from or ():
                run.job.check_record(checkpoint.metadata.get("config"))
                run.check_precision()
        return runs

    def check_precision(self) -> None:
        """Refuse to resume a run in another number format, which would mix two trainings in one result.

        A record that does not name its precision passes.
        """
        assert self.job.resumed is not None
        environment, trainer = self.job.resumed.record["environment"], self.experiment.trainer
        before = environment.get("precision")
        device = resolve_device(trainer.device)
        now = str(resolve_precision(trainer.precision, device)).removeprefix("torch.")
        if before in (None, now):
            return
        remedy = f"Resume it where it was interrupted, or start a new run with trainer.precision={trainer.precision}."
        if trainer.precision == "auto":
            remedy = "Resume it on a device of the same kind, or start a new run and give trainer.precision."
        raise UserError(
            f"the run was interrupted in {before} on {environment.get('device')}, and "
            f"trainer.precision={trainer.precision} is {now} on {device} here",
            key="resume",
            value=self.job.folder,
            remedy=remedy,
            code=Code.MISMATCH,
        )

    def adapters(self, inputs: SharedInputs) -> list[Member]:
        """Return the specifications of the run's members; on a warm start they have the ranks of the source run.

        `warm_start` is set from `adapter.init_from`, to None without it. If the run is resumed, `adapter.init_from` is
        not read: `warm_start` stays, and `prepare` takes the ranks from the checkpoints.

        Raises:
            UserError: the run is new and cannot be initialised from the one that `adapter.init_from` names.
        """
        if self.resumed_from is None:
            self.warm_start = WarmStart.of(self.experiment, inputs)
        ranks = self.warm_start.ranks if self.warm_start else None
        return inputs.with_classes(self.experiment).members(ranks)

    # -- before the first step --

    def prepare(self, pack: Pack, mixtures: Sequence[TaskMixture], trainer: Trainer) -> None:
        """Create the run's members, with the ranks of their checkpoints or after data-driven initialisation.

        The cost of initialisation is noted. Tensors of checkpoints are restored later. A warm start has loaded its
        tensors before; a head that it has not loaded is initialised. A failure of a data-driven initialisation ends
        this run only, by the status of its member.

        Raises:
            UserError: a checkpoint is not of this run.
        """
        progress = [MemberProgress() for _ in self.numbers]
        for i, k in enumerate(self.numbers):
            if self.resumed_from:
                self.preparations.append(_restore_ranks(pack, k, self.resumed_from[i]))
            elif self.warm_start and not self.warm_start.head_difference:
                self.preparations.append(Preparation())
            else:
                is_warm = self.warm_start is not None
                self.preparations.append(_initialise(pack, k, mixtures, trainer, progress[i], heads_only=is_warm))
        mixture_of = {k: mixture for mixture in mixtures for k in mixture.members}
        for k, member_progress in zip(self.numbers, progress, strict=True):
            member = MemberRun.start(pack, k, self.experiment.optimizer, mixture_of[k], trainer, member_progress)
            member.siblings = self.numbers
            self.members.append(member)
        sizes = [checkpoint.metadata["pack_size"] for checkpoint in self.resumed_from or ()]
        self.pack_size = max(pack.size, *sizes) if sizes else pack.size

    def note_prefix(self, seconds: float, flops: float) -> None:
        """Count the cost of the cached prefix, which is computed once for all members."""
        self.preparations = [
            replace(preparation, prefix_seconds=seconds, prefix_flops=flops) for preparation in self.preparations
        ]

    def open_checkpoints(self, flop_models: Sequence[Callable[[int, int], float]]) -> None:
        """Let each member save its checkpoints, with the metadata that a resumed run needs, and count its FLOPs.

        Args:
            flop_models: of each member of the pack.
        """
        config = self.record.record["config"] if self.record else None
        for member, folder, preparation in zip(self.members, self.folders, self.preparations, strict=True):
            metadata = {"preparation": asdict(preparation), "pack_size": self.pack_size, "config": config}
            member.checkpoints = replace(folder, metadata=metadata)
            member.flop_model = flop_models[member.index]

    # -- progress --

    @property
    def progress(self) -> MemberProgress:
        """The progress of the member that ended the run early, else of its first."""
        of_members = [member.progress for member in self.members]
        return next((progress for progress in of_members if progress.error is not None), of_members[0])

    def propagate_failure(self) -> None:
        """End the running members of the run if one of its members has failed, with its status and error."""
        decisive = self.progress
        for member in self.members:
            if decisive.error is not None and member.is_running:
                member.progress.status, member.progress.error = decisive.status, decisive.error

    @property
    def has_failed(self) -> bool:
        """True if a member has diverged or failed."""
        return self.progress.error is not None

    @property
    def has_ended(self) -> bool:
        """True if no member trains any more."""
        return not any(member.is_running for member in self.members)

    @property
    def is_done(self) -> bool:
        """True if all members have ended with status `done`."""
        return all(member.progress.status == "done" for member in self.members)

    def learners(self, task: int) -> list[MemberRun]:
        """Return the members that learned the task of this number."""
        return [self.members[task]] if self.experiment.has_adapter_per_task else self.members

    def member_name(self, member: int) -> str:
        """Return the name of a member within its run, for logs: the task that it alone learns, or `member_<i>`.

        It is empty where the run has one member.

        Args:
            member: its number in the pack.
        """
        number = self.numbers.index(member)
        if self.experiment.has_adapter_per_task:
            return list(self.experiment.tasks)[number]
        return f"member_{number}" if len(self.numbers) > 1 else ""

    def titles(self) -> list[str]:
        """Return the members' titles for the progress display, such as `job 3 member 0: seed=1`."""
        title, colon, overrides = self.job.title.partition(":")
        names = [f" {self.member_name(k).replace('_', ' ')}".rstrip() for k in self.numbers]
        if self.experiment.has_adapter_per_task:
            names = [f" {task}" for task in self.experiment.tasks]
        return [f"{title}{name}{colon}{overrides}".lstrip() for name in names]

    # -- parts of the record --

    def parameters(self, members: Sequence[MemberRun] | None = None, *, one_head: bool = False) -> dict[str, int]:
        """Count the parameters of these members (None: of all), which share the backbone: `total` counts it once.

        Args:
            members: of the run.
            one_head: count one head of each, where it has one for each task.
        """
        chosen = self.members if members is None else members
        counts = [member.pack.count_parameters(member.index, head=0 if one_head else None) for member in chosen]
        sums = {name: sum(count[name] for count in counts) for name in ("adapter", "head", "trainable")}
        return sums | {"total": counts[0]["total"] + sums["trainable"] - counts[0]["trainable"]}

    def ranks(self, members: Sequence[MemberRun] | None = None) -> dict[str, int | list[int]]:
        """Return the rank of each target module; a list where the members differ in it."""
        chosen = self.members if members is None else members
        by_member = [member.pack.ranks(member.index) for member in chosen]
        by_module = {name: [ranks[name] for ranks in by_member] for name in by_member[0]}
        return {name: ranks[0] if len(set(ranks)) == 1 else ranks for name, ranks in by_module.items()}

    def cost(self, members: Sequence[MemberRun] | None = None, *, exclusive: bool) -> dict[str, Any]:
        """Return the training cost of these members (None: of all).

        Seconds and FLOPs of training include data-driven initialisation and the cached prefix. Members of an ensemble
        share batches, so the longest seconds of one count; those with an adapter for each task are added. FLOPs and
        tokens are added.

        Args:
            members: of the run.
            exclusive: whether nothing else trained on the device; otherwise seconds and memory are null.
        """
        chosen = self.members if members is None else members
        progress = [member.progress for member in chosen]
        preparations = [self.preparations[self.numbers.index(member.index)] for member in chosen]
        over = sum if self.experiment.has_adapter_per_task else max  # members of an ensemble share batches
        seconds = over(member.seconds for member in progress)
        prepare_seconds = sum(preparation.seconds for preparation in preparations)
        prepare_flops = sum(preparation.flops for preparation in preparations)
        prefix_seconds, prefix_flops = preparations[0].prefix_seconds, preparations[0].prefix_flops  # computed once
        pairs_per_second = over(member.pairs for member in progress) / seconds if seconds else None
        device = chosen[0].pack.backbone.device
        return {
            "train_seconds": prepare_seconds + (prefix_seconds or 0) + seconds if exclusive else None,
            "train_flops": sum(member.flops for member in progress) + prepare_flops + (prefix_flops or 0),
            "prepare_seconds": prepare_seconds if exclusive else None,
            "prepare_flops": prepare_flops,
            "prefix_fill_seconds": prefix_seconds if exclusive else None,
            "prefix_fill_flops": prefix_flops,
            "peak_memory_bytes": peak_memory_bytes(device) if exclusive else None,
            "pairs_per_second": pairs_per_second if exclusive else None,
            "steps": max(member.steps for member in progress),
            "train_tokens": sum(member.tokens for member in progress),
            "train_padding_tokens": sum(member.padding for member in progress),
            "pack_size": self.pack_size,
        }


def _find_checkpoints(runs: Sequence[PackedRun]) -> None:
    """Set the checkpoints that runs are resumed from: the newest of one step that all members of all runs have.

    If a member of any run has none of that step, all runs start from their first step.
    """
    folders = [(run, folder) for run in runs for folder in run.folders]
    newest = [folder.newest() if run.job.resumed else None for run, folder in folders]
    if None in newest:
        return
    step = min(checkpoint.step for checkpoint in newest if checkpoint)
    of_step = [
        checkpoint if checkpoint and checkpoint.step == step else folder.newest(step)
        for checkpoint, (_, folder) in zip(newest, folders, strict=True)
    ]
    complete = [checkpoint for checkpoint in of_step if checkpoint and checkpoint.step == step]
    if len(complete) == len(folders):
        for run in runs:
            run.resumed_from = complete[run.numbers.start : run.numbers.stop]


def _restore_ranks(pack: Pack, member: int, checkpoint: Checkpoint) -> Preparation:
    """Give a member the ranks of its checkpoint, and return the cost of its preparation as it was then.

    Raises:
        UserError: the checkpoint is not of this run.
    """
    with reject_foreign_checkpoint():
        if checkpoint.metadata["ranks"]:
            pack.set_ranks(member, checkpoint.metadata["ranks"])
        return Preparation(**checkpoint.metadata["preparation"])


def _initialise(
    pack: Pack,
    member: int,
    mixtures: Sequence[TaskMixture],
    trainer: Trainer,
    progress: MemberProgress,
    *,
    heads_only: bool,
) -> Preparation:
    """Run a member's data-driven initialisation, if its settings ask for one, and return its cost.

    An exception is not raised: it ends the member, in `progress`. With `heads_only` the adapter stays as it is.
    """
    began, notes = time.perf_counter(), list[str]()
    with isolate_failure(progress), FlopCounterMode(display=False) as counter:
        notes = prepare(pack, trainer, mixtures, [member], heads_only=heads_only)
    return Preparation(time.perf_counter() - began, counter.get_total_flops(), notes=notes)
