"""BERT and RoBERTa (and MiniLM, a small BERT): first token, dense, tanh, linear.

Their heads have the same shape, only under other names: BERT's pretrained pooler and its new classifier, RoBERTa's new
classifier of two layers. Both are trained whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.backbones.base import Backbone, additive_mask, run_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_bench.data.batching import Batch

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")


class Bert(Backbone):
    """Any encoder built as `BertForSequenceClassification` or `RobertaForSequenceClassification` is."""

    query_value = r".*\.(query|value)"

    def __init__(self, network: nn.Module, tokenizer: Any, fresh: set[str]) -> None:
        self.name = str(network.base_model_prefix)  # bert, roberta
        self.layer_paths = [f"{self.name}.encoder.layer"]
        self.encoder: Any = network.get_submodule(self.name)
        pooled = getattr(self.encoder, "pooler", None) is not None
        self.head_modules = [f"{self.name}.pooler", "classifier"] if pooled else ["classifier"]
        super().__init__(network, tokenizer, fresh)

    @property
    def max_tokens(self) -> int:
        positions = self.encoder.embeddings.position_embeddings
        offset = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa's begin behind its padding
        return int(positions.num_embeddings - offset)

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        hidden: Tensor = self.encoder.embeddings(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids)
        return self._run(hidden, batch, 0, depth)  # (N, T, D)

    def suffix(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        hidden = self._run(hidden, batch, depth, len(self.layers))  # (N, T, D)
        network: Any = self.network
        if len(self.head_modules) == 1:  # RoBERTa's classifier picks the first token itself
            return network.classifier(hidden)  # type: ignore[no-any-return]
        return network.classifier(network.dropout(self.encoder.pooler(hidden)))  # type: ignore[no-any-return]

    def _run(self, hidden: Tensor, batch: Batch, start: int, end: int) -> Tensor:
        mask = additive_mask(batch, hidden.dtype)
        for _, layer in self.layers[start:end]:
            hidden = run_layer(layer, hidden, mask)
        return hidden
