"""Hard negatives: a text beside itself with two of its names, numbers or arguments exchanged.

Both texts have the same words, as the pairs of PAWS (Zhang et al. 2019, arXiv 1904.01130, section 3.1), whose swaps a
language model chose. Here they are two numbers, two names, or the words on both sides of a preposition ("from dollars
to rupees"). Nothing is exchanged across "and", "or", "between", punctuation and the like: "A or B" means "B or A".
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_bench.data.perturb.transform import Texts, Transform
from lora_bench.data.perturb.words import NUMBER

if TYPE_CHECKING:
    from random import Random

Swap = tuple[int, int, int, int]
"""Start and end (exclusive) of a span, and of a later one."""

# Not at the beginning of a sentence, where every word has a capital letter; and not the pronoun.
_NAME = re.compile(r"(?<=[\w,] )(?!I\b)[A-Z][\w+#]*(?: [A-Z][\w+#]*)*(?![\w'’-])")
_DETERMINER = r"(?:(?:the|an?|my|your|his|her|its|our|their|some|any) )?"
_ARGUMENTS = re.compile(
    r"(?<![\w'’-])([a-z]{3,}) (?:to|from|into|than|before|after|over|by|without|on|in|under|against|for|as) "
    rf"{_DETERMINER}([a-z]{{3,}})(?![\w'’-])"
)
_NO_ARGUMENT = re.compile(
    r"the|this|that|these|those|your|his|her|its|our|their|some|any|other|which|what|who|"
    r"you|they|them|him|how|why|when|where|are|was|were|been|being|did|does|has|have|had|"
    r"can|could|will|would|should|and|but|not|get|good|best|more|most|much|many|way|used|"
    r"going|able|like|want|need|know|here|there|then|same|such|very|just|only|also|make|"
    r"take|use|done|each|every|one|two|ever|too|well|even|look|looking|come|came|about|"
    r"with"
)
_INTERCHANGEABLE = re.compile(r"\b(?:and|or|nor|vs|versus|between)\b|[,;:/&.?!]")


def _swaps(text: str) -> list[Swap]:
    """Return the pairs of spans that may be exchanged: numbers and names; only without any, arguments."""
    swaps = []
    for pattern in (NUMBER, _NAME):
        matches = list(pattern.finditer(text))
        for first, second in pairwise(matches):
            between = text[first.end() : second.start()]
            if first.group() != second.group() and not _INTERCHANGEABLE.search(between):
                swaps.append((*first.span(), *second.span()))
    return swaps or [
        (*match.span(1), *match.span(2))
        for match in _ARGUMENTS.finditer(text)
        if match[1] != match[2] and not any(map(_NO_ARGUMENT.fullmatch, match.groups()))
    ]


def _exchange(texts: Texts, random: Random, intensity: float) -> Texts:
    """Return a random one of the texts beside itself with one swap, in random order.

    The texts are unchanged if no swap is possible, or if one of them is blank.
    """
    candidates = [(text, swap) for text in texts for swap in _swaps(text)]
    if not candidates or not all(text.strip() for text in texts):
        return texts
    text, (start, end, later_start, later_end) = random.choice(candidates)
    first, second = text[start:end], text[later_start:later_end]
    exchanged = text[:start] + second + text[end:later_start] + first + text[later_end:]
    return (text, exchanged) if random.random() < 0.5 else (exchanged, text)


TRANSFORMS = (
    Transform(name="exchange", level="word", change=_exchange, labels={0: 0, 1: 0}, texts=2, relations=("paraphrase",)),
)
