"""T5 text to text, as in its pretraining on sentence-pair tasks, or as an encoder with a head.

Text to text (Raffel et al. 2020, appendix D): the encoder reads `qqp question1: … question2: …`, the decoder takes
one step from its start token, and the scores of the first tokens of the two label words are the logits. There is no
head. Layers count through the encoder, then the decoder.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.backbones.base import Backbone, additive_mask, run_layer
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.data.batching import Batch


class _T5(Backbone):
    """The template and the encoder, with its one relative position bias, of both forms."""

    query_value = r".*\.(q|v)"
    encoder: Any

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str], template: str, task: str) -> None:
        super().__init__(network, tokenizer, new_parameters)
        self.template = template
        self.task = task

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> tuple[list[str], None]:
        """Return the texts of the template with the fields of each row filled in, and no second texts."""
        named = zip(*[[f"{name}: {text}" for text in texts] for name, texts in columns], strict=True)
        before, after = self.template.replace("{task}", self.task).split("{fields}", 1)
        return [before + " ".join(fields) + after for fields in named], None

    def for_task(self, task: str) -> _T5:
        """Return a backbone with the same network and tokenizer whose template names this task."""
        backbone = copy.copy(self)
        backbone.task = task
        return backbone

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        hidden: Tensor = self.encoder.dropout(self.encoder.embed_tokens(batch.input_ids))
        return self._run_blocks(hidden, batch, 0, depth)  # (N, T, D)

    def _run_blocks(self, hidden: Tensor, batch: Batch, start: int, end: int) -> Tensor:
        """Return the output (N, T, D) of the encoder's blocks from `start` to `end` (exclusive).

        The final norm is left out. It is `hidden` itself if there are no such blocks.
        """
        blocks = self.layers[: len(self.encoder.block)][start:end]
        if blocks:
            # Only the first block owns the bias; with the mask added to it, every release of transformers agrees.
            attention = self.encoder.block[0].layer[0].SelfAttention
            length = batch.input_ids.shape[1]
            bias = attention.compute_bias(length, length, device=hidden.device)  # (1, heads, T, T)
            mask = additive_mask(batch, bias.dtype)
            bias = bias if mask is None else bias + mask  # (N, heads, T, T)
        for _, block in blocks:
            hidden = run_layer(block, hidden, None, bias)
        return hidden

    def _run_encoder(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """Return the output (N, T, D) of the encoder: its blocks from `depth` on, and the final norm."""
        hidden = self._run_blocks(hidden, batch, depth, len(self.encoder.block))
        return self.encoder.dropout(self.encoder.final_layer_norm(hidden))  # type: ignore[no-any-return]


class T5TextToText(_T5):
    """`T5ForConditionalGeneration` whose logits are the scores of two label words.

    Args:
        network, tokenizer, new_parameters: as for `Backbone`.
        template: the encoder's input, with `{task}` and `{fields}`.
        task: the task's short name.
        label_words: words for label 0 and 1; the first token of each is scored.

    Raises:
        UserError: the two label words begin with the same token.
    """

    head_modules = ()
    peft_task = "SEQ_2_SEQ_LM"
    layer_paths = ("encoder.block", "decoder.block")

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        new_parameters: set[str],
        template: str,
        task: str,
        label_words: list[str],
    ) -> None:
        super().__init__(network, tokenizer, new_parameters, template, task)
        self.encoder = network.encoder
        self.label_tokens = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in label_words]
        if self.label_tokens[0] == self.label_tokens[1]:
            raise UserError(
                "both words begin with the same token, so their scores are equal",
                key="model.label_words",
                value=label_words,
                remedy="Give two words that begin differently, for example 'model.label_words=[no,yes]'.",
                code=Code.INVALID_VALUE,
            )

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linears of encoder and decoder, without queries and keys of the decoder's self-attention."""
        # The decoder's one step attends to itself alone: its query and key change nothing and could learn nothing.
        idle = re.compile(r"decoder\..*\.SelfAttention\.[qk]")
        return {name: linear for name, linear in super().linears().items() if not idle.fullmatch(name)}

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        # `classify` runs the whole decoder: its one step costs little.
        return self._run_encoder(hidden, batch, min(depth, len(self.encoder.block)))  # (N, T, D)

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Return the scores (N, 2) of the first tokens of the two label words, after one step of the decoder."""
        network: Any = self.network
        start = torch.full((len(encoded), 1), network.config.decoder_start_token_id, device=encoded.device)
        decoded = network.decoder(
            input_ids=start,
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state[:, 0]  # (N, D)
        if network.config.scale_decoder_outputs:
            decoded = decoded * network.config.d_model**-0.5
        words = torch.stack([network.lm_head.weight[token] for token in self.label_tokens])  # (2, D)
        return decoded @ words.T  # type: ignore[no-any-return]  # (N, 2)


class T5Encoder(_T5):
    """`T5ForTokenClassification` whose token logits are averaged: a linear head on the mean-pooled encoder."""

    head_modules = ("classifier",)
    peft_task = "TOKEN_CLS"
    layer_paths = ("transformer.encoder.block",)

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str], template: str, task: str) -> None:
        super().__init__(network, tokenizer, new_parameters, template, task)
        self.encoder = network.transformer.encoder  # type: ignore[union-attr]

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        return self._run_encoder(hidden, batch, depth)  # (N, T, D)

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Return the head's logits (N, 2) for the mean of `encoded` (N, T, D) over the tokens, padding excluded."""
        kept = batch.attention_mask[:, :, None].to(encoded.dtype)  # (N, T, 1)
        pooled = (encoded * kept).sum(1) / kept.sum(1)  # (N, D); the head is linear, so this equals the mean of logits
        return self.network.classifier(pooled)  # type: ignore[no-any-return, operator]
