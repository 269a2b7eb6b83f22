"""A pack: K adapters with their heads on one frozen backbone, computed along a leading dimension K.

A single run is a pack of one. `Pack` replaces two kinds of leaves of the backbone's network, and `detach` puts them
back:

    a target (a linear)       ->  AdaptedLinear          each member's frozen product and its update
    a head module             ->  MemberHeads      one copy per member, in fp32

Everything between them works row by row, so the network itself need not know of K. A method's mathematics is written
for one member. On a CPU members pass one after another, which is as quick (products run at one rate from 960 rows on);
on a GPU, where a small encoder waits for launches, all pass at once, LoRA's kin computed together (see together.py).
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.adapters.pack.batched_lora import ParameterSync, batching_key
from lora_bench.adapters.pack.member_modules import ActiveMembers, AdaptedLinear, MemberHeads
from lora_bench.errors import Code, UserError
from lora_bench.head.pair_features import PairFeatures, compute_pair_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.adapters.base import Adapter, Update
    from lora_bench.backbones.base import Backbone
    from lora_bench.data.batching import Batch


@dataclass(frozen=True)
class Member:
    """What distinguishes one member of a pack: its method with its settings, and its seed."""

    adapter: Adapter
    seed: int
    saved_ranks: dict[str, int] | None = None
    """Rank by module of a saved adapter whose tensors are about to be put in; None: a member that is to be trained."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Of `init`, `order` and `dropout`, those that have seeds of their own."""
    heads: int = 1
    """One for each task that it learns; a batch says which of them answers it."""

    def seed_of(self, purpose: str) -> int:
        """The seed of `init`, `order` (of the pairs) or `dropout`."""
        return self.seeds.get(purpose, self.seed)


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """An independent random stream for one purpose (`adapter`, `head`, `dropout`) of one seed."""
    digest = sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


class Pack(nn.Module):
    """K members attached to one backbone.

    Args:
        backbone: stays frozen and bitwise unchanged, unless the one member trains it (`full`).
        members: the K members.
        batched: whether a pass through the adapted layers takes all members' rows at once (None: where the device is
            no CPU) or the rows of one member after the other, as always where the backbone cannot be batched.

    Raises:
        UserError: a member's targets or rank do not fit the backbone, or `full` is packed with others.
    """

    def __init__(self, backbone: Backbone, members: Sequence[Member], *, batched: bool | None = None) -> None:
        super().__init__()
        self.batched = backbone.can_be_batched and (backbone.device.type != "cpu" if batched is None else batched)
        self.backbone = backbone
        self.network = backbone.network
        self.members = list(members)
        self._live = ActiveMembers(list(range(len(members))))
        self.trains_backbone = any(member.adapter.trains_backbone for member in members)
        if self.trains_backbone and len(members) > 1:
            raise UserError(
                "trains the backbone, so its packs have one member",
                key="adapter.method",
                value="full",
                code=Code.UNSUPPORTED,
            )
        try:
            self.dropout = [stream(member.seed_of("dropout"), "dropout", backbone.device) for member in members]
            self.targets = [member.adapter.targets(backbone) for member in members]
            self.updates = [self._make_updates(k, member.saved_ranks) for k, member in enumerate(members)]
        except UserError as error:
            raise error.under("adapter") from None
        self.assigned_ranks = [member.saved_ranks for member in members]
        """Ranks by module that each member's updates were made with, where not its method alone decided them."""
        self.max_micro_batch: dict[str, int] = {}
        """Pairs of each member per forward pass that memory has room for in `training` and in `evaluation`: known
        where fewer fitted than were asked for."""
        self.prefix_depth: int | None = None
        """Where the network is cut, whoever is live, once what lies below is read and not computed."""
        self._joined: tuple[list[int], ParameterSync] | None = None
        size, device = backbone.hidden_size, backbone.device
        apart = backbone.tells_texts_apart
        asked = [apart if m.adapter.matching is None else m.adapter.matching for m in members]
        matching = [k for k, asks in enumerate(asked) if asks]
        if matching and not apart:
            reason = "needs to know where the second text begins, and this model reads both as one"
            raise UserError(
                reason,
                key="adapter.matching",
                value="true",
                remedy="Take adapter.matching=false.",
                code=Code.UNSUPPORTED,
            )
        self.pair_features = nn.ModuleDict({str(k): PairFeatures(size, device) for k in matching})
        self._attach_heads()
        self._attach_updates()

    @property
    def size(self) -> int:
        """K, the number of members."""
        return len(self.members)

    @property
    def active(self) -> list[int]:
        """The members that are computed: all, but for those that training is over for."""
        return self._live.members

    @active.setter
    def active(self, members: Sequence[int]) -> None:
        if members != self.active:
            self._live.members = list(members)
            self.depth = self._first_adapted_layer()

    @contextmanager
    def only(self, members: Sequence[int]) -> Iterator[None]:
        """Within, these members alone are computed."""
        before = self.active
        self.active = list(members)
        try:
            yield
        finally:
            self.active = before

    def forward(self, batch: Batch) -> Tensor:
        """Logits (K, B, 2) in fp32 of the K live members.

        A batch of B rows is shared by all members; one of K·B rows holds each member's own pairs, member by member.
        """
        hidden = self.prefix(batch)
        portions = self.member_groups()
        logits = torch.cat([self.suffix(hidden, batch, part) for part in portions])
        order = [k for part in portions for k in part]
        return logits if order == self.active else logits[[order.index(k) for k in self.active]]

    def member_groups(self) -> list[list[int]]:
        """The live members by those that one pass through the adapted layers takes; those that are alike in a row.

        A CPU's products are at their peak for one member already; there one after the other needs least memory.
        """
        return [sorted(self.active, key=self._likeness)] if self.batched else [[k] for k in self.active]

    def _likeness(self, member: int) -> tuple[str, int]:
        first = next(iter(self.updates[member].values()), None)
        return str(first and batching_key(first)), first.rank if first else 0

    @contextmanager
    def accumulating_gradients(self) -> Iterator[None]:
        """Backward passes within it gather gradients; when it ends the members' parameters have them."""
        copies = [self._copies(part) for part in self.member_groups() if len(part) > 1]
        for each in copies:
            each.clear()
        yield
        for each in copies:
            each.give()

    @property
    def parameter_sync(self) -> ParameterSync | None:
        """What holds copies of members' tensors at present: passes that it is not part of are other passes."""
        return self._joined and self._joined[1]

    def _copies(self, members: list[int]) -> ParameterSync:
        """What holds copies of these members' tensors while they are computed together."""
        if self._joined is None or self._joined[0] != members:
            adapted = [module for module in self.network.modules() if isinstance(module, AdaptedLinear)]
            self._joined = members, ParameterSync([stack for module in adapted for stack in module.join(members)])
        return self._joined[1]

    def prefix(self, batch: Batch) -> Tensor:
        """Hidden states below the first adapted layer, (B or K·B, T, D), once for all live members."""
        if batch.hidden is not None:
            return batch.hidden
        learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and self.trains_backbone), self._autocast():
            return self.backbone.prefix(batch, self.depth)

    def suffix(self, hidden: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Logits (len(members), B, 2) in fp32 of some live members, from what `prefix` gave for the batch."""
        K, live = len(members), self.active
        batch = replace(batch, hidden=None)
        if batch.members > 1 and live != members:
            places = [live.index(k) for k in members]
            rows = hidden.view(len(live), -1, *hidden.shape[1:])
            hidden = torch.cat([rows[k] for k in places])
            batch = batch.of(places)
        elif batch.members == 1 and K > 1:
            batch = batch.repeat(K)
            hidden = hidden.repeat(K, *[1] * (hidden.ndim - 1))
        if K > 1:
            self._copies(members).take()
        self._live.members, self._live.head = members, batch.head
        everywhere, matching = self.backbone.all_positions, any(str(k) in self.pair_features for k in members)
        try:
            with self._autocast():
                self.backbone.all_positions = everywhere or matching
                encoded = self.backbone.encode(hidden, batch, self.depth)  # (K·B, T, D) or (K·B, 1, D)
                logits = self.backbone.answer(encoded, batch)  # (K·B, 2)
        finally:
            self._live.members = live
            self.backbone.all_positions = everywhere
        logits = logits.float().view(K, -1, logits.shape[-1])
        if not matching:
            return logits
        features = compute_pair_features(encoded, *self.backbone.texts(batch)).view(K, logits.shape[1], -1)
        own = [
            own + self.pair_features[str(k)](rows) if str(k) in self.pair_features else own
            for k, own, rows in zip(members, logits, features, strict=True)
        ]
        return torch.stack(own)

    def train(self, mode: bool = True) -> Pack:
        """Training mode reaches the adapters; a frozen backbone and the heads on it never drop anything out."""
        super().train(mode and self.trains_backbone)
        self.training = mode  # what `predict` puts back
        for updates in self.updates:
            for update in updates.values():
                update.train(mode)
        return self

    def adapter_parameters(self, member: int) -> dict[str, nn.Parameter]:
        """The member's adapter parameters by `<module>.<parameter>`; with `full` the backbone's own, in their names."""
        if self.trains_backbone:
            return {name: p for name, p in self.network.named_parameters() if ".copies." not in name}
        return {
            f"{name}.{key}": p for name, update in self.updates[member].items() for key, p in update.named_parameters()
        }

    def head_parameters(self, member: int, head: int | None = None) -> dict[str, nn.Parameter]:
        """The parameters of one of the member's heads by the names that they have in the Hugging Face model.

        Args:
            head: which; None: all, each after the first below `head_<i>.`.
        """
        packed = {name: self.network.get_submodule(name) for name in self.backbone.head_modules}
        own = {
            f"{f'head_{i}.' if i and head is None else ''}{name}": heads.of(member, i)
            for i in (range(self.members[member].heads) if head is None else [head])
            for name, heads in packed.items()
            if isinstance(heads, MemberHeads)
        }
        if str(member) in self.pair_features:
            own["matching"] = self.pair_features[str(member)]
        return {f"{name}.{key}": p for name, module in own.items() for key, p in module.named_parameters()}

    def trainable(self, member: int, head: int | None = None) -> dict[str, nn.Parameter]:
        """All that the member trains: adapter and heads, or one of them."""
        return {**self.adapter_parameters(member), **self.head_parameters(member, head)}

    def tensors(self, member: int) -> list[Tensor]:
        """All that makes the member what it is: what it trains, and what its method keeps beside that."""
        kept = [buffer for update in self.updates[member].values() for buffer in update.buffers()]
        return [*self.trainable(member).values(), *kept]

    def count_parameters(self, member: int, head: int | None = None) -> dict[str, int]:
        """Numbers of parameters: the adapter's, its heads' (or of one), both together, and with the frozen ones."""
        adapter = sum(p.numel() for p in self.adapter_parameters(member).values())
        heads = sum(p.numel() for p in self.head_parameters(member, head).values())
        trained = sum(p.numel() for k in range(self.size) for p in self.trainable(k).values())
        frozen = sum(p.numel() for p in self.parameters()) - trained
        return {"adapter": adapter, "head": heads, "trainable": adapter + heads, "total": frozen + adapter + heads}

    def state(self, member: int, head: int | None = None) -> dict[str, Tensor]:
        """A copy of the member's trained tensors, with all heads or one, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable(member, head).items()}

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            UserError: tensors are missing, left over, misshapen or not finite.
        """
        own = self.trainable(member)
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, p in own.items() if state[n].shape != p.shape]
        wrong = wrong or [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if wrong:
            raise UserError(
                f"the saved tensors do not fit this backbone and adapter: {', '.join(wrong[:3])}", code=Code.DAMAGED
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state[name])

    def ranks(self, member: int) -> dict[str, int]:
        """The rank of each of the member's targets; 0 where it is left as it is, or where the method has no ranks."""
        updates = self.updates[member]
        return {name: updates[name].rank if name in updates else 0 for name in self.targets[member]}

    def set_ranks(self, member: int, ranks: dict[str, int]) -> None:
        """Make the member's updates anew with these ranks by module; 0 leaves a module as it is."""
        self._detach(AdaptedLinear)
        self.updates[member] = self._make_updates(member, ranks)
        self.assigned_ranks[member] = ranks
        self._attach_updates()

    def merged(self, member: int) -> dict[str, Tensor]:
        """Weights and biases, in fp32, with which the plain network says what this member says, but for its head."""
        found: dict[str, Tensor] = {}
        for name, update in self.updates[member].items():
            base: Any = self.network.get_submodule(name)
            with torch.no_grad():
                weight, bias = update.merge(base.weight.float(), None if base.bias is None else base.bias.float())
            found |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        return found

    def detach(self) -> None:
        """Give the backbone its own modules back, as they were."""
        self._detach(AdaptedLinear, MemberHeads)

    def _detach(self, *kinds: type[AdaptedLinear | MemberHeads]) -> None:
        for name, module in list(self.network.named_modules()):
            if isinstance(module, kinds):
                _replace(self.network, name, module.base if isinstance(module, AdaptedLinear) else module.original[0])

    def _make_updates(self, member: int, ranks: dict[str, int] | None) -> dict[str, Update]:
        own = self.members[member]
        init = None if own.saved_ranks else stream(own.seed_of("init"), "adapter")
        return own.adapter.updates(self.backbone, init, self.dropout[member], ranks)

    def _first_adapted_layer(self) -> int:
        """How many layers run once for all live members; with `full` none, not even the embeddings, is frozen."""
        if self.prefix_depth is not None:
            return self.prefix_depth
        if self.trains_backbone:
            return 0
        layers = [self.backbone.layer_of(name) for k in self.active for name in self.updates[k]]
        return min((layer for layer in layers if layer is not None), default=len(self.backbone.layers))

    def _attach_updates(self) -> None:
        for name in dict.fromkeys(name for updates in self.updates for name in updates):
            base = self.network.get_submodule(name)
            _replace(
                self.network, name, AdaptedLinear(base, [updates.get(name) for updates in self.updates], self._live)
            )
        self.depth = self._first_adapted_layer()
        self._joined = None

    def _attach_heads(self) -> None:
        self.network.requires_grad_(self.trains_backbone)
        for name in self.backbone.head_modules:
            original = self.network.get_submodule(name)
            # All heads of a member begin alike, as that of a member which learns one of the tasks alone.
            heads = [[self._head(name, original, member) for _ in range(member.heads)] for member in self.members]
            _replace(self.network, name, MemberHeads(original, heads, self._live))

    def _head(self, name: str, original: nn.Module, member: Member) -> nn.Module:
        """A trainable fp32 copy of a head module; what the checkpoint did not hold is drawn from the member's seed."""
        head = copy.deepcopy(original).float().requires_grad_(True)
        init = stream(member.seed_of("init"), f"head/{name}")
        for key, p in head.named_parameters():
            # As transformers draws a new classifier: normal weights; zero biases and unit norms stay as they are.
            if f"{name}.{key}" in self.backbone.fresh and p.ndim > 1:
                drawn = torch.empty(p.shape).normal_(0.0, self.backbone.initializer_range, generator=init)
                p.data.copy_(drawn)
        return head

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        """With `full` the weights stay fp32 and products are cast; frozen weights are cast once, when loaded."""
        if self.trains_backbone and self.backbone.compute_dtype != torch.float32:
            return torch.autocast(self.backbone.device.type, self.backbone.compute_dtype)
        return nullcontext()


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
