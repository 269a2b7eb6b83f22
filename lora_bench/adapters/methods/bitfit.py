"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): only biases are trained, those of linears and of LayerNorms.

    h = W x + (bias + shift)        a linear; likewise behind a LayerNorm's scaled output

What is trained is the shift away from the frozen bias, so that members of a pack share the frozen module. Of the
paper's biases one kind is left frozen: that of the LayerNorm behind the embeddings, which lie below the first layer
and are computed once for all members. A pooler is a part of the head, which is trained whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.targets import LinearAdapter, match_targets
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class BitFit(LinearAdapter):
    """Settings of BitFit. Both settings choose among linears and LayerNorms that have a bias."""

    def targets(self, backbone: Backbone) -> list[str]:
        """Return the names of the linears and LayerNorms of the layers that both settings choose and that have a bias.

        They are in the network's order.

        Raises:
            UserError: nothing in the layers has a bias, or the settings choose no module.
        """
        modules: dict[str, nn.Module] = {**backbone.linears(), **backbone.norms()}
        biased = {name for name, module in modules.items() if module.bias is not None}
        if not biased:
            raise UserError(
                "trains biases, and no linear or LayerNorm of this backbone has one",
                key="method",
                value=self.method,
                remedy="Take another adapter, or a model with biases: BERT and RoBERTa have them, T5 has not.",
                code=Code.UNSUPPORTED,
            )
        ordered = dict.fromkeys(name for name, _ in backbone.network.named_modules() if name in biased)
        return match_targets(backbone, self.target_modules, self.layers, ordered)

    def update(
        self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator
    ) -> BitFitUpdate:
        return BitFitUpdate(cast("Tensor", base.bias))


class BitFitUpdate(Update):
    """The trained shift of a frozen bias (out,): zeros at the start, in fp32 whatever the backbone's precision."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))  # (out,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        return weight, bias + self.shift
