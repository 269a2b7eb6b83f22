"""The entry point of a run, top to bottom: configs -> data -> backbone -> adapters -> fit -> evaluate -> record.

A run is a pack of one. Several runs that share data and backbone are trained together, and each leaves the record that
it would have left alone.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.adapters.pack.pack import Pack
from lora_bench.console.progress import Display, announce
from lora_bench.console.text import shown
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.cost import FlopModel, reset_peak_memory
from lora_bench.run.inputs import Common
from lora_bench.run.recorder import Preparation, Recorder
from lora_bench.run.settings import Experiment
from lora_bench.run.warm_start import Source
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.distributed import ALONE, Processes, together
from lora_bench.training.dummy_step import probe_step
from lora_bench.training.loop import fit_courses, prepare_courses, total_steps
from lora_bench.training.precision import resolve_device, resolve_precision
from lora_bench.training.prefix_cache import PrefixCache
from lora_bench.training.signals import Interruption
from lora_bench.training.training_state import Outcome, contained, refusing_strangers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lora_bench.config import schema
    from lora_bench.console.progress import Shows
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.records.job import Job
    from lora_bench.run.inputs import Task
    from lora_bench.training.checkpoint import Checkpoint
    from lora_bench.training.task_mixture import Course


def train(job: Job, *, console: Console) -> None:
    """Run one experiment and leave its record in the job's folder.

    Raises:
        UserError: the request cannot be met; nothing is left behind.
        DivergedError: loss, gradient or scores ceased to be finite; the record says so.
    """
    with together() as processes:
        (error,) = train_pack([job], console=console, processes=processes)
    if error is not None:
        raise error


def train_pack(
    jobs: Sequence[Job],
    *,
    console: Console,
    common: Common | None = None,
    brief: bool = False,
    display: Shows = Display,
    processes: Processes = ALONE,
    sharing: int = 1,
) -> list[Exception | None]:
    """Train jobs that share data, backbone and trainer as one pack; each leaves a record as if it had run alone.

    A job brings one member, or those of its ensemble.

    Args:
        jobs: what the pack is made of.
        console: where to tell how it goes.
        common: what they share, if it is loaded already; its backbone is given back as it was.
        brief: one line for each result instead of a table.
        display: makes what shows the training.
        processes: those that train it together; each keeps a record, and the leader's is the run's.
        sharing: processes that train packs of their own on the device at the same time.

    Returns:
        What ended each job before its time; None where it is done.

    Raises:
        UserError: the request of all cannot be met.
        Exception: what ended all of them at once, in what they share.
    """
    experiments = [Experiment.build(job.cfg) for job in jobs]
    for tracker in chain.from_iterable(experiment.trackers.values() for experiment in experiments):
        tracker.check()
    trainer = experiments[0].trainer
    parts = _parts(experiments)
    owners = [job for job, part in enumerate(parts) for _ in part]
    places = [job.folder / "checkpoints" for job in jobs]
    folders = [c for p, part in zip(places, parts, strict=True) for c in Checkpoints.of_members(p, len(part))]
    begun = _newest([jobs[job] for job in owners], folders)
    if begun:
        for job, checkpoint in zip(owners, begun, strict=True):
            jobs[job].check_record(checkpoint.facts.get("config"))
            _check_precision(jobs[job], trainer)
    common = common or Common.load(experiments[0])
    reset_peak_memory(common.backbone.device)
    sources = [None if begun else Source.of(experiment, common) for experiment in experiments]
    members = [
        member
        for experiment, source in zip(experiments, sources, strict=True)
        for member in experiment.members(source.ranks if source else None)
    ]
    pack = Pack(common.backbone, members)
    try:
        outcomes = [Outcome() for _ in owners]
        for part, source in zip(parts, sources, strict=True):
            if source:
                source.put_into(pack, part)
        _seed_everything(experiments[0].seed)
        courses = common.courses(experiments, parts)
        prepared = [
            _prepare(pack, k, trainer, courses, outcomes[k], begun[k] if begun else None, bool(sources[owners[k]]))
            for k in range(pack.size)
        ]
        processes.agree(tensor for k in range(pack.size) for tensor in pack.tensors(k))
        common, seconds, flops = _with_prefixes(common, pack, trainer)
        courses = common.courses(experiments, parts)
        if pack.cut is not None and not begun:
            prepared = [replace(cost, prefix_seconds=seconds, prefix_flops=flops) for cost in prepared]

        sizes = [max(pack.size, checkpoint.facts["pack_size"]) for checkpoint in begun or ()] or [pack.size] * pack.size
        recorder = Recorder(
            pack,
            common,
            jobs,
            experiments,
            parts,
            outcomes,
            prepared,
            folders,
            sizes,
            console,
            processes,
            sharing,
            brief,
        )
        try:
            with Interruption() as interruption:  # a folder is claimed and its record written, or it is not
                for job, part in enumerate(parts):
                    recorder.end_together(job)
                    if recorder.outcome(job).error is None:
                        with contained(recorder.outcome(job)):
                            recorder.begin(job, begun[part[0]] if begun else None)
                        recorder.end_together(job)
                        if recorder.outcome(job).error is not None and job in recorder.runs:
                            recorder.close(job)
                live = list(recorder.runs)
                if not live:
                    return [recorder.outcome(job).error for job in range(len(jobs))]
                adapted = len(pack.updates[parts[live[0]][0]])
                notes = recorder.notes() + [source.told() for source in sources if source]
                announce(console, [recorder.runs[job].record for job in live], adapted, notes)
                if begun:
                    console.print(shown(f"going on from step {begun[0].step}"))
                steps, names = max(course.steps(trainer) for course in courses), _names(jobs, experiments, parts)
                configs = [recorder.runs[job].record["config"] if job in recorder.runs else None for job in owners]
                with display(console, steps, names) as recorder.display:
                    fit_courses(
                        pack,
                        [experiments[job].optimizer for job in owners],
                        trainer,
                        courses,
                        outcomes=outcomes,
                        runs=parts,
                        flop_models=_flop_models(pack),
                        metrics=experiments[0].metrics,
                        watcher=recorder,
                        ended=recorder.ended,
                        checkpoints=[
                            replace(folder, facts={"preparation": asdict(cost), "pack_size": size, "config": config})
                            for folder, cost, size, config in zip(folders, prepared, sizes, configs, strict=True)
                        ],
                        begun=begun,
                        interruption=interruption,
                        processes=processes,
                        halving=experiments[0].pack.halving,
                    )
        except Exception as error:
            recorder.fail(error)
            raise
        except BaseException:  # Ctrl-C, or a signal that became SystemExit
            recorder.interrupt()
            raise
        return [recorder.outcome(job).error for job in range(len(jobs))]
    finally:
        pack.detach()


def _parts(experiments: Sequence[Experiment]) -> list[range]:
    """The numbers that each job's members have in the pack."""
    ends = list(accumulate(experiment.size for experiment in experiments))
    return [range(end - experiment.size, end) for end, experiment in zip(ends, experiments, strict=True)]


def _names(jobs: Sequence[Job], experiments: Sequence[Experiment], parts: Sequence[range]) -> list[str]:
    """What the members are called on the screen."""
    names = []
    for job, experiment, part in zip(jobs, experiments, parts, strict=True):
        title, colon, told = job.title.partition(":")
        members = [f" member {i}" for i in range(len(part))] if len(part) > 1 else [""]
        if experiment.own_adapters:
            members = [f" {task}" for task in experiment.tasks]
        names += [f"{title}{member}{colon}{told}".lstrip() for member in members]
    return names


def _newest(jobs: Sequence[Job], folders: Sequence[Checkpoints]) -> list[Checkpoint] | None:
    """What members of these jobs go on from: their newest checkpoints of one step; None where they begin."""
    found = [folder.newest() if job.begun else None for job, folder in zip(jobs, folders, strict=True)]
    if None in found:
        return None
    step = min(checkpoint.step for checkpoint in found if checkpoint)
    found = [c if c and c.step == step else folder.newest(step) for c, folder in zip(found, folders, strict=True)]
    together = [checkpoint for checkpoint in found if checkpoint and checkpoint.step == step]
    return together if len(together) == len(jobs) else None


def _check_precision(job: Job, trainer: schema.Trainer) -> None:
    """Refuse to resume a run in another number format, which would mix two trainings in one result."""
    assert job.begun is not None
    before = job.begun.record["environment"].get("precision")
    device = resolve_device(trainer.device)
    now = str(resolve_precision(trainer.precision, device)).removeprefix("torch.")
    if before not in (None, now):
        made_on = job.begun.record["environment"].get("device")
        remedy = f"Resume it where it was interrupted, or start a new run with trainer.precision={trainer.precision}."
        if trainer.precision == "auto":
            remedy = "Resume it on a device of the same kind, or start a new run and give trainer.precision."
        raise UserError(
            f"the run was interrupted in {before} on {made_on}, and trainer.precision={trainer.precision} is {now} on "
            f"{device} here",
            key="resume",
            value=job.folder,
            remedy=remedy,
            code=Code.MISMATCH,
        )


def _prepare(
    pack: Pack,
    member: int,
    trainer: schema.Trainer,
    courses: Sequence[Course],
    outcome: Outcome,
    begun: Checkpoint | None,
    has_start: bool,
) -> Preparation:
    """Let the member's method look at data unless it has a start, or give it what it made of them before; and what that
    cost."""
    if begun:
        with refusing_strangers():
            if begun.facts["ranks"]:
                pack.set_ranks(member, begun.facts["ranks"])
            return Preparation(**begun.facts["preparation"])
    if has_start:
        return Preparation(0.0, 0.0)
    began, notes = time.perf_counter(), list[str]()
    with contained(outcome), FlopCounterMode(display=False) as counter:
        notes = prepare_courses(pack, trainer, courses, [member])
    return Preparation(time.perf_counter() - began, counter.get_total_flops(), notes=notes)


def prefix_of(common: Common, task: Task, trainer: schema.Trainer) -> tuple[PrefixCache, dict[str, TokenTable]]:
    """The store of what the frozen layers below the pack make, and the tables that training looks at again and again.

    Where no pair of the training split comes twice in the same order, keeping it is no gain.
    """
    train, selection = task.tables["train"], task.tables["selection"]
    swapped = train.exchanged if task.swapped is None or task.swapped is train else task.swapped
    tables = {"train": train, "swapped": swapped, "selection": selection, "exchanged": selection.exchanged}
    orders = 1 if train.exchanged is None else 2
    again = total_steps(trainer, len(train)) * trainer.batch_size > orders * len(train)
    store = PrefixCache(common.backbone_sha256, trainer.prefix_cache_bytes if again else 0)
    return store, {name: table for name, table in tables.items() if table is not None}


def _with_prefixes(common: Common, pack: Pack, trainer: schema.Trainer) -> tuple[Common, float, float]:
    """The tasks with what the frozen prefix makes of their pairs, where it is kept; seconds and FLOPs of making it."""
    tasks, seconds, flops = {}, 0.0, 0.0
    for name, task in common.tasks.items():
        store, shown_often = prefix_of(common, task, trainer)
        tasks[name] = task.with_tables(store.serve(pack, shown_often))
        seconds, flops = seconds + store.seconds, flops + store.flops
    return replace(common, tasks=tasks), seconds, flops


def _flop_models(pack: Pack) -> list[FlopModel]:
    """FLOPs of each member's step as it would be alone; members that are alike are measured once."""
    measured: dict[str, FlopModel] = {}
    models = []
    for k, member in enumerate(pack.members):
        kind = repr((member.adapter, pack.given_ranks[k]))
        if kind not in measured:
            with pack.only([k]):
                measured[kind] = FlopModel.measure(lambda rows, length: probe_step(pack, rows, length))
        models.append(measured[kind])
    return models


def _seed_everything(seed: int) -> None:
    """The global streams, which only full fine-tuning's dropout draws from; everything else has streams of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
