"""Text-to-text decoder language models: the scores that the language-model head gives the words for the classes.

The network reads one text that ends in a cue, such as `answer:`. The scores of the first tokens of the words for the
classes, at the text's last token, are the logits. Where two words begin with the same token, whole words are scored:
all of them in one pass if the network takes a 4D attention mask, else one after another. There is no head.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.backbones.auto import PROBE_TOKENS, Auto
from lora_bench.backbones.label_words import LabelWords, read_label_words
from lora_bench.backbones.quantized_modules import head_rows
from lora_bench.data.batching import Batch
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.backbones.template import Template

TOLERANCE = 1e-4
"""Largest difference, relative to the largest score, that counts as rounding in fp32."""


class CausalTextToText(Auto):
    """`AutoModelForCausalLM` whose logits are the scores of the words for the classes.

    Args:
        network, tokenizer, new_parameters: as for `Backbone`.
        template: makes one text of the text columns.
        label_words: words for the classes; None: their names (`name_labels`).

    Raises:
        UserError: as `Auto`; or the network reads tokens that follow, or has no linear language-model head.
    """

    peft_task = "CAUSAL_LM"

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        new_parameters: set[str],
        template: Template,
        label_words: list[str] | None = None,
    ) -> None:
        super().__init__(network, tokenizer, new_parameters, template)
        self.head_modules = ()
        self.given_words = label_words
        self.reads_tree = False
        """True if the network computes all words in one pass; observed with words that begin alike."""
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._check_language_model()

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a text; the words that follow it need positions too."""
        limit = super().max_tokens
        return None if limit is None else limit - max((max(words.depths) for words in self.words), default=0)

    # -- words --

    def name_labels(self, label_names: Sequence[Sequence[str] | None]) -> None:
        """Score the words for these classes: `label_words` if they were given, else the names.

        Raises:
            UserError: as `read_label_words`.
        """
        self.words = read_label_words(
            label_names, self.given_words, self._tokens_of, self.tokenizer, other_form="classifier"
        )
        trees = [words for words in self.words if not words.is_single_step]
        self.reads_tree = all(self._computes_tree(words) for words in trees)
        if not self.reads_tree:
            passes = max(len(words.branches) for words in trees)
            name = type(self.network).__name__
            self.notes.append(f"{name} computes the label words one after another, in {passes} passes for each batch.")

    def _tokens_of(self, word: str) -> list[int]:
        """Return the tokens of a word as the tokenizer continues the template with it, after a space if it needs one.

        They are those of the word by itself if the tokenizer joins it with the end of the template.
        """
        if not word.strip():
            return []
        assert self.template is not None
        cue = "a" + self.template.parts[1]
        text = cue + ("" if cue[-1].isspace() else " ") + word
        before, whole, alone = self.tokenizer([cue, text, word], add_special_tokens=False)["input_ids"]
        return list(whole[len(before) :] if whole[: len(before)] == before else alone)

    # -- logits --

    def cut_depth(self, depth: int) -> int:
        """Return the depth of the cut; 0 where whole words are scored, as their tokens follow those of the texts."""
        return super().cut_depth(depth) if all(words.is_single_step for words in self.words) else 0

    def suffix_with_states(self, hidden: Tensor, batch: Batch, depth: int) -> tuple[Tensor, Tensor]:
        logits, states = super().suffix_with_states(hidden, batch, depth)
        return logits, states[:, : batch.input_ids.shape[1]]  # without the tokens of words

    def run_network(self, batch: Batch) -> Tensor:
        """Return the scores (N, C) of the words for the classes of the batch's task.

        The first tokens' scores if they differ, else log p(word) among the words.
        """
        words = self.words_of(batch)
        if words.is_single_step:
            with self._reading(_last_positions(batch)[:, None], words.first_tokens):
                return self._compute_logits(batch)[:, 0]  # (N, C) of (N, 1, C)
        tokens = sorted({token for children in words.children for token in children})  # (L,)
        read = self._read_tree if self.reads_tree and self._fits_window(batch, words) else self._read_branches
        return words.logits_of_scores(read(batch, words, tokens), tokens)

    @contextmanager
    def collecting_states(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the input of the language-model head: OPT computes no whole base model."""
        states: list[Tensor] = []
        head: Any = self.network.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
        try:
            yield states
        finally:
            hook.remove()

    def read_logits(self, output: Any, batch: Batch) -> Tensor:
        return output  # type: ignore[no-any-return]

    def probe_output(self, batch: Batch) -> Tensor:
        """Return the scores (tokens, V) of the whole vocabulary at every token: words are not known yet."""
        return self._compute_logits(batch)[batch.attention_mask.bool()]  # a cached prefix has zeros in place of padding

    def _read_tree(self, batch: Batch, words: LabelWords, tokens: list[int]) -> Tensor:
        """Return the scores (N, M, L) of tokens at the nodes of a tree of words.

        The nodes follow the padded text. Each attends to the text and to its ancestors, at the position that it has in
        its word.
        """
        device, (rows, length) = batch.input_ids.device, batch.input_ids.shape
        last, is_token = _last_positions(batch), batch.attention_mask.bool()  # (N,), (N, T)
        nodes, depths = torch.tensor([words.node_tokens, words.depths], device=device)[:, 1:]  # (M - 1,) each
        size = length + nodes.shape[0]
        allowed = torch.zeros(rows, size, size, dtype=torch.bool, device=device)
        ascending = torch.arange(size, device=device)
        allowed[:, :length, :length] = (ascending[:length, None] >= ascending[:length]) & is_token[:, None]
        allowed[:, length:, :length] = is_token[:, None]
        allowed[:, length:, length:] = words.ancestors(device)[1:, 1:]
        dtype = next(self.network.parameters()).dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
        in_text = ascending[:length].expand(rows, -1).minimum(last[:, None])
        positions = torch.cat([last[:, None], ascending[length:].expand(rows, -1)], 1)  # (N, M)
        with self._reading(positions, tokens):
            scores: Tensor = self.network(
                input_ids=torch.cat([batch.input_ids, nodes.expand(rows, -1)], 1),
                attention_mask=mask[:, None],
                position_ids=torch.cat([in_text, last[:, None] + depths], 1),
                use_cache=False,
            ).logits
        return scores

    def _read_branches(self, batch: Batch, words: LabelWords, tokens: list[int]) -> Tensor:
        """Return the result of `_read_tree`, computed with one pass for each branch of the tree."""
        device, rows = batch.input_ids.device, batch.input_ids.shape[0]
        last = _last_positions(batch)[:, None]  # (N, 1)
        scores: dict[int, Tensor] = {}
        for branch in words.branches:
            following = torch.tensor([words.node_tokens[node] for node in branch[1:]], device=device).expand(rows, -1)
            ids, mask = (F.pad(tensor, (0, following.shape[1])) for tensor in (batch.input_ids, batch.attention_mask))
            positions = last + torch.arange(len(branch), device=device)  # (N, nodes)
            ids = ids.scatter(1, positions[:, 1:], following)
            mask = mask.scatter(1, positions[:, 1:], torch.ones_like(following))
            with self._reading(positions, tokens):
                of_branch = self._compute_logits(Batch(ids, mask, None, None, full=False))  # (N, nodes, L)
            scores |= {node: of_branch[:, i] for i, node in enumerate(branch)}
        return torch.stack([scores[node] for node in range(len(words.parents))], 1)

    def _compute_logits(self, batch: Batch) -> Tensor:
        """Return the network's own logits: (N, T, V), or what `_reading` leaves of them."""
        return super().run_network(batch).logits  # type: ignore[no-any-return]

    @contextmanager
    def _reading(self, positions: Tensor, tokens: Sequence[int]) -> Iterator[None]:
        """Let the language-model head compute scores of some tokens at some positions only, within the context.

        The network itself calls the head and goes on with the scores, so what it does to them (Gemma 2's soft cap,
        Granite's scale) stays.

        Args:
            positions: (N, M) of each row.
            tokens: their ids.
        """
        head: Any = self.network.get_output_embeddings()  # type: ignore[operator]
        key = (tuple(tokens), positions.device)
        if key not in self._indices:  # a CUDA graph cannot record copies from the CPU
            self._indices[key] = torch.tensor(tokens, device=positions.device)
        chosen = self._indices[key]

        def read(hidden: Tensor) -> Tensor:
            picked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (N, M, D)
            return F.linear(picked, head_rows(head)[chosen], None if head.bias is None else head.bias[chosen])

        head.forward = read
        try:
            yield
        finally:
            del head.forward

    # -- checks --

    @torch.no_grad()
    def _check_language_model(self) -> None:
        """Refuse a network whose scores depend on the tokens that follow, or cannot be read by `_reading`."""
        head = self.network.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise self._refusal("has no linear language-model head")
        ids = self.probe_row(PROBE_TOKENS)[0].to(self.device).repeat(2, 1)
        ids[1, -1] = (ids[1, -1] + 1) % head.out_features
        mask = torch.ones_like(ids)
        whole = self._compute_logits(Batch(ids, mask, None, None, full=False))  # (2, T, V)
        if not _are_close(whole[0, :-1], whole[1, :-1]):
            raise self._refusal("reads the tokens that follow, so it continues no text")
        positions, tokens = torch.tensor([[PROBE_TOKENS - 1, 2], [1, 0]], device=self.device), [3, 0, 1]
        with self._reading(positions, tokens):
            read = self._compute_logits(Batch(ids, mask, None, None, full=False))
        expected = torch.stack([row[at][:, tokens] for row, at in zip(whole, positions, strict=True)])
        if read.shape != expected.shape or not _are_close(read, expected):
            raise self._refusal("computes its scores in an unknown way")

    @torch.no_grad()
    def _computes_tree(self, words: LabelWords) -> bool:
        """Return whether `_read_tree` gives the scores of `_read_branches` for two rows of unlike length."""
        ids = self.probe_row(PROBE_TOKENS)[0].to(self.device).repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, PROBE_TOKENS // 2 :] = 0
        batch = Batch(ids, mask, None, None, full=False)
        tokens = sorted({token for children in words.children for token in children})
        try:
            tree = self._read_tree(batch, words, tokens)
        except Exception:  # whatever a network raises that takes no such mask
            return False
        branches = self._read_branches(batch, words, tokens)
        return tree.shape == branches.shape and _are_close(tree, branches)

    def _fits_window(self, batch: Batch, words: LabelWords) -> bool:
        """Return whether text and words fit into a sliding window of attention, which a 4D mask would replace.

        `torch.export` decides it once for all lengths: it is false if the longest text of the graph does not fit.
        """
        window = getattr(self.network.config.get_text_config(), "sliding_window", None)  # type: ignore[union-attr, operator]
        if not window:
            return True
        fits: bool = batch.input_ids.shape[1] + max(words.depths) <= window
        if not torch.compiler.is_exporting():
            return fits
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # heavy

        return statically_known_true(fits)

    def _refusal(self, reason: str) -> UserError:
        reason = f"{type(self.network).__name__} {reason}"
        remedy = "Set model.form=classifier."
        return UserError(reason, key="model.form", value="text_to_text", remedy=remedy, code=Code.UNSUPPORTED)


def _last_positions(batch: Batch) -> Tensor:
    """Return the position of the last token of each row, (N,); batches are padded on the right."""
    return batch.attention_mask.sum(1) - 1


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Return whether scores are equal up to rounding."""
    return float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(other.abs().max()))
