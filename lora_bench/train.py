"""The entry point of training: from settings to a backbone with adapters, trained, and a record of each run.

A single run is a pack of one. Jobs of a sweep that may share a backbone are trained as one pack, each as a single run.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.adapters.pack.pack import Pack
from lora_bench.config.canonical import settings_hash
from lora_bench.console.progress import Display, JobsDisplay, announcement
from lora_bench.console.stages import stage
from lora_bench.console.sweep_progress import print_once
from lora_bench.console.text import sanitise
from lora_bench.evaluation.cost import reset_peak_memory
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.packed_run import PackedRun
from lora_bench.run.preflight import check_processes
from lora_bench.run.recorder import Recorder
from lora_bench.training.checkpointing import set_checkpointing
from lora_bench.training.distributed import SINGLE_PROCESS, Processes, processes_of_torchrun
from lora_bench.training.dummy_step import StepFlops
from lora_bench.training.loop import PackTraining, total_steps
from lora_bench.training.memory import trim_freed_memory
from lora_bench.training.prefix_cache import PrefixCache
from lora_bench.training.sharding import shard
from lora_bench.training.signals import Interruption
from lora_bench.training.training_state import restore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lora_bench.config.schema import Trainer
    from lora_bench.console.progress import DisplayFactory
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.records.job import Job
    from lora_bench.run.inputs import Task
    from lora_bench.run.loaded_data import LoadedData


def train(job: Job, *, console: Console, loaded: dict[str, LoadedData] | None = None) -> None:
    """Train or resume one run, and write its record to the job's folder.

    Processes of `torchrun` train it together.

    Args:
        job: the run.
        console: shows progress and results.
        loaded: the data of each task, if they are loaded already; they are taken out.

    Raises:
        UserError: the request cannot be met; nothing is written. A `RunFailedError`: the run had started.
        DivergedError: a loss, gradient or score was not finite; this is in the record.
        Exception: another error; it is in the record if the run had started.
    """
    with processes_of_torchrun() as processes:
        (error,) = train_pack([job], console=console, processes=processes, loaded=loaded)
    if error is not None:
        raise error


def train_pack(
    jobs: Sequence[Job],
    *,
    console: Console,
    inputs: SharedInputs | None = None,
    loaded: dict[str, LoadedData] | None = None,
    display: DisplayFactory | None = None,
    processes: Processes = SINGLE_PROCESS,
    sharing: int = 1,
) -> list[Exception | None]:
    """Train jobs that share data, backbone and trainer as one pack; each writes the record of a single run.

    Args:
        jobs: each has one member, one for each of its tasks, or those of its ensemble.
        console: shows progress and results.
        inputs: that the jobs share, if they are loaded already; the backbone is unchanged afterwards.
        loaded: the data of each task, if only they are loaded already; they are taken out.
        display: creates the progress display; None: that of a single run, or of jobs of a sweep.
        processes: that train the pack together; each writes a record, and the leader's is the record of the run.
        sharing: number of processes that train on the device at the same time, each its own packs.

    Returns:
        For each job the error that ended it, or None if it is done or was eliminated by halving. A folder that cannot
            be claimed is such an error.

    Raises:
        UserError: the request cannot be met for any job.
        Exception: an error in something that the jobs share ended all of them.
        KeyboardInterrupt, SystemExit: a signal; the runs are recorded as `interrupted`.
    """
    runs = PackedRun.open_all(jobs)
    check_processes(runs[0].experiment.trainer)
    inputs = inputs or SharedInputs.load(runs[0].experiment, processes, loaded)
    reset_peak_memory(inputs.backbone.device)
    pack = Pack(inputs.backbone, [member for run in runs for member in run.adapters(inputs)])
    try:
        with stage("initialising the adapters"):
            inputs = _prepare(pack, runs, inputs, processes)
        with (
            Recorder(pack, runs, inputs, console, processes, sharing) as recorder,
            Interruption() as interruption,
        ):
            with stage("starting the run"):
                recorder.start_runs()  # signals wait until every folder is claimed and its record written
            if recorder.running:
                _fit(recorder, display or (JobsDisplay if recorder.in_sweep else Display), interruption)
        return [run.progress.error for run in runs]
    finally:
        pack.detach()


def _prepare(pack: Pack, runs: Sequence[PackedRun], inputs: SharedInputs, processes: Processes) -> SharedInputs:
    """Initialise the pack's adapters, give those of resumed runs their ranks, and return inputs with the cached prefix.

    Global random streams are seeded, and the initial tensors sent to the other processes. Costs are kept in the runs.
    The tensors of checkpoints are not loaded here, but by `_fit`.
    """
    experiment, trainer = runs[0].experiment, runs[0].experiment.trainer
    for run in runs:
        if run.warm_start:
            run.warm_start.load_into(pack, run.numbers)
    if pack.backbone.is_sharded:
        shard(pack)
    _seed_everything(experiment.seed)
    mixtures = inputs.mixtures(runs)
    for run in runs:
        run.prepare(pack, mixtures, trainer)
    trim_freed_memory()
    set_checkpointing(pack, trainer, inputs.longest, inputs.orders)
    processes.broadcast(tensor for k in range(pack.size) for tensor in pack.tensors(k))
    inputs, seconds, flops = _with_prefixes(inputs, pack, trainer)
    for run in runs:
        if pack.prefix_depth is not None and run.resumed_from is None:
            run.note_prefix(seconds, flops)
    return inputs


def _fit(recorder: Recorder, display: DisplayFactory, interruption: Interruption) -> None:
    """Train the runs that have started until each has ended; results go through the recorder.

    Before that, print what is trained, measure FLOPs, and load the checkpoints of resumed runs.
    """
    pack, runs, console = recorder.pack, recorder.runs, recorder.console
    experiment, started = runs[0].experiment, recorder.running[0]
    members = [member for run in runs for member in run.members]
    records = [run.record.record for run in runs if run.record]
    lines = announcement(records, len(pack.updates[started.numbers[0]]), recorder.notes())
    print_once(console, lines[1:] if recorder.in_sweep and len(records) == 1 else lines)
    with stage("counting FLOPs"):
        flop_models = _flop_models(pack)
    for run in runs:
        run.open_checkpoints(flop_models)
        for member, checkpoint in zip(run.members, run.resumed_from or (), strict=False):
            if member.is_running:
                restore(member, checkpoint)
    if started.resumed_from:
        console.print(sanitise(f"resumed from step {started.resumed_from[0].step}"))
    training = PackTraining(
        pack,
        members,
        recorder.inputs.mixtures(runs),
        experiment.trainer,
        metrics=experiment.metrics,
        observer=recorder,
        interruption=interruption,
        processes=recorder.processes,
    )
    with display(console, training.last_step, [title for run in runs for title in run.titles()]) as recorder.display:
        training.fit(halving=experiment.pack.halving)


def prefix_of(inputs: SharedInputs, task: Task, trainer: Trainer) -> tuple[PrefixCache, dict[str, TokenTable]]:
    """Return the cache of the frozen prefix, and the tables that training reads more than once; compute nothing.

    Nothing will be cached (limit 0) if the run sees no training pair twice in the same order.

    Args:
        inputs: give the hash of the backbone.
        task: the data of one task.
        trainer: the number of steps, and the limit of the cache.

    Returns:
        The cache, and those tables that exist: `train`, `second_view`, `selection`, `reversed_selection`.
    """
    train, selection = task.tables["train"], task.tables["selection"]
    second_view = train.reversed_view if task.second_view is None else task.second_view
    tables = {
        "train": train,
        "second_view": second_view,
        "selection": selection,
        "reversed_selection": selection.reversed_view,
    }
    orders = 1 if train.reversed_view is None else 2
    is_repeated = total_steps(trainer, len(train)) * trainer.batch_size > orders * len(train)
    cache = PrefixCache(inputs.backbone_sha256, trainer.prefix_cache_bytes if is_repeated else 0)
    return cache, {name: table for name, table in tables.items() if table is not None}


def _with_prefixes(inputs: SharedInputs, pack: Pack, trainer: Trainer) -> tuple[SharedInputs, float, float]:
    """Return the inputs with the cached prefix of their pairs, and its seconds and FLOPs, summed over the tasks.

    The seconds are those of this run, little if another one has filled the cache; the FLOPs are those of computing it,
    by whichever run. The pack is cut at the prefix. Where nothing is cached, the tokens are left as they are.
    """
    tasks, seconds, flops = {}, 0.0, 0.0
    for name, task in inputs.tasks.items():
        cache, repeated = prefix_of(inputs, task, trainer)
        tasks[name] = task.with_tables(cache.with_cached_hidden_states(pack, repeated))
        seconds, flops = seconds + cache.seconds, flops + cache.flops
    return replace(inputs, tasks=tasks), seconds, flops


def _flop_models(pack: Pack) -> list[StepFlops]:
    """Return a FLOP model of each member's training step, as in a single run; equal members are measured once."""
    measured: dict[str, StepFlops] = {}
    models = []
    for k, member in enumerate(pack.members):
        settings = settings_hash((member.adapter, member.pair_features, pack.assigned_ranks[k], member.outputs))
        if settings not in measured:
            with pack.only([k]):
                measured[settings] = StepFlops.measure(pack)
        models.append(measured[settings])
    return models


def _seed_everything(seed: int) -> None:
    """Seed the global random streams, which only the dropout of full fine-tuning uses."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
