"""Truncation of an example to a number of tokens. Exports for deployment contain this function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def kept_positions(text_ids: NDArray[np.int8], max_length: int, truncation: str) -> tuple[list[int], bool]:
    """Return the positions of the `max_length` tokens of an example that stay, in order.

    Tokens outside of the texts stay. With `middle`, a truncated text keeps its beginning and its end, otherwise its
    beginning.

    Args:
        text_ids: of an example with more tokens, (T,): 1 or 2 for a token of that text, 0 for one outside of them.
        max_length: more than the tokens outside of the texts.
        truncation: a value of `data.truncation`.

    Returns:
        the positions, and True if `truncation` names a text and the other one alone leaves no room for it.

    Raises:
        ValueError: the tokens outside of the texts leave no room for a text.
    """
    special, *texts = (np.flatnonzero(text_ids == text).tolist() for text in (0, 1, 2))
    room = max_length - len(special)
    if room < 1:
        raise ValueError(f"the template around the texts has {len(special)} tokens, which leaves none for the texts")
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
