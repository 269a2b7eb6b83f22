"""Truncation of an example to a number of tokens. Exports for deployment contain this function."""

from __future__ import annotations

from typing import Any


def kept_positions(encoding: Any, max_length: int, truncation: str) -> tuple[list[int], bool]:
    """Return the positions of the `max_length` tokens of an example that stay, in order.

    Special tokens stay. With `middle`, a truncated text keeps its beginning and its end, otherwise its beginning.

    Args:
        encoding: of an example with more tokens.
        max_length: at least the number of special tokens.
        truncation: a value of `data.truncation`.

    Returns:
        the positions, and True if `truncation` names a text and the other one alone leaves no room for it.
    """
    texts: tuple[list[int], list[int]] = [], []
    special: list[int] = []
    for position, text in enumerate(encoding.sequence_ids):
        (special if text is None else texts[text]).append(position)
    room = max_length - len(special)
    sizes = len(texts[0]), len(texts[1])
    named = {"first": 0, "second": 1}.get(truncation)
    is_fallback = named is not None and sizes[1 - named] >= room
    if named is None or is_fallback:  # equal to the tokenizers' own truncation with the strategy `longest_first`
        shorter = min(*sizes, room // 2)
        first = shorter if sizes[0] <= sizes[1] else room - shorter
    else:
        first = sizes[0] if named == 1 else room - sizes[1]
    kept = special
    for positions, size in zip(texts, (first, room - first), strict=True):
        tail = size // 2 if truncation == "middle" and size < len(positions) else 0
        kept = kept + positions[: size - tail] + positions[len(positions) - tail :]
    return sorted(kept), is_fallback
