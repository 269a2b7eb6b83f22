"""A sweep's jobs in packs: which may share a backbone, how many at a time, and what runs alone and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_bench.adapters.pack.pack import Pack
from lora_bench.config.canonical import settings_hash
from lora_bench.console.format import format_number
from lora_bench.console.progress import Display
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.records.run_folder import Run
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.settings import Experiment
from lora_bench.train import train_pack
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.dummy_step import saved_bytes
from lora_bench.training.memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from lora_bench.adapters.base import Adapter
    from lora_bench.console.progress import DisplayFactory
    from lora_bench.records.job import Job

SHARE_OF_FREE = 0.75
"""What a pack may take of the memory that is free when it starts."""
KEPT_PER_PARAMETER = 6 * 4
"""Bytes of a trained number: itself, its gradient, AdamW's two moments, its best value and its mean, in fp32."""
TRANSIENT = 1.5
"""What a step holds at its peak over what it keeps for its backward pass."""


@dataclass(frozen=True)
class Group:
    """Jobs that may share a backbone."""

    jobs: list[Job]
    experiments: list[Experiment]
    """One per job."""
    alone: str = ""
    """Why this one job runs alone, where it does."""


def run(
    jobs: Sequence[Job],
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    *,
    display: DisplayFactory = Display,
    sharing: int = 1,
) -> None:
    """Train the jobs, packed where they may share a backbone.

    Args:
        jobs: of one sweep, checked.
        console: where to tell how it goes.
        ended: called with each job when it has ended, and what ended it before its time.
        display: makes what shows a pack's training.
        sharing: processes that do so on one device at the same time.
    """
    for group in grouped(jobs):
        halving = group.experiments[0].pack.halving
        if group.alone:
            so = ", so pack.halving does not stop it" if halving else ""
            console.print(sanitise(f"{group.jobs[0].title.partition(':')[0]} runs alone: {group.alone}{so}"))
        try:
            common = SharedInputs.load(group.experiments[0])
            packs = sized(group, common, ended, sharing)
        except Exception as error:
            for job in group.jobs:
                ended(job, error)
            continue
        if halving and len(packs) > 1:
            console.print(f"note: pack.halving leaves one job of each pack, and there are {len(packs)}")
        for pack in packs:
            _train(pack, common, console, ended, display, sharing)


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """The jobs by what they must have in common: model, data, trainer, metrics, and the step they go on from."""
    experiments = [Experiment.build(job.cfg, job.settings) for job in jobs]
    shared = [
        settings_hash((each.model, each.data, each.tasks, each.trainer, each.metrics, each.pack))
        for each in experiments
    ]
    held = [_held(job, each) for job, each in zip(jobs, experiments, strict=True)]
    newest: dict[str, set[int]] = {}
    for kind, steps in zip(shared, held, strict=True):
        newest.setdefault(kind, set()).add(steps[0])
    groups: dict[str, Group] = {}
    for job, experiment, kind, steps in zip(jobs, experiments, shared, held, strict=True):
        step = min(newest[kind] & set(steps))  # where a kill came between their checkpoints, the one before
        alone = ""
        if experiment.adapter.trains_backbone:
            alone = f"{experiment.adapter.method} trains the backbone itself"
        elif experiment.pack.size == 1:
            alone = "pack.size=1"
        key = settings_hash((kind, step, job.title if alone else ""))
        group = groups.setdefault(key, Group([], [], alone))
        group.jobs.append(job)
        group.experiments.append(experiment)
    found = list(groups.values())
    lonely = "no other job has its model, data and trainer"
    if len(found) > 1:
        found = [replace(g, alone=lonely) if len(g.jobs) == 1 and not g.alone else g for g in found]
    return found


def _held(job: Job, experiment: Experiment) -> list[int]:
    """The steps that a job can go on from, the newest first; 0 where it begins."""
    if not job.begun:
        return [0]
    checkpoints = Checkpoints.of_members(job.folder / "checkpoints", experiment.size)[0]
    newest = checkpoints.newest()
    if newest is None:
        return [0]
    before = checkpoints.newest(newest.step - 1)
    return [newest.step] + ([before.step] if before else [])


@dataclass(frozen=True)
class Need:
    """What a job needs of what a pack shares."""

    kept: float
    """Bytes from step to step."""
    step: float
    """Bytes that a step takes besides."""
    depth: int
    """Layers below the first that it adapts."""


def sized(
    group: Group, common: SharedInputs, ended: Callable[[Job, Exception | None], None], sharing: int = 1
) -> list[list[Job]]:
    """The group's jobs in packs that this process's share of the memory takes; jobs that do not fit the backbone end
    here.

    Members of a pack begin at the same layer: below it each computes nothing, or reads what is kept. On a CPU that is
    all they gain by going together, as its products are no quicker for being many: where there is nothing below, each
    goes by itself, with time and memory of its own, unless `pack.size` or `pack.halving` asks for more.
    """
    fitting: dict[int, list[tuple[Job, Need]]] = {}
    measured: dict[str, Need] = {}
    for job, experiment in zip(group.jobs, group.experiments, strict=True):
        kind = settings_hash((experiment.adapter, experiment.size))
        try:
            if kind not in measured:
                measured[kind] = needs(common, experiment)
        except Exception as error:
            ended(job, error)
            continue
        fitting.setdefault(measured[kind].depth, []).append((job, measured[kind]))
    settings = group.experiments[0].pack
    free = SHARE_OF_FREE * free_bytes(common.backbone.device) / sharing
    unasked = settings.size is None and not settings.halving and common.backbone.device.type == "cpu"
    packs = []
    for depth, alike in fitting.items():
        most = 1 if unasked and depth == 0 else settings.size
        packs += _within_memory(alike, most, settings.memory_bytes, free, common, ended)
    return packs


def _within_memory(
    jobs: Sequence[tuple[Job, Need]],
    most: int | None,
    asked_bound: int | None,
    free: float,
    common: SharedInputs,
    ended: Callable[[Job, Exception | None], None],
) -> list[list[Job]]:
    bound = asked_bound or free
    packs: list[list[Job]] = []
    used = 0.0
    passing = 0.0
    for job, need in jobs:
        # On a CPU members pass the adapted layers one after another.
        passing = max(passing, need.step) if common.backbone.device.type == "cpu" else passing + need.step
        used += need.kept
        if packs and len(packs[-1]) != most and used + passing <= bound:
            packs[-1].append(job)
            continue
        used, passing = need.kept, need.step
        if asked_bound and used + passing > bound:
            remedy = (
                f"It takes about {format_number(used + passing, 'B')}. A smaller trainer.micro_batch_size takes less."
            )
            refusal = UserError(
                "is too little for one job",
                key="pack.memory_bytes",
                value=int(bound),
                remedy=remedy,
                code=Code.OUT_OF_MEMORY,
            )
            ended(job, refusal)
            used, passing = math.inf, 0.0  # the next job begins a pack
            continue
        packs.append([job])
    return packs


def known_ranks(adapter: Adapter, common: SharedInputs) -> dict[str, int]:
    """Ranks that let a pack measure the adapter without its start, which may be costly.

    Raises:
        UserError: the adapter does not fit the backbone.
    """
    try:
        return dict.fromkeys(adapter.targets(common.backbone), getattr(adapter, "rank", 0))
    except UserError as error:
        raise error.under("adapter") from None


def needs(common: SharedInputs, experiment: Experiment) -> Need:
    """What the job's members need.

    Raises:
        UserError: the adapter does not fit the backbone.
    """
    known = known_ranks(experiment.adapter, common)
    pack = Pack(common.backbone, experiment.members(known)[:1])
    try:
        trainer = experiment.trainer
        pairs = min(trainer.batch_size, trainer.micro_batch_size or trainer.batch_size)
        orders = max(1 if task.swapped is None else 2 for task in common.tasks.values())
        row = saved_bytes(pack, 1, common.longest)
        kept = KEPT_PER_PARAMETER * pack.count_parameters(0)["trainable"]
        size = experiment.size
        at_once = 1 if common.backbone.device.type == "cpu" else size
        return Need(size * kept, at_once * TRANSIENT * orders * pairs * row, pack.depth)
    finally:
        pack.detach()


def _train(
    jobs: list[Job],
    common: SharedInputs,
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    display: DisplayFactory,
    sharing: int,
) -> None:
    """One pack; where what its members share fails, its two halves, so that one job's fault is not another's."""
    if len(jobs) == 1 and jobs[0].title:
        console.print()
        console.print(sanitise(jobs[0].title, style="bold"))
    try:
        errors = train_pack(jobs, console=console, inputs=common, brief=True, display=display, sharing=sharing)
    except Exception as error:
        if len(jobs) == 1:
            ended(jobs[0], error)
            return
        console.print(sanitise(f"{len(jobs)} jobs together failed ({error}); they run in two packs", style="red"))
        again = [_reopened(job) for job in jobs]
        middle = len(again) // 2
        for half in (again[:middle], again[middle:]):
            _train(half, common, console, ended, display, sharing)
        return
    for job, ended_by in zip(jobs, errors, strict=True):
        ended(job, ended_by)


def _reopened(job: Job) -> Job:
    if job.begun:
        job.begun.release()
    return replace(job, begun=Run.reopen(job.folder)) if (job.folder / "run.json").exists() else job
