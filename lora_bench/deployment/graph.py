"""A finished run as one graph from token ids to scores and labels, traced by `torch.export`.

The graph has no adapter: every member's update is merged into weights of its own. In the families BERT and T5 the
layers below the first adapted one are computed once for all members, in the generic family for each. The second order
of a pair, where the run scores both, takes the same pass as the first.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lora_bench.adapters.pack.member_modules import AdaptedLinear
from lora_bench.backbones.quantized_network import dequantize_network
from lora_bench.data.batching import Batch
from lora_bench.head.loss import scores_of_logits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from lora_bench.adapters.pack.member_modules import ActiveMembers
    from lora_bench.adapters.pack.pack import Pack


MIN_LENGTH = 4
"""The fewest tokens of a row, padding included: some networks compute shorter rows in another way."""


class ScoringGraph(nn.Module):
    """The scores of a run, and the labels that they predict, as one module; it merges the pack's updates for good.

    Args:
        pack: in evaluation mode, in fp32, on the CPU.
        threshold: the score from which on label 1 of two classes is predicted; None with more classes, or for numbers.
        is_regression: the scores are numbers, so that there are no labels.
    """

    def __init__(self, pack: Pack, threshold: float | None, *, is_regression: bool) -> None:
        super().__init__()
        merge_updates(pack)
        self.pack = pack
        self.threshold = threshold
        self.is_regression = is_regression

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        reversed_input_ids: Tensor | None = None,
        reversed_attention_mask: Tensor | None = None,
        reversed_token_type_ids: Tensor | None = None,
        reversed_text_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `scores`, the mean over members and orders, and `labels`, (N,) class numbers, unless a regression.

        Scores are (N,) P(label 1) of two classes or the predicted number, or (N, C) the probability of each class.

        Args:
            input_ids: (N, T).
            attention_mask: (N, T), 1 for tokens and 0 for padding.
            token_type_ids: (N, T), if the tokenizer tells texts apart.
            text_ids: (N, T), 1 for tokens of the first text, 2 for those of the second and 0 for others, if the pair
                features need them.
            reversed_input_ids, reversed_attention_mask, reversed_token_type_ids, reversed_text_ids: (N, T), the same
                rows with their texts in reversed order, if the run scores both orders.
        """
        ids, mask = _stack(input_ids, reversed_input_ids), _stack(attention_mask, reversed_attention_mask)
        types = None if token_type_ids is None else _stack(token_type_ids, reversed_token_type_ids)
        texts = None if text_ids is None else _stack(text_ids, reversed_text_ids)
        logits = self.pack(Batch(ids, mask, types, None, full=False, text_ids=texts))  # (K, N or 2 N, C)
        scores = scores_of_logits(logits).mean(0)  # (N or 2 N,) or (N or 2 N, C)
        if reversed_input_ids is not None:
            scores = scores.view(2, input_ids.shape[0], *scores.shape[1:]).mean(0)  # (N,) or (N, C)
        if self.is_regression:
            return {"scores": scores}
        labels = scores.argmax(-1) if self.threshold is None else (scores >= self.threshold).long()  # (N,)
        return {"scores": scores, "labels": labels}


def _stack(first: Tensor, second: Tensor | None) -> Tensor:
    """Return the rows of the first order, (N, T), followed by those of the second, if there is one: (2 N, T)."""
    return first if second is None else torch.cat([first, second])


class MergedLinear(nn.Module):
    """The modules of each member in the place of an adapted linear, without updates.

    Args:
        modules: one per member; members that do not adapt the linear share the frozen one.
        active: the members that a forward pass computes, one at a time.
    """

    def __init__(self, modules: list[nn.Module], active: ActiveMembers) -> None:
        super().__init__()
        self.by_member = nn.ModuleList(modules)
        self.active = active

    @property
    def weight(self) -> Tensor:
        """The weight of the first member; T5's feed-forward layer reads its dtype."""
        return self.by_member[0].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        (member,) = self.active.members
        return self.by_member[member](x)  # type: ignore[no-any-return]


@torch.no_grad()
def merge_updates(pack: Pack) -> None:
    """Replace every adapted module of a pack by modules with merged weights, for good; quantised ones become plain.

    Where query or value of a fused linear is adapted, the whole linear is replaced.
    """
    merged = [pack.merged(k) for k in range(pack.size)]
    for name in sorted({key.rpartition(".")[0] for tensors in merged for key in tensors}):
        module: Any = pack.network.get_submodule(name)
        active = next(part.active for part in module.modules() if isinstance(part, AdaptedLinear))
        base = module.base if isinstance(module, AdaptedLinear) else module.linear[0]
        modules = [_with_tensors(base, tensors, name) for tensors in merged]
        parent, _, child = name.rpartition(".")
        plain = modules[0] if pack.size == 1 else MergedLinear(modules, active)
        setattr(pack.network.get_submodule(parent), child, plain)
    pack.group_size = 1  # merged modules compute one member at a time
    for updates in pack.updates:
        updates.clear()
    dequantize_network(pack.network)


def _with_tensors(base: nn.Module, tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """Return a frozen module with the merged weight and bias of this name; itself if there are none."""
    if f"{name}.weight" not in tensors:
        return base
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if isinstance(base, nn.Linear):
        module: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        module = copy.deepcopy(base)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return module.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def trace(graph: ScoringGraph, inputs: Mapping[str, Tensor], max_length: int) -> ExportedProgram:
    """Trace the graph for any number of rows, and of tokens from `MIN_LENGTH`.

    Args:
        graph: the module.
        inputs: its arguments by name, (N, T) each with N and T above 1, as an example.
        max_length: the largest T; at least one more than `MIN_LENGTH` counts.

    Raises:
        Exception: whatever torch raises for a module that it cannot trace.
    """
    shape = {0: Dim("batch"), 1: Dim("length", min=MIN_LENGTH, max=max(max_length, MIN_LENGTH + 1))}
    program = torch.export.export(graph, (), dict(inputs), dynamic_shapes=dict.fromkeys(inputs, shape))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names paths of this machine
    return program
