"""The words for the classes as a tree of tokens, so that a decoder scores all of them in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.backbones.quantized_modules import QuantizedTable


@dataclass(frozen=True)
class LabelWords:
    """The words for C classes: M inner nodes of their tree of tokens, of which node 0 is the decoder's start.

    A decoder reads the nodes as one sequence in which each attends to its ancestors only. Below each node, one of its
    children follows; the log-probabilities of the children on a word's path sum to log p(word), given that the answer
    is one of the words. If the first tokens differ, the tree has one node and the children are these tokens.
    """

    node_tokens: list[int]
    """(M,) token of each node; that of node 0 is not used."""
    parents: list[int]
    """(M,) parent of each node; -1 for node 0. Parents come before their children."""
    depths: list[int]
    """(M,) number of tokens before each node."""
    children: list[list[int]]
    """(M,) tokens that may follow each node."""
    paths: list[list[tuple[int, int]]]
    """(C,) of each word its steps: a node, and the index of the next token among the node's children."""

    @classmethod
    def read(cls, words: Sequence[str], sequences: list[list[int]], end: int, unknown: int | None) -> LabelWords:
        """Take one token of each word if the first tokens differ, else all of them and an end token.

        Args:
            words: of the classes.
            sequences: the tokens of each, without special ones.
            end: the token that ends a word.
            unknown: the token for unknown words, if there is one.

        Raises:
            UserError: a word has no token or an unknown one, or two words have the same tokens. It has no remedy.
        """
        for word, tokens in zip(words, sequences, strict=True):
            if not tokens:
                raise _refusal(words, f"the tokenizer has no token for {word!r}")
        if len({tokens[0] for tokens in sequences}) == len(words):
            sequences = [tokens[:1] for tokens in sequences]
        else:
            sequences = [[*tokens, end] for tokens in sequences]
        seen: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(words, sequences, strict=True):
            if unknown in tokens and unknown != end:
                raise _refusal(words, f"the tokenizer does not know a token of {word!r}")
            if tuple(tokens) in seen:
                reason = f"{seen[tuple(tokens)]!r} and {word!r} have the same tokens, so their scores are equal"
                raise _refusal(words, reason)
            seen[tuple(tokens)] = word
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for tokens in sequences:
            for i in range(1, len(tokens)):
                nodes.setdefault(tuple(tokens[:i]), len(nodes))
        children: list[list[int]] = [[] for _ in nodes]
        paths = []
        for tokens in sequences:
            path = []
            for i, token in enumerate(tokens):
                node = nodes[tuple(tokens[:i])]
                if token not in children[node]:
                    children[node].append(token)
                path.append((node, children[node].index(token)))
            paths.append(path)
        prefixes = list(nodes)
        return cls(
            [prefix[-1] if prefix else -1 for prefix in prefixes],
            [nodes[prefix[:-1]] if prefix else -1 for prefix in prefixes],
            [len(prefix) for prefix in prefixes],
            children,
            paths,
        )

    @property
    def is_single_step(self) -> bool:
        """True if the first tokens of the words differ, so that the decoder takes one step."""
        return len(self.parents) == 1

    def ancestors(self, device: torch.device) -> Tensor:
        """Return (M, M) True where the node of the column is the node of the row, or an ancestor of it."""
        mask = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask.to(device)

    @property
    def first_tokens(self) -> list[int]:
        """(C,) the first token of each word."""
        return [self.children[node][index] for ((node, index), *_) in self.paths]

    def logits(self, decoded: Tensor, embedding: Tensor | QuantizedTable) -> Tensor:
        """Return (N, C): the first tokens' scores if they differ, else log p(word) among the words.

        Args:
            decoded: (N, M, D) output of the decoder at each node.
            embedding: (V, D) rows of the language-model head.
        """
        if self.is_single_step:
            return decoded[:, 0] @ torch.stack([embedding[token] for token in self.first_tokens]).T  # (N, C)
        return self._word_logits(decoded.shape[0], lambda node, tokens: decoded[:, node] @ embedding[tokens].T)

    @property
    def branches(self) -> list[list[int]]:
        """The longest sequences of nodes from node 0 downwards; each node is in at least one."""
        inner = set(self.parents)
        branches = []
        for leaf in range(len(self.parents)):
            if leaf in inner:
                continue
            branch = [leaf]
            while self.parents[branch[0]] >= 0:
                branch.insert(0, self.parents[branch[0]])
            branches.append(branch)
        return branches

    def logits_of_scores(self, scores: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return log p(word) among the words, (N, C), for scores of the language-model head at each node.

        Args:
            scores: (N, M, L) of L tokens.
            tokens: (L,) these tokens, all children among them.
        """
        column = {token: i for i, token in enumerate(tokens)}
        return self._word_logits(scores.shape[0], lambda node, of: scores[:, node, [column[token] for token in of]])

    def _word_logits(self, rows: int, scores_of: Callable[[int, list[int]], Tensor]) -> Tensor:
        """Return log p(word) among the words, (N, C).

        Args:
            rows: N.
            scores_of: returns the scores (N, children) of a node's children.
        """
        logits: Any = None
        steps: dict[int, list[tuple[int, int]]] = {}
        for word, path in enumerate(self.paths):
            for node, index in path:
                steps.setdefault(node, []).append((word, index))
        for node, of_node in steps.items():
            tokens = self.children[node]
            if len(tokens) == 1:
                continue  # no choice: its log-probability is 0
            scores = scores_of(node, tokens)
            log_p = scores.float().log_softmax(-1)  # (N, children)
            words, indices = map(list, zip(*of_node, strict=True))
            if logits is None:
                logits = scores.new_zeros(rows, len(self.paths))
            logits = logits.index_add(1, torch.tensor(words, device=logits.device), log_p[:, indices].to(logits.dtype))
        return logits  # type: ignore[no-any-return]


def read_label_words(
    label_names: Sequence[Sequence[str] | None],
    given_words: Sequence[str] | None,
    tokens_of: Callable[[str], list[int]],
    tokenizer: Any,
    *,
    other_form: str,
) -> list[LabelWords]:
    """Return the words for the classes of each task: those that are given, else the names of the classes.

    Args:
        label_names: of each task; None for a number.
        given_words: `model.label_words`.
        tokens_of: returns the tokens of a word.
        tokenizer: its end token, or its padding token without one, ends a word.
        other_form: the `model.form` with a classification head, for remedies.

    Raises:
        UserError: a task predicts a number, has another number of classes than there are words, or its words cannot
            be told apart by their tokens.
    """
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    words_by_task = []
    for names in label_names:
        if names is None:
            raise UserError(
                "text_to_text answers with a word, and data.type=regression asks for a number",
                key="model.form",
                value="text_to_text",
                remedy=f"Set model.form={other_form}.",
                code=Code.CONFLICT,
            )
        words = given_words or names
        if len(words) != len(names):
            raise UserError(
                f"has {len(words)} words for {len(names)} classes",
                key="model.label_words",
                value=list(words),
                remedy="Give a word for each class, or leave it out: the names of the classes are the words.",
                code=Code.MISMATCH,
            )
        try:
            sequences = [tokens_of(word) for word in words]
            words_by_task.append(LabelWords.read(words, sequences, end, tokenizer.unk_token_id))
        except UserError as error:
            example = "for example 'model.label_words=[no,yes]'"
            error.remedy = f"Give words that differ, {example}, or set model.form={other_form}."
            raise
    return words_by_task


def _refusal(words: Sequence[str], reason: str) -> UserError:
    return UserError(reason, key="model.label_words", value=list(words)[:20], code=Code.INVALID_VALUE)
