"""The words for the classes as a tree of tokens, so that a decoder scores all of them in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    def read(cls, words: Sequence[str], tokenizer: Any, end: int) -> LabelWords:
        """Tokenise the words: one token of each if the first tokens differ, else all of them and an end token.

        Args:
            words: of the classes.
            tokenizer: gives the tokens, without special ones.
            end: the token that ends a word.

        Raises:
            UserError: a word has no token, or two words have the same tokens.
        """
        sequences = [list(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
        for word, tokens in zip(words, sequences, strict=True):
            if not tokens:
                raise _refusal(words, f"the tokenizer has no token for {word!r}")
        if len({tokens[0] for tokens in sequences}) == len(words):
            sequences = [tokens[:1] for tokens in sequences]
        else:
            sequences = [[*tokens, end] for tokens in sequences]
        seen: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(words, sequences, strict=True):
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

    def logits(self, decoded: Tensor, embedding: Tensor) -> Tensor:
        """Return (N, C): the first tokens' scores if they differ, else log p(word) among the words.

        Args:
            decoded: (N, M, D) output of the decoder at each node.
            embedding: (V, D) rows of the language-model head.
        """
        if self.is_single_step:
            order = [self.children[0][index] for ((_, index),) in self.paths]
            return decoded[:, 0] @ torch.stack([embedding[token] for token in order]).T  # (N, C)
        logits = decoded.new_zeros(decoded.shape[0], len(self.paths))
        steps: dict[int, list[tuple[int, int]]] = {}
        for word, path in enumerate(self.paths):
            for node, index in path:
                steps.setdefault(node, []).append((word, index))
        for node, of_node in steps.items():
            tokens = self.children[node]
            if len(tokens) == 1:
                continue  # no choice: its log-probability is 0
            log_p = (decoded[:, node] @ embedding[tokens].T).float().log_softmax(-1)  # (N, children)
            words, indices = map(list, zip(*of_node, strict=True))
            logits = logits.index_add(1, torch.tensor(words, device=logits.device), log_p[:, indices].to(logits.dtype))
        return logits


def _refusal(words: Sequence[str], reason: str) -> UserError:
    return UserError(
        reason,
        key="model.label_words",
        value=list(words)[:20],
        remedy="Give words that differ, for example 'model.label_words=[no,yes]', or set model.form=encoder.",
        code=Code.INVALID_VALUE,
    )
