"""Any sequence classifier of transformers; the network is in `backbones/auto.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.family import Family

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class AutoFamily(Family):
    """Every model type that transformers has a sequence classifier for."""

    def make_backbone(self, network: Any, tokenizer: Any, new_parameters: set[str], task: str) -> Backbone:
        from lora_bench.backbones.auto import Auto

        return Auto(network, tokenizer, new_parameters)
