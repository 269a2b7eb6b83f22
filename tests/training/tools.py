"""Training a pack in a test, with whatever the loop can be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.training import loop
from lora_bench.training.member_run import MemberProgress, MemberRun
from lora_bench.training.task_mixture import TaskData, TaskMixture
from lora_bench.training.training_state import restore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.training.checkpoint import Checkpoint, Checkpoints


class Follower:
    """An observer made of the parts that a test has."""

    def __init__(self, watcher: Any, ended: Callable[[Sequence[int]], None] | None) -> None:
        self.watcher, self.tell_ended = watcher, ended

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        if self.watcher:
            self.watcher.stepped(step, losses, pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        if self.watcher:
            self.watcher.evaluated(member, line)

    def ended(self, members: Sequence[int]) -> None:
        if self.tell_ended:
            self.tell_ended(members)


def fit_mixtures(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    mixtures: Sequence[TaskMixture],
    *,
    watcher: Any = None,
    ended: Callable[[Sequence[int]], None] | None = None,
    flop_models: Sequence[Callable[[int, int], float]] | None = None,
    checkpoints: Sequence[Checkpoints] | None = None,
    resumed_from: Sequence[Checkpoint] | None = None,
    outcomes: Sequence[MemberProgress] | None = None,
    halving: bool = False,
    **options: Any,
) -> list[MemberProgress]:
    """Train a pack and return the progress of each member."""
    mixture_of = {k: mixture for mixture in mixtures for k in mixture.members}
    members = []
    for k, settings in enumerate(optimizers):
        member = MemberRun.start(pack, k, settings, mixture_of[k], trainer, outcomes[k] if outcomes else None)
        member.flop_model = flop_models[k] if flop_models else None
        member.checkpoints = checkpoints[k] if checkpoints else None
        if resumed_from:
            restore(member, resumed_from[k])
        members.append(member)
    loop.PackTraining(pack, members, mixtures, trainer, observer=Follower(watcher, ended), **options).fit(
        halving=halving
    )
    return [member.progress for member in members]


def fit(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    train: TokenTable,
    selection: TokenTable,
    *,
    second_view: TokenTable | None = None,
    **options: Any,
) -> list[MemberProgress]:
    """Train a pack on one task."""
    mixture = TaskMixture(range(pack.size), {"": TaskData(train, selection, second_view)})
    return fit_mixtures(pack, optimizers, trainer, [mixture], **options)


def prepare(pack: Pack, trainer: Trainer, train: TokenTable, members: Sequence[int] | None = None) -> list[str]:
    """Initialise members from the training pairs of one task, where their settings ask for it."""
    return loop.prepare(pack, trainer, [TaskMixture(range(pack.size), {"": TaskData(train, train)})], members)
