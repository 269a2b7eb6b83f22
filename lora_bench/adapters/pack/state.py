"""The members of a pack and their state: parameters, counts, ranks, state dicts, merged weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.adapters.pack.attachment import head_outputs
from lora_bench.adapters.pack.member import stream
from lora_bench.adapters.pack.member_modules import MemberHeads
from lora_bench.adapters.pack.weight_bytes import count_quantized_numbers, weight_bytes
from lora_bench.backbones.fused_linear import join_rows
from lora_bench.backbones.sharding import full_tensor, local_tensor, part_of
from lora_bench.errors import Code, UserError
from lora_bench.head.pair_features import PairFeatures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_bench.adapters.base import Update
    from lora_bench.adapters.pack.member import Member
    from lora_bench.backbones.base import Backbone


class PackState(nn.Module):
    """K members of one backbone, and the tensors of each: what it trains, saves and loads.

    Args:
        backbone: not changed here.
        members: the K members.

    Raises:
        UserError: a member's targets, rank or pair features do not fit the backbone, or `full` is packed with others.
    """

    def __init__(self, backbone: Backbone, members: Sequence[Member]) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.network
        self.members = list(members)
        self.trains_backbone = any(member.adapter.trains_backbone for member in members)
        if self.trains_backbone and len(members) > 1:
            raise UserError(
                "trains the backbone itself, so it cannot be packed with other members",
                key="adapter.method",
                value="full",
                code=Code.UNSUPPORTED,
            )
        try:
            self.dropout = [stream(member.seed_of("dropout"), "dropout", backbone.device) for member in members]
            self.targets = [member.adapter.targets(backbone) for member in members]
            self.updates = [self._new_updates(k, member.saved_ranks) for k, member in enumerate(members)]
        except UserError as error:
            raise error.under("adapter") from None
        self.assigned_ranks = [member.saved_ranks for member in members]
        """Ranks by module that each member's updates were built with; None where its method's settings gave them."""
        self.pair_features = nn.ModuleDict(
            {
                str(k): PairFeatures(
                    backbone.hidden_size,
                    backbone.device,
                    head_outputs(member, backbone)[0],
                    signed=member.signed_differences,
                )
                for k, member in enumerate(members)
                if _has_pair_features(member, backbone)
            }
        )
        """By member number as text; members without pair features are absent."""

    @property
    def size(self) -> int:
        """K, the number of members."""
        return len(self.members)

    def heads(self, member: int) -> int:
        """Return the number of a member's heads: one for each task that it learns."""
        return len(head_outputs(self.members[member], self.backbone))

    def outputs(self, member: int, head: int) -> int:
        """Return the number of logits of one of a member's heads."""
        outputs = head_outputs(self.members[member], self.backbone)
        return outputs[head if len(outputs) > 1 else 0]

    # -- parameters --

    def adapter_parameters(self, member: int) -> dict[str, nn.Parameter]:
        """Return the member's adapter parameters by `<module>.<parameter>`.

        With `full` these are the backbone's own, under their own names.
        """
        if self.trains_backbone:
            return {name: p for name, p in self.network.named_parameters() if ".copies." not in name}
        return {
            f"{name}.{key}": p for name, update in self.updates[member].items() for key, p in update.named_parameters()
        }

    def head_parameters(self, member: int, head: int | None = None) -> dict[str, nn.Parameter]:
        """Return the parameters of the member's heads by their names in the Hugging Face model.

        Pair features, if it has them, come last, as `matching.<parameter>`. A detached pack has no heads.

        Args:
            member: its number in the pack.
            head: the number of one head; None: all of them, those after the first below `head_<i>.`.
        """
        heads_by_name = {name: self.network.get_submodule(name) for name in self.backbone.head_modules}
        modules: dict[str, nn.Module] = {
            f"{f'head_{i}.' if i and head is None else ''}{name}": heads.of(member, i)
            for i in (range(self.heads(member)) if head is None else [head])
            for name, heads in heads_by_name.items()
            if isinstance(heads, MemberHeads)
        }
        if str(member) in self.pair_features:
            modules["matching"] = self.pair_features[str(member)]  # the name in adapter files
        return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}

    def trainable(self, member: int, head: int | None = None) -> dict[str, nn.Parameter]:
        """Return everything that the member trains: its adapter, and all its heads or the one of this number."""
        return {**self.adapter_parameters(member), **self.head_parameters(member, head)}

    def tensors(self, member: int) -> list[Tensor]:
        """Return the member's trained tensors, and the frozen ones that belong to its adapter."""
        buffers = [buffer for update in self.updates[member].values() for buffer in update.buffers()]
        buffers = [buffer for buffer in buffers if buffer.numel()]
        return [*self.trainable(member).values(), *buffers]

    def count_parameters(self, member: int, head: int | None = None) -> dict[str, int]:
        """Count the member's parameters: `adapter`, `head`, `trainable` (both), and `total`.

        `total` also has the frozen backbone, but not the other members.

        Args:
            member: its number in the pack.
            head: count this head only; None: all heads.
        """
        adapter = sum(p.numel() for p in self.adapter_parameters(member).values())
        heads = sum(p.numel() for p in self.head_parameters(member, head).values())
        trained = sum(p.numel() for k in range(self.size) for p in self.trainable(k).values())
        frozen = sum(p.numel() for p in self.parameters()) - trained + count_quantized_numbers(self)
        return {"adapter": adapter, "head": heads, "trainable": adapter + heads, "total": frozen + adapter + heads}

    def weight_bytes(self, members: Iterable[int]) -> dict[str, int]:
        """Return the bytes of the frozen weights that these members compute with; empty if none is quantised."""
        return weight_bytes(self, members)

    # -- state dicts --

    def state(self, member: int, head: int | None = None, *, keep: bool = True) -> dict[str, Tensor]:
        """Return CPU copies of the member's trained tensors, with all heads or the one of this number.

        Every process of a sharded pack must call this; those that do not need the copies set `keep` to False.
        """
        state = {}
        for name, p in self.trainable(member, head).items():
            tensor = full_tensor(p)
            if keep:
                state[name] = tensor.cpu().clone()
        return state

    def parts(self, member: int) -> dict[str, Tensor]:
        """Return CPU copies of the member's trained tensors, of sharded ones the part of this process."""
        return {name: local_tensor(p).cpu().clone() for name, p in self.trainable(member).items()}

    def load_parts(self, member: int, parts: dict[str, Tensor]) -> None:
        """Load tensors that `parts` returned in this process."""
        for name, p in self.trainable(member).items():
            local_tensor(p).copy_(parts[name])

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        """Load tensors that `state` returned.

        Raises:
            UserError: tensors are missing, superfluous, of another shape or not finite; nothing is loaded then.
        """
        parameters = self.trainable(member)
        misfits = (
            sorted(parameters.keys() ^ state.keys())
            or [name for name, p in parameters.items() if state[name].shape != p.shape]
            or [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        )
        if misfits:
            raise UserError(
                f"the saved tensors do not fit this backbone and adapter: {', '.join(misfits[:3])}", code=Code.DAMAGED
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(part_of(state[name], p))

    def ranks(self, member: int) -> dict[str, int]:
        """Return the rank of each of the member's targets; 0 where it is not adapted or the method has no ranks."""
        updates = self.updates[member]
        return {name: updates[name].rank if name in updates else 0 for name in self.targets[member]}

    def merged(self, member: int) -> dict[str, Tensor]:
        """Return the weights and biases of the adapted modules in fp32, by name, with the member's updates added.

        Put into the plain network, they compute what this member computes, excluding the head.
        """
        merged: dict[str, Tensor] = {}
        for name, update in self.updates[member].items():
            base: Any = self.network.get_submodule(f"{name}.base")
            with torch.no_grad():
                bias = getattr(base, "bias", None)  # T5's norms have none
                weight, bias = update.merge(base.weight.float(), None if bias is None else bias.float())
            merged |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        return join_rows(self.network, merged)

    def _new_updates(self, member: int, ranks: dict[str, int] | None) -> dict[str, Update]:
        settings = self.members[member]
        init = None if settings.saved_ranks else stream(settings.seed_of("init"), "adapter")
        return settings.adapter.updates(self.backbone, init, self.dropout[member], ranks)


def _has_pair_features(member: Member, backbone: Backbone) -> bool:
    """Return whether a member has pair features; None in its settings means that it has them if the backbone can.

    Raises:
        UserError: they are requested, and the backbone does not give the tokens' vectors of each text.
    """
    requested = member.pair_features
    if requested is None:
        return backbone.separates_texts
    if requested and not backbone.separates_texts:
        raise UserError(
            "needs a vector for each token of the two texts, and this model does not give them",
            key="head.pair_features",
            value="true",
            remedy="Set head.pair_features=false.",
            code=Code.UNSUPPORTED,
        )
    return requested
