"""Cost estimates, `dry_run=true`: of a run, or of each pack of a sweep and the whole sweep. Nothing is written.

One job of each setting (model, data, trainer, adapter) is rehearsed as a single run. The time and FLOPs of a pack are
the sum over its members, less the layers below the first adapted one if members share them: if all have one seed, or
if their output is cached. Its memory is that of the largest member, plus what the other members hold from step to step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.adapters.pack.pack import Pack
from lora_bench.config.canonical import settings_hash
from lora_bench.console.format import format_duration, format_number
from lora_bench.console.stages import stage
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.cost import reset_peak_memory
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.settings import Experiment
from lora_bench.sweeps.packing import assumed_ranks, bytes_of, group_jobs, memory_demand, split_into_packs
from lora_bench.sweeps.workers import Workers, split_group
from lora_bench.train import prefix_of
from lora_bench.training.checkpointing import set_checkpointing
from lora_bench.training.dummy_step import dummy_step
from lora_bench.training.loop import prepare_task
from lora_bench.training.rehearsal import Estimate, estimate
from lora_bench.training.successive_halving import members_by_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from lora_bench.records.job import Job
    from lora_bench.run.loaded_data import LoadedData


@dataclass(frozen=True)
class PackCost:
    """The estimated cost of a pack of a sweep."""

    jobs: Sequence[Job]
    members: Sequence[Estimate]
    """The cost of each member as a single run."""
    shared: float
    """Share of the members' arithmetic that is done once for all of them."""
    fills: bool
    """It fills the prefix cache, which later packs of the sweep read."""
    peak_memory_bytes: float
    halving: bool = False
    """Successive halving eliminates members."""

    @property
    def train_flops(self) -> float:
        """FLOPs of training all members."""
        steps = sum(member.train_flops - member.prefix_flops for member in self.members)
        return (1 - self.shared) * self._trained * steps + self.fills * self.members[0].prefix_flops

    @property
    def seconds(self) -> float:
        """Wall time of training and evaluating all members."""
        steps = sum(member.train_seconds - member.prefix_seconds for member in self.members)
        training = (1 - self.shared) * self._trained * steps + self.fills * self.members[0].prefix_seconds
        return training + sum(map(self._evaluation, self.members))

    @property
    def _live(self) -> list[int]:
        """Number of active members at each step."""
        steps, count = self.members[0].steps, len(self.members)
        return members_by_step(count, steps) if self.halving else [count] * steps

    @property
    def _trained(self) -> float:
        """Share of all members' steps that halving leaves."""
        return sum(self._live) / (len(self.members) * len(self._live))

    def _evaluation(self, member: Estimate) -> float:
        """Return a member's expected seconds of evaluation, averaged over the order in which halving eliminates."""
        if not self.halving:
            return member.evaluation_seconds
        counts, steps, evaluations = self._live, member.steps, member.evaluations
        due = {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}
        eliminating = {step for step in range(1, steps) if counts[step] < counts[step - 1]}
        selection_seconds = sum(counts[step - 1] for step in due | eliminating) * member.seconds_per_evaluation
        reported = member.evaluation_seconds - evaluations * member.seconds_per_evaluation
        return (selection_seconds + counts[-1] * reported) / len(self.members)


def print_run_estimate(job: Job, console: Console, loaded: dict[str, LoadedData] | None = None) -> None:
    """Print the estimated cost of a run: parameters, steps, FLOPs, time, memory.

    Args:
        job: the run.
        console: receives the table.
        loaded: the data of each task, if they are loaded already; they are taken out.

    Raises:
        UserError: the request cannot be met.
    """
    experiment = Experiment.of_job(job)
    inputs = SharedInputs.load(experiment, loaded=loaded)
    single = estimate_run(experiment, inputs)
    members = experiment.ensemble.size
    cost = _pack_cost([job], [experiment], inputs, {_setting_key(experiment): single}, set(), console)
    adapter, head = members * single.adapter, members * single.head
    total = single.total + adapter + head - single.adapter - single.head
    evaluation = members * single.evaluation_seconds
    table = Table("to expect", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row(
        "parameters", f"{format_number(adapter)} adapter + {format_number(head)} head of {format_number(total)}"
    )
    table.add_row("steps", f"{single.steps:,}")
    table.add_row("computation", format_number(cost.train_flops, "FLOP"))
    table.add_row("training time", format_duration(cost.seconds - evaluation))
    table.add_row("evaluation time", format_duration(evaluation))
    table.add_row("peak memory", format_number(cost.peak_memory_bytes, "B"))
    console.print(table)


def estimate_run(experiment: Experiment, inputs: SharedInputs | None = None) -> Estimate:
    """Estimate the cost of a single run, or of one member of an ensemble, by rehearsing a few steps.

    Data-driven initialisation counts as training.

    Raises:
        UserError: the settings cannot be met, or the run has several tasks.
    """
    if experiment.tasks:
        remedy = "Estimate each task by itself: data=NAME dry_run=true."
        raise UserError(
            "estimates one task at a time", key="dry_run", value="true", remedy=remedy, code=Code.UNSUPPORTED
        )
    inputs = inputs or SharedInputs.load(experiment)
    (task,) = inputs.tasks.values()
    reset_peak_memory(inputs.backbone.device)
    (member, *_) = experiment.with_data([task.data]).members()
    pack = Pack(inputs.backbone, [member])
    try:
        began = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            prepare_task(pack, experiment.trainer, task.tables["train"])
        seconds = time.perf_counter() - began
        set_checkpointing(pack, experiment.trainer, inputs.longest, inputs.orders)
        prefix, repeated = prefix_of(inputs, task, experiment.trainer)
        cached = prefix.cached_tables(pack, repeated)
        pack.prefix_depth = pack.depth if cached else None
        settings = (experiment.optimizer, experiment.trainer, task.tables, task.second_view)
        with stage("rehearsing"):
            single = estimate(pack, *settings, cached=cached, prefix_flops=prefix.flops)
    finally:
        pack.detach()
    return replace(
        single,
        train_seconds=single.train_seconds + seconds,
        train_flops=single.train_flops + counter.get_total_flops(),
    )


def print_sweep_estimate(jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
    """Print the estimated cost of each pack of these jobs, and of the whole sweep; nothing if no job can run.

    An error in what a group of jobs shares ends all jobs of the group.

    Args:
        jobs: of one sweep, checked.
        console: receives the table.
        ended: called with each job that cannot run, and its error.
    """
    packs: list[PackCost] = []
    workers = Workers.of(jobs)
    max_jobs = math.ceil(len(jobs) / workers.count)
    measured: dict[str, Estimate] = {}
    for group in group_jobs(jobs):
        try:
            inputs = SharedInputs.load(group.experiments[0])
            members = dict(zip([job.title for job in group.jobs], group.experiments, strict=True))
            depths: set[int] = set()
            for subgroup in split_group(group, max_jobs):
                for pack_jobs in split_into_packs(subgroup, inputs, ended, workers.sharing):
                    experiments = [members[job.title] for job in pack_jobs]
                    packs.append(_pack_cost(pack_jobs, experiments, inputs, measured, depths, console))
        except Exception as error:
            for job in group.jobs:
                ended(job, error)
    if packs:
        console.print(_table(packs, workers.devices))


def _pack_cost(
    jobs: Sequence[Job],
    experiments: Sequence[Experiment],
    inputs: SharedInputs,
    measured: dict[str, Estimate],
    depths: set[int],
    console: Console,
) -> PackCost:
    """Return the estimated cost of the jobs as one pack; print a line for each setting that is rehearsed for it.

    Args:
        jobs: of the pack.
        experiments: their settings.
        inputs: that they share.
        measured: estimates of single runs by setting; new ones are added.
        depths: depths of the prefixes that the sweep has cached; that of this pack is added.
        console: receives the lines.
    """
    for job, experiment in zip(jobs, experiments, strict=True):
        key = _setting_key(experiment)
        if key not in measured:
            console.print(sanitise(f"rehearsing {job.title.partition(':')[0]}"))
            measured[key] = estimate_run(experiment, inputs)
    estimates = [measured[_setting_key(experiment)] for experiment in experiments]
    sizes = [experiment.ensemble.size for experiment in experiments]
    members = [single for single, size in zip(estimates, sizes, strict=True) for _ in range(size)]
    demands = [memory_demand(inputs, experiment) for experiment in experiments]
    largest = max(range(len(jobs)), key=lambda j: estimates[j].peak_memory_bytes)
    one_of_largest = replace(
        demands[largest], persistent_bytes=demands[largest].persistent_bytes / sizes[largest], members=1
    )
    added_bytes = bytes_of(demands, inputs) - bytes_of([one_of_largest], inputs)
    fills = demands[0].depth not in depths
    depths.add(demands[0].depth)
    shared = 0.0 if members[0].prefix_flops else _shared(experiments, inputs)
    halving = experiments[0].pack.halving and len(jobs) > 1
    return PackCost(jobs, members, shared, fills, estimates[largest].peak_memory_bytes + added_bytes, halving)


def _setting_key(experiment: Experiment) -> str:
    """Return a key that is equal for runs of equal cost, whatever their seeds."""
    return settings_hash((experiment.model, experiment.data, experiment.trainer, experiment.adapter, experiment.head))


def _shared(experiments: Sequence[Experiment], inputs: SharedInputs) -> float:
    """Return the share of the members' arithmetic that a pack does once for all of them.

    It is 0 for a single member, and for members with different seeds of `order`, whose batches differ.
    """
    candidates = [
        (member, experiment.adapter)
        for experiment in experiments
        for member in inputs.with_classes(experiment).members()
    ]
    if len(candidates) == 1 or len({member.seed_of("order") for member, _ in candidates}) > 1:
        return 0.0
    members = [replace(member, saved_ranks=assumed_ranks(adapter, inputs)) for member, adapter in candidates]
    pack = Pack(inputs.backbone, members, batched=False)  # batched products would count the padding of ranks
    try:
        pack_flops = _flops(pack)
        single_flops = 0
        for k in range(pack.size):
            with pack.only([k]):
                single_flops += _flops(pack)
    finally:
        pack.detach()
    return 1 - pack_flops / single_flops


def _flops(pack: Pack) -> int:
    with FlopCounterMode(display=False) as counter:
        dummy_step(pack, 1, 32)
    return int(counter.get_total_flops())


def _table(packs: Sequence[PackCost], devices: int) -> Table:
    """Return the table of a sweep's packs, with a last row for all of them, whose time is that on so many devices.

    A row has the numbers of the pack's jobs, and the overrides of its first and last job that not all jobs have.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "overrides"):
        table.add_column(name, overflow="fold")
    for name in ("adapter", "computation", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    inputs_overrides = set.intersection(*(set(job.overrides) for pack in packs for job in pack.jobs))
    for pack in packs:
        numbers = [job.title.removeprefix("job ").partition(":")[0] for job in pack.jobs]
        overrides = [" ".join(text for text in job.overrides if text not in inputs_overrides) for job in pack.jobs]
        table.add_row(
            sanitise(f"{numbers[0]} to {numbers[-1]}" if _in_a_row(numbers) else ", ".join(numbers)),
            sanitise(overrides[0] + (f" … {overrides[-1]}" if len(overrides) > 1 else "")),
            *_cells([pack]),
        )
    jobs = sum(len(pack.jobs) for pack in packs)
    table.add_section()
    table.add_row("all", f"{jobs} jobs in {len(packs)} pack{'s' * (len(packs) > 1)}", *_cells(packs, devices))
    return table


def _cells(packs: Sequence[PackCost], devices: int = 1) -> list[str]:
    """Return the cells of a row: sums over the packs, the largest memory, and the time on this many devices.

    Each device takes the next pack as soon as it is free.
    """
    busy = [0.0] * devices
    for pack in packs:
        busy[busy.index(min(busy))] += pack.seconds
    return [
        format_number(sum(member.adapter for pack in packs for member in pack.members)),
        format_number(sum(pack.train_flops for pack in packs), "FLOP"),
        format_duration(max(busy)),
        format_number(max(pack.peak_memory_bytes for pack in packs), "B"),
    ]


def _in_a_row(numbers: Sequence[str]) -> bool:
    first = int(numbers[0])
    return len(numbers) > 1 and list(numbers) == [str(first + i) for i in range(len(numbers))]
