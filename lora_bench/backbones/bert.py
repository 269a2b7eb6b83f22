"""BERT and RoBERTa (and MiniLM, a small BERT): first token, dense, tanh, linear.

Their heads have the same shape, only under other names: BERT's pretrained pooler and its new classifier, RoBERTa's new
classifier of two layers. Both are trained whole.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.attention import attend
from lora_bench.backbones.base import Backbone, additive_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lora_bench.backbones.activation_checkpointing import ActivationCheckpointing
    from lora_bench.data.batching import Batch


class Bert(Backbone):
    """Any encoder built as `BertForSequenceClassification` or `RobertaForSequenceClassification` is.

    Its head is the pooler, if the network has one, and the classifier.
    """

    query_value = r".*\.(query|value)"

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str]) -> None:
        self.name = str(network.base_model_prefix)  # bert, roberta
        self.layer_paths = [f"{self.name}.encoder.layer"]
        self.encoder: Any = network.get_submodule(self.name)
        pooled = getattr(self.encoder, "pooler", None) is not None
        self.head_modules = [f"{self.name}.pooler", "classifier"] if pooled else ["classifier"]
        super().__init__(network, tokenizer, new_parameters)
        self._run: Callable[..., Tensor] = _run

    @property
    def max_tokens(self) -> int:
        """The number of position embeddings, for RoBERTa without those up to its padding id."""
        positions = self.encoder.embeddings.position_embeddings
        offset = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa's begin behind its padding
        return int(positions.num_embeddings - offset)

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        """Return the output of the embeddings and the first `depth` layers: (N, T, D).

        Token types are used only if the network has more than one.
        """
        types = batch.token_type_ids if self.encoder.config.type_vocab_size > 1 else None
        hidden: Tensor = self.encoder.embeddings(input_ids=batch.input_ids, token_type_ids=types)
        mask = additive_mask(batch, hidden.dtype)
        for _, layer in self.layers[:depth]:
            hidden = _run(layer, hidden, hidden, mask)
        return hidden  # (N, T, D)

    def checkpoint_layers(self, checkpointing: ActivationCheckpointing | None) -> None:
        run = _run if checkpointing is None else checkpointing.wrap(_run)
        self._run = _call if self.is_sharded else run
        for _, layer in self.layers:
            vars(layer).pop("forward", None)
            if self.is_sharded:
                layer.forward = partial(run, layer)

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """Return the output (N, 1, D) of the layers from `depth` on for the first token, which alone the head reads.

        It is (N, T, D) with `all_positions`; and `hidden` itself if no layer is left.
        """
        mask = additive_mask(batch, hidden.dtype)
        for _, layer in self.layers[depth:-1]:
            hidden = self._run(layer, hidden, hidden, mask)
        if depth < len(self.layers):  # the head reads the first token only, so the last layer computes only that
            queries = hidden if self.all_positions else hidden[:, :1]
            hidden = self._run(self.layers[-1][1], queries, hidden, mask)
        return hidden  # (N, T, D) or (N, 1, D)

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Return the head's logits (N, 2) for the first position of `encoded` (N, T, D) or (N, 1, D)."""
        network: Any = self.network
        if len(self.head_modules) == 1:  # RoBERTa's classifier picks the first token itself
            return network.classifier(encoded)  # type: ignore[no-any-return]
        return network.classifier(network.dropout(self.encoder.pooler(encoded)))  # type: ignore[no-any-return]

    @property
    def separates_texts(self) -> bool:
        return self.tokenizer.sep_token_id is not None

    def text_masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the token masks (N, T) of the two texts, special tokens included.

        The first text reaches from the classification token to the first separator. Special tokens are included because
        sentence encoders (MiniLM) were trained with them in the average.
        """
        separators = (batch.input_ids == self.tokenizer.sep_token_id).long()  # (N, T)
        first = (batch.attention_mask == 1) & (separators.cumsum(1) - separators == 0)
        return first, (batch.attention_mask == 1) & ~first


def _call(layer: Any, *arguments: Any) -> Tensor:
    """Call a layer as a module, so that the hooks that gather its weights run."""
    return layer(*arguments)  # type: ignore[no-any-return]


def _run(layer: Any, queries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return a layer's output (N, S, D) for S positions `queries` that attend to all T positions (N, T, D)."""
    attention = layer.attention.self
    dropout = attention.dropout.p if attention.training else 0.0
    query, key, value = attention.query(queries), attention.key(hidden), attention.value(hidden)
    attended = attend(query, key, value, mask, attention.num_attention_heads, dropout)  # (N, S, D)
    attended = layer.attention.output(attended, queries)
    return layer.output(layer.intermediate(attended), attended)  # type: ignore[no-any-return]
