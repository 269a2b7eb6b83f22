"""`dry_run=true`: what a run, or each pack of a sweep and the whole of it, would cost. Nothing is written.

A job of each kind (its method with its settings, on its data) is rehearsed alone. A pack takes what its members take
one after another, less what they share: the layers below the first adapted one, where all have one seed or where their
output is kept. It holds what the largest of them holds, and what the others keep from step to step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.adapters.pack.pack import Member, Pack
from lora_bench.config.canonical import settings_hash
from lora_bench.console.format import format_duration, format_number
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.cost import reset_peak_memory
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.settings import Experiment
from lora_bench.sweeps.packing import grouped, known_ranks, needs, sized
from lora_bench.sweeps.workers import Workers, cut
from lora_bench.train import prefix_of
from lora_bench.training.dummy_step import probe_step
from lora_bench.training.loop import prepare_task
from lora_bench.training.rehearsal import Estimate, estimate
from lora_bench.training.successive_halving import live

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from lora_bench.records.job import Job


@dataclass(frozen=True)
class Expected:
    """What a pack of a sweep would cost."""

    jobs: Sequence[Job]
    members: Sequence[Estimate]
    """Each as it would be alone."""
    shared: float
    """The share of the members' steps that one of them does for all."""
    fills: bool
    """Whether it makes the kept prefix, which later packs of the sweep read."""
    peak_memory_bytes: float
    halving: bool = False
    """Whether members are stopped on the way."""

    @property
    def train_flops(self) -> float:
        steps = sum(member.train_flops - member.filling_flops for member in self.members)
        return (1 - self.shared) * self._trained * steps + self.fills * self.members[0].filling_flops

    @property
    def seconds(self) -> float:
        steps = sum(member.train_seconds - member.filling_seconds for member in self.members)
        training = (1 - self.shared) * self._trained * steps + self.fills * self.members[0].filling_seconds
        return training + sum(map(self._evaluation, self.members))

    @property
    def _live(self) -> list[int]:
        """Members that compute each step."""
        steps, count = self.members[0].steps, len(self.members)
        return live(count, steps) if self.halving else [count] * steps

    @property
    def _trained(self) -> float:
        """The share of the members' steps that halving leaves, whoever it stops."""
        return sum(self._live) / (len(self.members) * len(self._live))

    def _evaluation(self, member: Estimate) -> float:
        """Seconds of looking at the selection split and at the reported ones, as a mean over who is stopped when."""
        if not self.halving:
            return member.evaluation_seconds
        counts, steps, looks = self._live, member.steps, member.looks
        due = {math.ceil(steps * (i + 1) / looks) for i in range(looks)}
        crowded = {step for step in range(1, steps) if counts[step] < counts[step - 1]}
        looked = sum(counts[step - 1] for step in due | crowded) * member.look_seconds
        reported = member.evaluation_seconds - looks * member.look_seconds
        return (looked + counts[-1] * reported) / len(self.members)


def show(job: Job, console: Console) -> None:
    """Print what the job's run would cost.

    Raises:
        UserError: the request cannot be met.
    """
    experiment = Experiment.build(job.cfg, job.settings)
    common = SharedInputs.load(experiment)
    found = expect(experiment, common)
    members = experiment.ensemble.size
    whole = _together([job], [experiment], common, {_kind(experiment): found}, set(), console)
    adapter, head = members * found.adapter, members * found.head
    total = found.total + adapter + head - found.adapter - found.head
    evaluation = members * found.evaluation_seconds
    table = Table("to expect", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row(
        "parameters", f"{format_number(adapter)} adapter + {format_number(head)} head of {format_number(total)}"
    )
    table.add_row("steps", f"{found.steps:,}")
    table.add_row("computation", format_number(whole.train_flops, "FLOP"))
    table.add_row("training time", format_duration(whole.seconds - evaluation))
    table.add_row("evaluation time", format_duration(evaluation))
    table.add_row("peak memory", format_number(whole.peak_memory_bytes, "B"))
    console.print(table)


def expect(experiment: Experiment, common: SharedInputs | None = None) -> Estimate:
    """What the experiment's run, or one member of its ensemble, would cost alone, preparation with training."""
    if experiment.tasks:
        remedy = "Estimate each by itself: data=NAME dry_run=true."
        raise UserError(
            "is known of one task at a time", key="dry_run", value="true", remedy=remedy, code=Code.UNSUPPORTED
        )
    common = common or SharedInputs.load(experiment)
    (task,) = common.tasks.values()
    reset_peak_memory(common.backbone.device)
    pack = Pack(common.backbone, [Member(experiment.adapter, experiment.seed)])
    try:
        began = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            prepare_task(pack, experiment.trainer, task.tables["train"])
        seconds = time.perf_counter() - began
        prefix, shown_often = prefix_of(common, task, experiment.trainer)
        kept = prefix.keeps(pack, shown_often)
        pack.cut = pack.depth if kept else None
        settings = (experiment.optimizer, experiment.trainer, task.tables, task.swapped)
        found = estimate(pack, *settings, kept=kept, filling=prefix.flops)
    finally:
        pack.detach()
    return replace(
        found,
        train_seconds=found.train_seconds + seconds,
        train_flops=found.train_flops + counter.get_total_flops(),
    )


def run(jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
    """Print what each pack of these jobs would cost, and all of them.

    Args:
        jobs: of one sweep, checked.
        console: where to.
        ended: called with each job, and what is wrong with it.
    """
    packs: list[Expected] = []
    workers = Workers.of(jobs)
    most = math.ceil(len(jobs) / workers.count)
    kinds: dict[str, Estimate] = {}
    for group in grouped(jobs):
        try:
            common = SharedInputs.load(group.experiments[0])
            members = dict(zip([job.title for job in group.jobs], group.experiments, strict=True))
            depths: set[int] = set()
            for part in cut(group, most):
                for together in sized(part, common, ended, workers.sharing):
                    experiments = [members[job.title] for job in together]
                    packs.append(_together(together, experiments, common, kinds, depths, console))
        except Exception as error:
            for job in group.jobs:
                ended(job, error)
    if packs:
        console.print(_table(packs, workers.devices))


def _together(
    jobs: Sequence[Job],
    experiments: Sequence[Experiment],
    common: SharedInputs,
    kinds: dict[str, Estimate],
    depths: set[int],
    console: Console,
) -> Expected:
    """What the jobs would cost as a pack; `kinds` and `depths` remember what was measured and kept before."""
    for job, experiment in zip(jobs, experiments, strict=True):
        kind = _kind(experiment)
        if kind not in kinds:
            console.print(sanitise(f"rehearsing {job.title.partition(':')[0]}"))
            kinds[kind] = expect(experiment, common)
    each = [kinds[_kind(experiment)] for experiment in experiments]
    members = [
        kind for kind, experiment in zip(each, experiments, strict=True) for _ in range(experiment.ensemble.size)
    ]
    needed = [needs(common, experiment) for experiment in experiments]
    largest = max(range(len(jobs)), key=lambda j: each[j].peak_memory_bytes)
    size = experiments[largest].ensemble.size
    inside = replace(needed[largest], kept=(size - 1) / size * needed[largest].kept, step=0.0)
    others = [need if j != largest else inside for j, need in enumerate(needed)]
    # On a CPU members pass the adapted layers one after another.
    beside = sum(need.kept + (0.0 if common.backbone.device.type == "cpu" else need.step) for need in others)
    fills = needed[0].depth not in depths
    depths.add(needed[0].depth)
    shared = 0.0 if members[0].filling_flops else _shared(experiments, common)
    halving = experiments[0].pack.halving and len(jobs) > 1
    return Expected(jobs, members, shared, fills, each[largest].peak_memory_bytes + beside, halving)


def _kind(experiment: Experiment) -> str:
    """Equal for runs that cost the same."""
    return settings_hash((experiment.model, experiment.data, experiment.trainer, experiment.adapter))


def _shared(experiments: Sequence[Experiment], common: SharedInputs) -> float:
    """The share of the members' arithmetic that they do once for all."""
    found = [(member, each.adapter) for each in experiments for member in each.members()]
    if len(found) == 1 or len({member.seed_of("order") for member, _ in found}) > 1:
        return 0.0
    members = [replace(member, saved_ranks=known_ranks(adapter, common)) for member, adapter in found]
    pack = Pack(common.backbone, members)
    try:
        together = _flops(pack)
        alone = 0
        for k in range(pack.size):
            with pack.only([k]):
                alone += _flops(pack)
    finally:
        pack.detach()
    return 1 - together / alone


def _flops(pack: Pack) -> int:
    with FlopCounterMode(display=False) as counter:
        probe_step(pack, 1, 32)
    return int(counter.get_total_flops())


def _table(packs: Sequence[Expected], devices: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "overrides"):
        table.add_column(name, overflow="fold")
    for name in ("adapter", "computation", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    everywhere = set.intersection(*(set(job.overrides) for pack in packs for job in pack.jobs))
    for pack in packs:
        numbers = [job.title.removeprefix("job ").partition(":")[0] for job in pack.jobs]
        asked = [" ".join(text for text in job.overrides if text not in everywhere) for job in pack.jobs]
        table.add_row(
            sanitise(f"{numbers[0]} to {numbers[-1]}" if _in_a_row(numbers) else ", ".join(numbers)),
            sanitise(asked[0] + (f" … {asked[-1]}" if len(asked) > 1 else "")),
            *_cells([pack]),
        )
    jobs = sum(len(pack.jobs) for pack in packs)
    table.add_section()
    table.add_row("all", f"{jobs} jobs in {len(packs)} pack{'s' * (len(packs) > 1)}", *_cells(packs, devices))
    return table


def _cells(packs: Sequence[Expected], devices: int = 1) -> list[str]:
    """Sums over the packs, the time where each device takes the next as soon as it is free, and the most memory."""
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
