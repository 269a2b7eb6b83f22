"""BERT and RoBERTa, and smaller encoders built alike (MiniLM); the network is in `backbones/bert.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.family import Family

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class BertFamily(Family):
    """Encoders with a classification token."""

    model_types = ("bert", "roberta", "xlm-roberta", "camembert")

    def make_backbone(self, network: Any, tokenizer: Any, new_parameters: set[str], task: str) -> Backbone:
        from lora_bench.backbones.bert import Bert

        return Bert(network, tokenizer, new_parameters)
