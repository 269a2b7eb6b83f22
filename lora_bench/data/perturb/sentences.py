"""Transforms of whole sentences: reversed order of the texts, a polite beginning, a paraphrase by template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_bench.config.schema import SYMMETRIC
from lora_bench.data.perturb.transform import Edit, Texts, Transform, apply_edits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

PREFIXES = ("I would like to know: ", "Can anyone tell me: ", "A quick question: ", "Please help me with this: ")
_QUESTION = re.compile(
    r"(?:what|how|why|which|who|whose|where|when|is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b"
    r"[^\n]*\?\s*$",
    re.IGNORECASE,
)

# The beginning of a question, or the whole of it, and other ways to put that; the first that fits counts.
TEMPLATES = tuple(
    (re.compile(pattern, re.IGNORECASE), ways)
    for pattern, ways in (
        (r"How (?:do|can|should|could) I (?=[a-z])", (r"What is the best way to ", r"What should I do to ")),
        (r"What(?: is|'s) the (?:best|easiest) way to ", (r"How can I best ", r"How do I best ")),
        (r"What are (?:the|some) (?:best|good) ways to ", (r"How can I best ",)),
        (r"What(?: is|'s) the difference between (.+?) and (.+?)\?$", (r"How do \1 and \2 differ?",)),
        (r"How do (.+?) and (.+?) differ\?$", (r"What is the difference between \1 and \2?",)),
        (r"What does (.+) mean\?$", (r"What is the meaning of \1?",)),
        (r"What(?: is|'s) the meaning of (.+)\?$", (r"What does \1 mean?",)),
        (r"How much does (.+) cost\?$", (r"What is the price of \1?",)),
        (r"What(?: is|'s) the price of (.+)\?$", (r"How much does \1 cost?",)),
        (r"How old is (.+)\?$", (r"What is the age of \1?",)),
        (r"Which is the best (?=[a-z])", (r"What is the best ",)),
        (r"What(?: is|'s) the best (?=[a-z])", (r"Which is the best ",)),
        (r"Why do people ", (r"What makes people ", r"For what reason do people ")),
        (r"Is it possible to ", (r"Is there a way to ",)),
        (r"Is there (?:a|any) way to ", (r"Is it possible to ",)),
        (r"Is it true that ", (r"Is it really the case that ",)),
        (r"Where can I (find|get|buy) ", (r"What is a good place to \1 ",)),
        (r"What are some of the ", (r"Can you name some of the ",)),
        (r"What are some (?=[a-z])", (r"Can you name some ", r"Do you know some ")),
        (r"How many ", (r"What number of ",)),
        (r"Should I ", (r"Would you advise me to ",)),
    )
)


def _order(texts: Texts, random: Random, intensity: float) -> Texts:
    """Return the texts in reversed order, whatever the intensity."""
    return texts[::-1]


def _polite(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit that puts a polite beginning before a question in English.

    There is none for other texts, or if the text begins so already.
    """
    if _QUESTION.match(text) and not text.startswith(PREFIXES):
        yield 0, 0, random.choice(PREFIXES)


def _paraphrase(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit that rewrites a question in English by the first of `TEMPLATES` that fits; none if none fits."""
    for pattern, ways in TEMPLATES:
        if match := pattern.match(text):
            yield match.start(), match.end(), match.expand(random.choice(ways))
            return


TRANSFORMS = (
    Transform(name="order", level="sentence", change=_order, texts=2, relations=SYMMETRIC, is_random=False),
    Transform(name="polite", level="sentence", change=apply_edits(_polite), is_idempotent=True),
    Transform(name="paraphrase", level="sentence", change=apply_edits(_paraphrase)),
)
