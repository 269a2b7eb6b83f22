"""The modules that a pack puts into a network: linears with each member's update, and the members' heads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_bench.adapters.pack.batched_lora import BatchedLoRA, batching_key
from lora_bench.backbones.quantized_modules import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lora_bench.adapters.base import Update
    from lora_bench.adapters.pack.batched_lora import Stack


@dataclass
class ActiveMembers:
    """The members that a forward pass computes; every module that has rows of each member holds this object."""

    members: list[int]
    head: int = 0
    """The number of the head that answers, of each member."""


class NoUpdate(nn.Module):
    """Stands beside a linear for a member that does not adapt it: returns the frozen output."""

    takes_output = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class AdaptedLinear(nn.Module):
    """A frozen linear (or LayerNorm) with each member's update beside it.

    Args:
        base: the frozen module.
        updates: one per member; None where the member does not adapt the module.
        active: the members that a forward pass computes.
    """

    def __init__(self, base: nn.Module, updates: Sequence[Update | None], active: ActiveMembers) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.groups: dict[tuple[int, ...], list[tuple[list[int], BatchedLoRA | None]]] = {}
        """By the members of a pass: neighbours with one batching key, and what computes them together; None: one after
        another."""
        self.updates = nn.ModuleList([update if update is not None else NoUpdate() for update in updates])
        self._quantized = [module for module in self.modules() if isinstance(module, QuantizedWeight)]

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or an empty tensor in the precision of products if it is quantised.

        T5's feed-forward layer reads its dtype.
        """
        return self._quantized[0].like if self._quantized else self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def join(self, members: tuple[int, ...], kept: Collection[tuple[int, ...]]) -> list[Stack]:
        """Prepare for rows of these members in this order; neighbours with one batching key are computed together.

        Args:
            members: of a pass.
            kept: members of other passes that stay prepared.

        Returns:
            The stacks that must be filled before each pass.
        """
        updates: Any = self.updates
        groups = [list(group) for _, group in groupby(members, key=lambda k: batching_key(updates[k]))]
        self.groups = {other: joined for other, joined in self.groups.items() if other in kept}
        self.groups[members] = [
            (
                group,
                BatchedLoRA([updates[k] for k in group])
                if len(group) > 1 and batching_key(updates[group[0]])
                else None,
            )
            for group in groups
        ]
        return [stack for _, batched in self.groups[members] if batched for stack in batched.stacks]

    def forward(self, x: Tensor) -> Tensor:
        """Map (K·B, …, in) to (K·B, …, out), rows of each active member in turn.

        With several active members `join` must have prepared for them.
        """
        K = len(self.active.members)
        if K == 1:
            return self._single(self.active.members[0], x)
        groups = self.groups[tuple(self.active.members)]
        sizes = [len(x) // K * len(group) for group, _ in groups]
        inputs = torch.split(x, sizes) if len(sizes) > 1 else (x,)
        outputs: list[Tensor] = []
        for (group, batched), rows in zip(groups, inputs, strict=True):
            if batched:
                outputs.append(batched(rows))
            else:
                by_member = rows.chunk(len(group))  # (B, …, in) each
                outputs += [self._single(k, x_k) for k, x_k in zip(group, by_member, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _single(self, member: int, x: Tensor) -> Tensor:
        update = self.updates[member]
        return update(x, self.base(x) if update.takes_output else x)  # type: ignore[no-any-return]


class MemberHeads(nn.Module):
    """Copies of a head module, one for each member and each of its tasks; each sees its member's rows only, in fp32.

    Args:
        original: the network's own module; not trained.
        copies: by member, then by task.
        active: the members that a forward pass computes.
    """

    def __init__(self, original: nn.Module, copies: Sequence[Sequence[nn.Module]], active: ActiveMembers) -> None:
        super().__init__()
        self.active = active
        self.original = [original]  # in a list: not a submodule, never trained
        self.copies = nn.ModuleList(nn.ModuleList(of_member) for of_member in copies)

    def of(self, member: int, head: int) -> nn.Module:
        """Return the member's copy for the task of this number; its only one, if it learns one task."""
        copies: Any = self.copies[member]
        return copies[head if len(copies) > 1 else 0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Map (K·B, …, in) to (K·B, …, out) in fp32, rows of each active member in turn, by its active head."""
        heads = [self.of(k, self.active.head) for k in self.active.members]
        if len(heads) == 1:
            return heads[0](x.float())  # type: ignore[no-any-return]
        rows = x.float().view(len(heads), -1, *x.shape[1:])  # (K, B, …, in)
        parameters = zip(*(head.named_parameters() for head in heads), strict=True)
        stacks = {named[0][0]: torch.stack([p for _, p in named]) for named in parameters}
        batched = torch.vmap(lambda stacks, x: functional_call(heads[0], stacks, (x,)))
        return batched(stacks, rows).flatten(0, 1)  # type: ignore[no-any-return]
