"""T5 text to text, as in its pretraining on sentence-pair tasks, or as an encoder with a head.

Text to text (Raffel et al. 2020, appendix D): the encoder reads `qqp question1: … question2: …`, the decoder takes
one step from its start token, and the scores of the first tokens of the words for the classes are the logits. Where two
words begin with the same token, the decoder reads all of their tokens, and whole words are scored. There is no head.
Layers count through the encoder, then the decoder.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.backbones.base import Backbone, additive_mask, run_layer
from lora_bench.backbones.label_words import LabelWords, read_label_words
from lora_bench.backbones.quantized_modules import head_rows
from lora_bench.backbones.template import Template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.data.batching import Batch


class _T5(Backbone):
    """The template and the encoder, with its one relative position bias, of both forms."""

    query_value = r".*\.(q|v)"
    needs_text_ids = True
    encoder: Any

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str], template: str, task: str) -> None:
        super().__init__(network, tokenizer, new_parameters)
        self.template = Template(template, task, separator=" ")

    def shared_modules(self) -> list[nn.Module]:
        """Return the tables of relative positions: each is in the first block of a stack, and read for all of them."""
        return [module for name, module in self.network.named_modules() if name.endswith("relative_attention_bias")]

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
    """`T5ForConditionalGeneration` (or mT5's) whose logits are the scores of the words for the classes.

    Args:
        network, tokenizer, new_parameters: as for `Backbone`.
        template: the encoder's input, with `{task}` and `{fields}`.
        task: the task's short name.
        label_words: words for the classes; None: their names (`name_labels`).

    Raises:
        UserError: two words have the same tokens, or one has none.
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
        label_words: list[str] | None = None,
    ) -> None:
        super().__init__(network, tokenizer, new_parameters, template, task)
        self.encoder = network.encoder
        self.given_words = label_words
        if label_words is not None:
            self.name_labels([label_words])

    def name_labels(self, label_names: Sequence[Sequence[str] | None]) -> None:
        """Score the words for these classes: `label_words` if they were given, else the names; raises like
        `read_label_words`."""
        self.words = read_label_words(
            label_names, self.given_words, self._tokens_of, self.tokenizer, other_form="encoder"
        )

    def _tokens_of(self, word: str) -> list[int]:
        return list(self.tokenizer(word, add_special_tokens=False)["input_ids"])

    @property
    def label_tokens(self) -> list[int]:
        """The first tokens of the words for the classes of the first task."""
        return self.words[0].first_tokens

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linears of encoder and decoder.

        Without queries and keys of the decoder's self-attention if it takes one step, which attends to itself alone:
        they change nothing and could learn nothing.
        """
        single_step = all(words.is_single_step for words in self.words)
        idle = re.compile(r"decoder\..*\.SelfAttention\.[qk]")
        return {
            name: linear for name, linear in super().linears().items() if not (single_step and idle.fullmatch(name))
        }

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        # `classify` runs the whole decoder: its few steps cost little.
        return self._run_encoder(hidden, batch, min(depth, len(self.encoder.block)))  # (N, T, D)

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Return the scores (N, C) of the words for the classes of the batch's task (`LabelWords.logits`)."""
        network: Any = self.network
        words = self.words_of(batch)
        decode = self._decode_start if words.is_single_step else self._decode_tree
        decoded = decode(encoded, batch, words)  # (N, M, D)
        if getattr(
            network.config, "scale_decoder_outputs", False
        ):  # not v1.1 and mT5, whose output embedding is untied
            decoded = decoded * network.config.d_model**-0.5
        return words.logits(decoded, head_rows(network.lm_head))  # (N, C)

    def _decode_start(self, encoded: Tensor, batch: Batch, words: LabelWords) -> Tensor:
        """Return the decoder's output (N, 1, D) for its start token."""
        network: Any = self.network
        start = torch.full((encoded.shape[0], 1), network.config.decoder_start_token_id, device=encoded.device)
        decoded: Tensor = network.decoder(
            input_ids=start,
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state
        return decoded

    def _decode_tree(self, encoded: Tensor, batch: Batch, words: LabelWords) -> Tensor:
        """Return the decoder's output (N, M, D) for the nodes of a tree of words, each attending to its ancestors."""
        network: Any = self.network
        decoder, device = network.decoder, encoded.device
        tokens = torch.tensor([network.config.decoder_start_token_id, *words.node_tokens[1:]], device=device)  # (M,)
        hidden = decoder.dropout(decoder.embed_tokens(tokens)).expand(encoded.shape[0], -1, -1)  # (N, M, D)
        depths = torch.tensor(words.depths, device=device)
        longest = max(words.depths) + 1
        by_depth = decoder.block[0].layer[0].SelfAttention.compute_bias(longest, longest, device=device)
        bias = by_depth[:, :, depths][:, :, :, depths]  # (1, heads, M, M)
        bias = bias.masked_fill(~words.ancestors(device), torch.finfo(bias.dtype).min)
        mask = additive_mask(batch, bias.dtype)  # (N, 1, 1, T)
        if mask is None:
            mask = bias.new_zeros(1, 1, 1, encoded.shape[1])
        for block in decoder.block:
            hidden = run_layer(block, hidden, None, bias, encoded, None, mask)
        return decoder.dropout(decoder.final_layer_norm(hidden))  # type: ignore[no-any-return]


class T5Encoder(_T5):
    """T5 (or mT5) for token classification, the token logits averaged: a linear head on the mean-pooled encoder."""

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
