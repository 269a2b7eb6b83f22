"""Packing of a sweep's jobs: groups that may share a backbone, cut into packs that fit the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.pack.pack import Pack, cpu_group_size
from lora_bench.config.canonical import settings_hash
from lora_bench.console.format import format_number
from lora_bench.console.progress import JobsDisplay
from lora_bench.console.sweep_progress import job_name
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.records.run_folder import CHECKPOINTS, Run
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.settings import Experiment
from lora_bench.train import train_pack
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.checkpointing import set_checkpointing
from lora_bench.training.dummy_step import saved_bytes
from lora_bench.training.memory import TRANSIENT, free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from lora_bench.adapters.base import Adapter
    from lora_bench.console.progress import DisplayFactory
    from lora_bench.records.job import Job

SHARE_OF_FREE = 0.75
"""Share of the free memory that a pack may take when it starts."""
BYTES_PER_PARAMETER = 6 * 4
"""Bytes of a trained parameter in fp32: value, gradient, AdamW's two moments, best value and average."""


@dataclass(frozen=True)
class Group:
    """Jobs that may share a backbone."""

    jobs: list[Job]
    experiments: list[Experiment]
    """Settings of each job."""
    single_reason: str = ""
    """Why this one job is trained as a single run; empty for a group."""


def train_jobs(
    jobs: Sequence[Job],
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    *,
    display: DisplayFactory = JobsDisplay,
    sharing: int = 1,
) -> None:
    """Train the jobs of a sweep; those that may share a backbone are trained as packs.

    An error in what a group shares, such as its data, ends all jobs of the group and is not raised.

    Args:
        jobs: of one sweep, checked.
        console: receives the messages.
        ended: called with each job when it has ended, and the error that ended it early or None.
        display: makes the progress display of a pack.
        sharing: processes that train packs on the same device at the same time.
    """
    groups = group_jobs(jobs)
    _print_single_jobs(groups, console)
    for group in groups:
        halving = group.experiments[0].pack.halving
        try:
            inputs = SharedInputs.load(group.experiments[0])
            packs = split_into_packs(group, inputs, ended, sharing)
        except Exception as error:
            for job in group.jobs:
                ended(job, error)
            continue
        if halving and len(packs) > 1:
            console.print(f"note: pack.halving keeps one job of each pack, and there are {len(packs)} packs")
        for pack in packs:
            _train(pack, inputs, console, ended, display, sharing)


def _print_single_jobs(groups: Sequence[Group], console: Console) -> None:
    """Print which jobs are trained as single runs, in one line for each reason."""
    numbers_by_reason: dict[str, list[str]] = {}
    for group in groups:
        for job, experiment in zip(group.jobs, group.experiments, strict=True):
            reason = group.single_reason or (
                _EXTERNAL if experiment.adapter.is_external and len(group.jobs) > 1 else ""
            )
            if reason:
                consequence = ", so pack.halving does not eliminate it" if experiment.pack.halving else ""
                number = job_name(job.title).removeprefix("job ")
                numbers_by_reason.setdefault(f"{reason}{consequence}", []).append(number)
    for reason, numbers in numbers_by_reason.items():
        few = numbers if len(numbers) <= _MAX_NUMBERS else [*numbers[:_MAX_NUMBERS], "…"]
        verb = "runs alone" if len(numbers) == 1 else "run one by one"
        console.print(sanitise(f"note: job {', '.join(few)} {verb}: {reason}"))


_EXTERNAL = "PEFT's layers compute one adapter at a time; the loaded backbone is shared"
_MAX_NUMBERS = 12
"""Maximum jobs that a note names."""


def group_jobs(jobs: Sequence[Job]) -> list[Group]:
    """Group the jobs that may share a backbone, in the order of the jobs.

    They have equal model, data, trainer, metrics and pack settings, and start or resume at the same step; of a
    quantised model, also equal linears that the adapter quantises. With a method that trains the backbone, or
    `pack.size=1`, each job is a group by itself. Of several groups, one of a single job has a `single_reason`.

    Raises:
        UserError: the settings of a job are wrong.
    """
    experiments = [Experiment.of_job(job) for job in jobs]
    shared = [
        settings_hash((e.model, e.data, e.tasks, e.trainer, e.metrics, e.pack, _weights_of_adapter(e)))
        for e in experiments
    ]
    steps_by_job = [_resumable_steps(job, experiment) for job, experiment in zip(jobs, experiments, strict=True)]
    newest: dict[str, set[int]] = {}
    for settings, steps in zip(shared, steps_by_job, strict=True):
        newest.setdefault(settings, set()).add(steps[0])
    groups: dict[str, Group] = {}
    for job, experiment, settings, steps in zip(jobs, experiments, shared, steps_by_job, strict=True):
        step = min(newest[settings] & set(steps))  # after a kill between their checkpoints, the previous one
        reason = ""
        if experiment.adapter.trains_backbone:
            reason = f"{experiment.adapter.method} trains the backbone itself"
        elif experiment.pack.size == 1:
            reason = "pack.size=1"
        key = settings_hash((settings, step, job.title if reason else ""))
        group = groups.setdefault(key, Group([], [], reason))
        group.jobs.append(job)
        group.experiments.append(experiment)
    if len(groups) < 2:
        return list(groups.values())
    reason = "no other job has its model, data and trainer"
    return [replace(g, single_reason=g.single_reason or reason) if len(g.jobs) == 1 else g for g in groups.values()]


def _weights_of_adapter(experiment: Experiment) -> tuple[str, Any] | None:
    """Return what chooses the linears whose weights a quantised model leaves to the adapter; None if it leaves none."""
    adapter = experiment.adapter
    if experiment.model.quantize is None or getattr(adapter, "quantize", None) is None:
        return None
    return adapter.target_modules, adapter.layers  # type: ignore[attr-defined]


def _resumable_steps(job: Job, experiment: Experiment) -> list[int]:
    """Return the steps that a job can be resumed from, at most two, the newest first; [0] without a checkpoint.

    Of an ensemble the checkpoints of the first member count.
    """
    if not job.resumed:
        return [0]
    checkpoints = Checkpoints.of_members(job.folder / CHECKPOINTS, experiment.size)[0]
    newest = checkpoints.newest()
    if newest is None:
        return [0]
    previous = checkpoints.newest(newest.step - 1)
    return [newest.step] + ([previous.step] if previous else [])


@dataclass(frozen=True)
class MemoryDemand:
    """The memory that a job adds to a pack, and the depth of its prefix."""

    persistent_bytes: float
    """Bytes held from step to step: parameters, gradients, optimizer state."""
    step_bytes: float
    """Further bytes of one member's step: saved activations."""
    depth: int
    """Number of layers below the first adapted one."""
    members: int = 1
    """Members that the job trains; above 1 in an ensemble."""


def split_into_packs(
    group: Group, inputs: SharedInputs, ended: Callable[[Job, Exception | None], None], sharing: int = 1
) -> list[list[Job]]:
    """Split a group into packs that fit this process's share of the memory.

    Members of a pack have prefixes of equal depth, which they compute once or read from the cache. A job whose method
    is computed by another library gets a pack of its own. On a CPU jobs without a prefix gain only by passing the
    layers together: a pack of them is one such group, unless `pack.size` or `pack.halving` requests other packs.

    Args:
        group: jobs that may share a backbone.
        inputs: the backbone and data of the group.
        ended: called with each job whose adapter does not fit the backbone, and the error.
        sharing: processes that train packs on the same device at the same time.

    Returns:
        The jobs of each pack.
    """
    jobs_by_depth: dict[tuple[int, bool], list[tuple[Job, MemoryDemand]]] = {}
    measured: dict[str, MemoryDemand] = {}
    for job, experiment in zip(group.jobs, group.experiments, strict=True):
        key = settings_hash((experiment.adapter, experiment.head, experiment.size))
        try:
            if key not in measured:
                measured[key] = memory_demand(inputs, experiment)
        except Exception as error:
            ended(job, error)
            continue
        depth_and_library = measured[key].depth, experiment.adapter.is_external
        jobs_by_depth.setdefault(depth_and_library, []).append((job, measured[key]))
    settings = group.experiments[0].pack
    free = SHARE_OF_FREE * free_bytes(inputs.backbone.device) / sharing
    is_cpu_default = settings.size is None and not settings.halving and inputs.backbone.device.type == "cpu"
    packs = []
    for (depth, is_external), candidates in jobs_by_depth.items():
        max_jobs = settings.size
        if is_external:
            max_jobs = 1
        elif is_cpu_default and depth == 0:
            max_jobs = max(1, _at_once(inputs, len(candidates)) // candidates[0][1].members)
        packs += _within_memory(candidates, max_jobs, settings.memory_bytes, free, inputs, ended)
    return packs


def _within_memory(
    jobs: Sequence[tuple[Job, MemoryDemand]],
    max_jobs: int | None,
    memory_bytes: int | None,
    free: float,
    inputs: SharedInputs,
    ended: Callable[[Job, Exception | None], None],
) -> list[list[Job]]:
    """Fill packs in order, each up to `max_jobs` and to `memory_bytes`, or the free bytes if that is None.

    A job that exceeds `memory_bytes` by itself is left out and ends with a `UserError`; one that exceeds the free bytes
    gets a pack of its own.

    Args:
        jobs: with what each adds.
        max_jobs: None: any number.
        memory_bytes: limit of the settings.
        free: bytes of the device that this process may use.
        inputs: give the device.
        ended: called with a job that is left out, and the error.
    """
    bound = memory_bytes or free
    packs: list[list[Job]] = []
    demands: list[MemoryDemand] = []  # of the last pack
    for job, demand in jobs:
        if packs and packs[-1] and len(packs[-1]) != max_jobs and bytes_of([*demands, demand], inputs) <= bound:
            packs[-1].append(job)
            demands.append(demand)
            continue
        required = bytes_of([demand], inputs)
        if memory_bytes and required > bound:
            remedy = f"It needs about {format_number(required, 'B')}; a smaller trainer.micro_batch_size needs less."
            refusal = UserError(
                "is too little for one job",
                key="pack.memory_bytes",
                value=int(bound),
                remedy=remedy,
                code=Code.OUT_OF_MEMORY,
            )
            ended(job, refusal)
            packs.append([])  # the next job starts a new pack
            continue
        packs.append([job])
        demands = [demand]
    return [pack for pack in packs if pack]


def bytes_of(demands: Sequence[MemoryDemand], inputs: SharedInputs) -> float:
    """Return the memory of a pack of these jobs: what all hold, and one step of the members that are computed at once.

    Args:
        demands: of the jobs.
        inputs: give the backbone.
    """
    steps = sorted(demand.step_bytes for demand in demands for _ in range(demand.members))
    return sum(demand.persistent_bytes for demand in demands) + sum(steps[-_at_once(inputs, len(steps)) :])


def _at_once(inputs: SharedInputs, members: int) -> int:
    """Return how many of a pack's members take a pass through the adapted layers together."""
    is_cpu = inputs.backbone.device.type == "cpu"
    return cpu_group_size(inputs.backbone, members) if is_cpu else members


def assumed_ranks(adapter: Adapter, inputs: SharedInputs) -> dict[str, int]:
    """Return `adapter.rank` (else 0) for each target module: a pack of these needs no data-driven allocation.

    Raises:
        UserError: the adapter does not fit the backbone.
    """
    try:
        return dict.fromkeys(adapter.targets(inputs.backbone), getattr(adapter, "rank", 0))
    except UserError as error:
        raise error.under("adapter") from None


def memory_demand(inputs: SharedInputs, experiment: Experiment) -> MemoryDemand:
    """Measure the memory that the job's members need, by a dummy step on the longest training pair.

    A pack is attached for that and detached again.

    Raises:
        UserError: the adapter does not fit the backbone.
    """
    ranks = assumed_ranks(experiment.adapter, inputs)
    pack = Pack(inputs.backbone, inputs.with_classes(experiment).members(ranks)[:1])
    try:
        trainer = experiment.trainer
        pairs = min(trainer.batch_size, trainer.micro_batch_size or trainer.batch_size)
        set_checkpointing(pack, trainer, inputs.longest, inputs.orders)
        row = saved_bytes(pack, 1, inputs.longest)
        member_bytes = BYTES_PER_PARAMETER * pack.count_parameters(0)["trainable"]
        size = experiment.size
        return MemoryDemand(size * member_bytes, TRANSIENT * inputs.orders * pairs * row, pack.depth, size)
    finally:
        pack.detach()


def _train(
    jobs: list[Job],
    inputs: SharedInputs,
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    display: DisplayFactory,
    sharing: int,
) -> None:
    """Train one pack; after an error in what its members share, train its two halves, to isolate the faulty job.

    Errors of training are not raised: each job is reported to `ended`.
    """
    try:
        errors = train_pack(jobs, console=console, inputs=inputs, display=display, sharing=sharing)
    except Exception as error:
        if len(jobs) == 1:
            ended(jobs[0], error)
            return
        console.print(
            sanitise(f"{len(jobs)} jobs failed together ({error}); they are split into two packs", style="red")
        )
        reopened = [_reopened(job) for job in jobs]
        middle = len(reopened) // 2
        for half in (reopened[:middle], reopened[middle:]):
            _train(half, inputs, console, ended, display, sharing)
        return
    for job, error_of_job in zip(jobs, errors, strict=True):
        ended(job, error_of_job)


def _reopened(job: Job) -> Job:
    """Return a job whose run, if it has started, is claimed and read from its folder again.

    Raises:
        UserError: another process holds the folder, or its record is damaged.
    """
    if job.resumed:
        job.resumed.release()
    return replace(job, resumed=Run.reopen(job.folder)) if (job.folder / "run.json").exists() else job
