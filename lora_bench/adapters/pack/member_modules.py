"""The leaves of a network that a pack replaces: linears with each member's update beside them, and members' heads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_bench.adapters.pack.batched_lora import BatchedLoRA, batching_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.adapters.base import Update
    from lora_bench.adapters.pack.batched_lora import Stack


@dataclass
class ActiveMembers:
    """The members that a forward pass computes, told to every module that has rows of each."""

    members: list[int]
    head: int = 0
    """Which of each member's heads answers."""


class Unchanged(nn.Module):
    """What stands beside a linear for a member that does not adapt it."""

    takes_output = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class AdaptedLinear(nn.Module):
    """A frozen module with each member's update beside it."""

    def __init__(self, base: nn.Module, updates: Sequence[Update | None], live: ActiveMembers) -> None:
        super().__init__()
        self.base = base
        self.active = live
        self.runs: list[tuple[list[int], BatchedLoRA | None]] = []
        self.updates = nn.ModuleList([update if update is not None else Unchanged() for update in updates])

    @property
    def weight(self) -> Tensor:
        """The frozen weight: T5's feed-forward asks for its type."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def join(self, members: Sequence[int]) -> list[Stack]:
        """Prepare for rows of these members in this order; what has to be filled before each pass."""
        updates: Any = self.updates
        runs = [list(run) for _, run in groupby(members, key=lambda k: batching_key(updates[k]))]
        self.runs = [
            (run, BatchedLoRA([updates[k] for k in run]) if len(run) > 1 and batching_key(updates[run[0]]) else None)
            for run in runs
        ]
        return [stack for _, together in self.runs if together for stack in together.stacks]

    def forward(self, x: Tensor) -> Tensor:
        K = len(self.active.members)
        if K == 1:
            return self._alone(self.active.members[0], x)
        parts = torch.split(x, [len(x) // K * len(run) for run, _ in self.runs]) if len(self.runs) > 1 else (x,)
        adapted = []
        for (run, together), part in zip(self.runs, parts, strict=True):
            if together:
                adapted.append(together(part))
            else:
                adapted += [self._alone(k, xk) for k, xk in zip(run, part.chunk(len(run)), strict=True)]
        return adapted[0] if len(adapted) == 1 else torch.cat(adapted)

    def _alone(self, member: int, x: Tensor) -> Tensor:
        update = self.updates[member]
        return update(x, self.base(x) if update.takes_output else x)  # type: ignore[no-any-return]


class MemberHeads(nn.Module):
    """ParameterSync of a head module, one for each member and each task that it answers; each sees its own rows, in fp32."""

    def __init__(self, original: nn.Module, copies: Sequence[Sequence[nn.Module]], live: ActiveMembers) -> None:
        super().__init__()
        self.active = live
        self.original = [original]  # in a list: not a submodule, never trained
        self.copies = nn.ModuleList(nn.ModuleList(own) for own in copies)

    def of(self, member: int, head: int) -> nn.Module:
        """A member's copy for one task."""
        own: Any = self.copies[member]
        return own[head]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        heads = [self.of(k, self.active.head) for k in self.active.members]
        if len(heads) == 1:
            return heads[0](x.float())  # type: ignore[no-any-return]
        rows = x.float().view(len(heads), -1, *x.shape[1:])
        own = zip(*(head.named_parameters() for head in heads), strict=True)
        stacks = {named[0][0]: torch.stack([p for _, p in named]) for named in own}
        together = torch.vmap(lambda stacks, x: functional_call(heads[0], stacks, (x,)))
        return together(stacks, rows).flatten(0, 1)  # type: ignore[no-any-return]
