"""The linears of GPT-2 and its kind, which transformers calls `Conv1D`, as the `nn.Linear` that adapters change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_bench.backbones.sharding import is_sharded

if TYPE_CHECKING:
    from torch.nn import Parameter


class Conv1DLinear(nn.Linear):
    """A linear that shares the parameters of a `Conv1D`, whose weight is stored as (in, out).

    State dict, gradients and hash are those of the `Conv1D`: only the attribute `weight` is transposed.

    Args:
        conv: the module whose place it takes.
    """

    def __init__(self, conv: Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = conv.weight.shape
        self._parameters: dict[str, Parameter | None] = {"weight": conv.weight, "bias": conv.bias}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), a view of the parameter: what is written to it reaches the parameter.

        While it is sharded it is the parameter itself: nothing computes with it, and `fully_shard` reads it here.
        """
        stored: Any = self._parameters["weight"]
        return stored if is_sharded(stored) else stored.T  # type: ignore[no-any-return]


def replace_conv1d(network: nn.Module) -> None:
    """Replace every `Conv1D` of a network by a linear with the same parameters."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Conv1DLinear(module))
