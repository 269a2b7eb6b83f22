"""A pack: K adapters with their heads on one frozen backbone, computed along a leading dimension K.

A single run is a pack of one. The network is attached to the members (attachment.py) and otherwise left as it is: every
module between adapted linears and heads works row by row, so it need not know of K. A method's mathematics is written
for one member. Members take a pass through the adapted layers in groups, LoRA variants with batched products
(batched_lora.py). On a GPU, where a small encoder waits for launches, all members are one group. On a CPU a group is as
large as its caches: 4 members of a small encoder save a quarter of the time, which operators take whatever their size.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.adapters.pack.attachment import attach_heads, attach_updates, detach
from lora_bench.adapters.pack.batched_lora import ParameterSync, batching_key
from lora_bench.adapters.pack.member_modules import ActiveMembers, AdaptedLinear, MemberHeads
from lora_bench.adapters.pack.state import PackState
from lora_bench.backbones.activation_checkpointing import ActivationCheckpointing
from lora_bench.backbones.dropout import replace_dropout, restore_dropout
from lora_bench.head.pair_features import compute_pair_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from lora_bench.adapters.pack.member import Member
    from lora_bench.backbones.base import Backbone
    from lora_bench.data.batching import Batch


CPU_GROUP = 1536
"""Members of a group on a CPU, times the size of the hidden states: 4 members of MiniLM (384), 2 of BERT-base (768). On
two cores with AMX, 32 pairs of 30 tokens, LoRA on all linears of MiniLM in bf16: 99 ms per member and step alone, 82 in
groups of 2, 75 of 4 and of 8 (LOG.md)."""


class Pack(PackState):
    """K members attached to one backbone: its adapted linears and heads are replaced until `detach` is called.

    Args:
        backbone: stays frozen and bitwise unchanged, unless the one member trains it (`full`).
        members: the K members.
        batched: True: all members take a pass through the adapted layers at once; False: one member after another, as
            always where the backbone cannot be batched; None: True, but on a CPU in groups of `CPU_GROUP`.

    Raises:
        UserError: a member's targets, rank or pair features do not fit the backbone, or `full` is packed with others.
    """

    def __init__(self, backbone: Backbone, members: Sequence[Member], *, batched: bool | None = None) -> None:
        super().__init__(backbone, members)
        self.group_size = max(1, len(members))
        """Maximum number of members that take a pass through the adapted layers together."""
        if batched is False or not backbone.can_be_batched:
            self.group_size = 1
        elif batched is None and backbone.device.type == "cpu":
            self.group_size = cpu_group_size(backbone, len(members))
        self.max_micro_batch: dict[str, int] = {}
        """Pairs of each member per forward pass that fit into memory in `training` and in `evaluation`; a key is
        absent until a larger micro-batch has failed."""
        self.recomputes_activations = False
        self.prefix_depth: int | None = None
        """The number of layers whose output is read from the cached prefix; None where it is computed."""
        self._active = ActiveMembers(list(range(len(members))))
        self._syncs: dict[tuple[int, ...], ParameterSync] = {}
        """Stacked parameters of each group of members that the adapted linears are prepared for."""
        self.network.requires_grad_(self.trains_backbone)
        if self.trains_backbone and backbone.device.type == "cpu":
            replace_dropout(self.network)
        attach_heads(backbone, self.members, self._active)
        self._attach_updates()

    # -- attaching and detaching --

    def set_ranks(self, member: int, ranks: dict[str, int]) -> None:
        """Replace the member's updates by new ones of these ranks, initialised anew; what they had learned is lost.

        A module of rank 0 is not adapted. Other members keep their updates.
        """
        detach(self.network, AdaptedLinear)
        self.updates[member] = self._new_updates(member, ranks)
        self.assigned_ranks[member] = ranks
        self._attach_updates()

    def detach(self) -> None:
        """Put the backbone's own modules back, unchanged."""
        self.checkpoint_activations(False)
        detach(self.network, AdaptedLinear, MemberHeads)
        restore_dropout(self.network)

    def _attach_updates(self) -> None:
        """Attach the members' present updates to the network, find the first adapted layer, and discard the stacks.

        Weights that an update computes with, or that a member does not adapt, are loaded.
        """
        self.backbone.load_weights(
            {
                name
                for name in self.backbone.offloaded
                if any(name not in updates or updates[name].needs_weight for updates in self.updates)
            }
        )
        attach_updates(self.network, self.updates, self._active)
        self.depth = self._first_adapted_layer()
        self._syncs = {}

    def shard(self) -> None:
        """Shard the backbone over the processes of torchrun; adapters and heads stay whole in each process.

        With `full` only the heads stay whole.
        """
        adapters = [] if self.trains_backbone else [self.adapter_parameters(k) for k in range(self.size)]
        whole = [*adapters, *(self.head_parameters(k) for k in range(self.size))]
        self.backbone.shard(p for parameters in whole for p in parameters.values())
        self.checkpoint_activations(self.recomputes_activations)

    def checkpoint_activations(self, recomputed: bool) -> None:
        """Compute the layers' activations again in the backward pass from now on, or hold them."""
        self.recomputes_activations = recomputed
        self.backbone.checkpoint_layers(ActivationCheckpointing(self._capture_pass) if recomputed else None)

    def _capture_pass(self) -> AbstractContextManager[None]:
        """Return a context in which a layer computes as now: the same members, head and random numbers of dropout.

        Afterwards members, head and random streams are those from before the context.
        """
        members, head = self._active.members, self._active.head
        states = {k: self.dropout[k].get_state() for k in members}

        @contextmanager
        def captured() -> Iterator[None]:
            present = {k: self.dropout[k].get_state() for k in members}
            active, present_head = self._active.members, self._active.head
            self._active.members, self._active.head = members, head
            for k, state in states.items():
                self.dropout[k].set_state(state)
            try:
                yield
            finally:
                self._active.members, self._active.head = active, present_head
                for k, state in present.items():
                    self.dropout[k].set_state(state)

        return captured()

    # -- active members --

    @property
    def active(self) -> list[int]:
        """The members that are computed: all except those whose training is over."""
        return self._active.members

    @active.setter
    def active(self, members: Sequence[int]) -> None:
        if members != self.active:
            self._active.members = list(members)
            self.depth = self._first_adapted_layer()

    @contextmanager
    def only(self, members: Sequence[int]) -> Iterator[None]:
        """Compute only these members within the context, afterwards those that were active before."""
        before = self.active
        self.active = list(members)
        try:
            yield
        finally:
            self.active = before

    def train(self, mode: bool = True) -> Pack:
        """Set the adapters' training mode and return the pack.

        A frozen backbone and the heads on it stay in evaluation mode, so they never drop anything out.
        """
        super().train(mode and self.trains_backbone)
        self.training = mode  # `predict` restores it
        for updates in self.updates:
            for update in updates.values():
                update.train(mode)
        return self

    def member_groups(self) -> list[list[int]]:
        """Return the active members in groups; each group takes one pass through the adapted layers.

        Groups have at most `group_size` members. Members with the same batching key are neighbours. Those that need
        every position of the last layer are in groups of their own: the others' dropout would draw more random numbers
        there than in a single run. Apart from that, groups differ by at most one member. Groups of one are in the order
        of `active`.
        """
        if self.group_size == 1:
            return [[k] for k in self.active]
        groups = []
        for needs_all in (False, True):
            members = [k for k in self.active if self._needs_all_positions(k) == needs_all]
            members.sort(key=self._batching_order)
            count = -(-len(members) // self.group_size)
            ends = [len(members) * i // count for i in range(count + 1)] if members else []
            groups += [members[start:end] for start, end in pairwise(ends)]
        return groups

    def _needs_all_positions(self, member: int) -> bool:
        """Return whether the last layer must compute every position for a member, even if the head reads only one."""
        return str(member) in self.pair_features or self.members[member].adapter.mixes_positions

    def _batching_order(self, member: int) -> tuple[str, int]:
        """Return a sort key of the member's first update: members of one batching key together, by ascending rank."""
        first = next(iter(self.updates[member].values()), None)
        return str(first and batching_key(first)), first.rank if first else 0

    # -- the forward pass --

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (K, B, C) of the K active members, in fp32.

        A batch of B rows is shared by all members; one of K·B rows holds each member's own pairs, member by member.
        """
        hidden = self.prefix(batch)  # (B or K·B, T, D)
        groups = self.member_groups()
        logits = torch.cat([self.suffix(hidden, batch, group) for group in groups])  # (K, B, C)
        order = [k for group in groups for k in group]
        return logits if order == self.active else logits[[order.index(k) for k in self.active]]

    def prefix(self, batch: Batch) -> Tensor:
        """Return the hidden states below the first adapted layer, (B or K·B, T, D), once for all active members.

        Cached hidden states of the batch are returned as they are. With `full` these are the embeddings, with
        gradients. A backbone that can only be computed as a whole, as a sharded one, returns the token ids,
        (B or K·B, T).
        """
        if batch.hidden is not None:
            return batch.hidden
        if self.backbone.is_sharded:  # its weights are there in one pass of the whole network
            return batch.input_ids
        gradients = torch.is_grad_enabled() and self.trains_backbone
        with torch.set_grad_enabled(gradients), self._autocast():
            return self.backbone.prefix(batch, self.depth)

    def suffix(self, hidden: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Return the logits (K, B, C) of K active members, in fp32.

        Args:
            hidden: the output of `prefix` for the batch.
            batch: of all active members.
            members: the K members to compute.
        """
        K = len(members)
        hidden, batch = self._rows_of(hidden, replace(batch, hidden=None), members)  # (K·B, T, D)
        if K > 1:
            self._synced(members).copy_parameters()
        needs_all = any(map(self._needs_all_positions, members))
        with self._computing(members, batch.head, all_positions=needs_all), self._autocast():
            # (K·B, C), and (K·B, T, D) or (K·B, 1, D)
            logits, states = (
                self.backbone.compute_sharded(batch)
                if self.backbone.is_sharded
                else self.backbone.suffix_with_states(hidden, batch, self.depth)
            )
        logits = logits.float().view(K, -1, logits.shape[-1])  # (K, B, C)
        return self._add_pair_features(logits, states, batch, members)

    def _rows_of(self, hidden: Tensor, batch: Batch, members: list[int]) -> tuple[Tensor, Batch]:
        """Return the rows of these members, member by member: (K·B, T, D) and a batch of as many rows.

        Rows that the members share are repeated for each.
        """
        K, active = len(members), self.active
        if batch.members > 1 and active != members:
            positions = [active.index(k) for k in members]
            by_member = hidden.view(len(active), -1, *hidden.shape[1:])  # (active, B, T, D)
            return torch.cat([by_member[i] for i in positions]), batch.select_members(positions)  # (K·B, T, D)
        if batch.members == 1 and K > 1:
            return hidden.repeat(K, *[1] * (hidden.ndim - 1)), batch.repeat(K)  # (K·B, T, D)
        return hidden, batch

    @contextmanager
    def _computing(self, members: list[int], head: int, *, all_positions: bool) -> Iterator[None]:
        """Let the attached modules take rows of these members and answer with this head within the context."""
        active, before = self.active, self.backbone.all_positions
        self._active.members, self._active.head = members, head
        self.backbone.all_positions = before or all_positions
        try:
            yield
        finally:
            self._active.members = active
            self.backbone.all_positions = before

    def _add_pair_features(self, logits: Tensor, states: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Return the logits (K, B, C) with the pair features' part added, for the members that have them."""
        by_number: dict[str, Any] = dict(self.pair_features.items())
        modules = {i: by_number[str(k)] for i, k in enumerate(members) if str(k) in by_number}
        if not modules:
            return logits
        masks, features = self.backbone.text_masks(batch), {}
        for signed in {module.signed for module in modules.values()}:
            rows = compute_pair_features(states, *masks, signed=signed)  # (K·B, 2 D)
            features[signed] = rows.view(*logits.shape[:2], -1)  # (K, B, 2 D)
        sums = [
            of_member + modules[i](features[modules[i].signed][i]) if i in modules else of_member  # (B, C)
            for i, of_member in enumerate(logits)
        ]
        return torch.stack(sums)  # (K, B, C)

    def _first_adapted_layer(self) -> int:
        """Return the number of layers below the first one with an update of an active member; they run once for all.

        With a cached prefix it is the depth of that prefix; with `full`, which freezes no layer, and if the backbone is
        sharded, 0. If no layer has an update, it is the number of layers; updates outside the layers do not count.
        """
        if self.prefix_depth is not None:
            return self.prefix_depth
        if self.trains_backbone or self.backbone.is_sharded:
            return 0
        layers = [self.backbone.layer_of(name) for k in self.active for name in self.updates[k]]
        return min((layer for layer in layers if layer is not None), default=len(self.backbone.layers))

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        """Return a context that casts products with `full`, whose weights stay fp32; without effect otherwise.

        Frozen weights were cast when they were loaded. The cast copies of sharded weights are not kept for later
        layers.
        """
        backbone = self.backbone
        if self.trains_backbone and backbone.compute_dtype != torch.float32:
            keep = not backbone.is_sharded
            return torch.autocast(backbone.device.type, backbone.compute_dtype, cache_enabled=keep)
        return nullcontext()

    # -- stacked parameters of members that are computed together --

    @contextmanager
    def accumulating_gradients(self) -> Iterator[None]:
        """Sum up the gradients of backward passes within the context; at its end the parameters have them.

        That concerns members that are computed together: their stacks start from zero, and the sum replaces that of an
        earlier context. A member computed by itself adds to its `.grad` as usual, which is not cleared here.
        """
        syncs = [self._synced(group) for group in self.member_groups() if len(group) > 1]
        for sync in syncs:
            sync.zero_gradients()
        yield
        for sync in syncs:
            sync.copy_gradients()

    @property
    def parameter_syncs(self) -> tuple[ParameterSync, ...]:
        """The stacked parameters in use; a recorded pass over other stacks cannot be replayed."""
        return tuple(self._syncs.values())

    def _synced(self, members: list[int]) -> ParameterSync:
        """Return the stacked parameters of a group of members, for which the adapted linears are then prepared.

        They are reused while the groups and their updates stay the same. The stacks are not filled here.
        """
        group = tuple(members)
        if group not in self._syncs:
            present = {tuple(of_active) for of_active in self.member_groups()}
            self._syncs = {known: sync for known, sync in self._syncs.items() if known in present}
            adapted = [module for module in self.network.modules() if isinstance(module, AdaptedLinear)]
            stacks = [stack for module in adapted for stack in module.join(group, present)]
            self._syncs[group] = ParameterSync(stacks)
        return self._syncs[group]


def cpu_group_size(backbone: Backbone, members: int) -> int:
    """Return how many of these members a CPU computes together by default."""
    return min(max(1, CPU_GROUP // backbone.hidden_size), max(1, members)) if backbone.can_be_batched else 1
