"""Generated English question pairs: nothing to download, and a bag of words cannot predict their labels.

Each family below is given the label and writes a pair for it. Which words the questions hold, and how many they share,
says next to nothing about the label: what counts is who does what to whom, and which words mean the same. Two devices
see to it. *Flips* cancel: "Is Anna taller than Ben?" with the names swapped is another question, and with "shorter" for
"taller" too it is the same again. And of several *meanings* with several wordings each, the second question always
takes another wording, of the same meaning or of another one. Some non-duplicates, the easy ones, differ in one slot.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

Meanings = tuple[tuple[str, ...], ...]  # two or more, each with its wordings

POSITIVES = 0.4
SLOT_CHANGES = 0.25  # share of non-duplicates that differ in one name, city, topic or guest: the easiest ones
INVERTED = 0.1  # share of comparisons whose second question uses the inverse word: the hardest ones
VALIDATION_SHARE = 4  # one possible pair in so many is validation's; train never holds it

# The last quarter of these four never occurs in train.
PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Jack", "Karen", "Leo", "Maria", "Noah"),
    *("Olga", "Paul", "Rosa", "Simon", "Tina", "Victor", "Wendy", "Adam", "Bella", "Carl", "Ruth"),
)
CITIES = (
    *("Rome", "Oslo", "Paris", "Madrid", "Vienna", "Berlin", "Dublin", "Athens", "Prague", "Lisbon", "London"),
    *("Zurich", "Warsaw", "Milan", "Boston", "Chicago", "Cairo", "Tokyo", "Delhi", "Sydney"),
)
TOPICS = (
    *("chess", "Spanish", "the guitar", "yoga", "cooking", "the piano", "drawing", "French", "photography"),
    *("programming", "gardening", "Arabic", "the violin", "pottery", "singing", "sailing"),
)
GUESTS = (
    *("large dogs", "small children", "school groups", "street musicians", "noisy parties", "film crews"),
    *("big suitcases", "late visitors"),
)

COMPARISONS = (("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("stronger", "weaker"))
COMPARING = (
    "Do you know whether {a} is really {word} than {b}?",
    "Would you say that {a} is a little {word} than {b}?",
    "Is it true that {a} is much {word} than {b}?",
)
BONDS: tuple[Meanings, ...] = (
    (("married to", "the spouse of"), ("living next door to", "a neighbour of")),
    (("friends with", "on good terms with"), ("angry with", "having a quarrel with")),
    (("in the same class as", "a classmate of"), ("at the same company as", "a colleague of")),
)
BONDING = (
    "Do you know whether {a} is still {bond} {b}?",
    "Can you tell me if {a} is now {bond} {b}?",
    "Is it true that {a} is {bond} {b} at the moment?",
)
VEHICLES = ("train", "bus", "plane", "ferry")
TRAVELLING = (
    "What is the cheapest way to get from {a} by {vehicle} to {b}?",
    "If I leave {a} by {vehicle}, what does a ticket to {b} cost?",
    "How much is the {vehicle} from {a} all the way to {b}?",
)
PLACES = ("hotels", "restaurants", "museums", "parks", "cafés")
ASKING = (
    "Which {places} in {city} {rule} {guests} at the weekend?",
    "Can you name the {places} in {city} that {rule} {guests}?",
    "Where do I find out which {places} in {city} {rule} {guests}?",
)
INTENTS: Meanings = (
    ("How do I get started with {topic} here in {city}?", "How would a beginner first come to {topic} in {city}?"),
    ("Why do so many people in {city} take up {topic}?", "How did {topic} become such a popular hobby in {city}?"),
    ("What do I pay for {topic} lessons in {city}?", "How much does a course in {topic} cost in {city}?"),
    ("What is the name of a good {topic} teacher in {city}?", "Where in {city} can somebody teach me {topic}?"),
)


@dataclass(frozen=True)
class Draw:
    """Random words for one split."""

    random: Random
    unseen: bool  # whether the words that never occur in train may be drawn

    def flip(self) -> bool:
        """Return True or False, with equal probability."""
        return self.random.random() < 0.5

    def allowed(self, pool: tuple[str, ...]) -> tuple[str, ...]:
        """Return the words of the pool that may be drawn."""
        return pool if self.unseen else pool[: len(pool) * 3 // 4]

    def words(self, pool: tuple[str, ...], count: int) -> list[str]:
        """Return `count` different words that may be drawn from the pool."""
        return self.random.sample(self.allowed(pool), count)

    def word(self, pool: tuple[str, ...]) -> str:
        """Return a word of the pool."""
        return self.random.choice(self.allowed(pool))

    def two(self, wordings: tuple[str, ...]) -> tuple[str, str]:
        """Return two different wordings."""
        first, second = self.random.sample(wordings, 2)
        return first, second

    def wordings(self, meanings: Meanings, same: bool) -> tuple[str, str]:
        """Return two different wordings, of the same meaning or of two meanings."""
        one, other = self.random.sample(meanings, 2)
        return self.two(one) if same else (self.random.choice(one), self.random.choice(other))


def comparison(draw: Draw, same: bool) -> tuple[str, str]:
    """Return a pair about a comparison, a duplicate if `same`.

    Swapped names or the inverse word flip its meaning, both together keep it.
    """
    a, b = draw.words(PEOPLE, 2)
    word, inverse = draw.two(draw.random.choice(COMPARISONS))
    first, second = draw.two(COMPARING)
    inverted = draw.random.random() < INVERTED
    c, d = (b, a) if inverted == same else (a, b)
    return first.format(a=a, b=b, word=word), second.format(a=c, b=d, word=inverse if inverted else word)


def bond(draw: Draw, same: bool) -> tuple[str, str]:
    """Return a pair about a symmetric relation, a duplicate if `same`.

    Swapped names keep its meaning, another relation changes it.
    """
    a, b = draw.words(PEOPLE, 2)
    one, other = draw.wordings(draw.random.choice(BONDS), same)
    first, second = draw.two(BONDING)
    c, d = (b, a) if draw.flip() else (a, b)
    return first.format(a=a, b=b, bond=one), second.format(a=c, b=d, bond=other)


def route(draw: Draw, same: bool) -> tuple[str, str]:
    """Return a pair about a journey, a duplicate if `same`; swapped cities change its meaning."""
    a, b = draw.words(CITIES, 2)
    vehicle = draw.random.choice(VEHICLES)
    first, second = draw.two(TRAVELLING)
    c, d = (a, b) if same else (b, a)
    return first.format(a=a, b=b, vehicle=vehicle), second.format(a=c, b=d, vehicle=vehicle)


def permission(draw: Draw, same: bool) -> tuple[str, str]:
    """Return a pair about a rule, a duplicate if `same`.

    The opposite verb or a negation flips its meaning, both together keep it.
    """
    words = {"places": draw.random.choice(PLACES), "city": draw.word(CITIES), "guests": draw.word(GUESTS)}
    first, second = draw.two(ASKING)
    verb, opposite = draw.two(("allow", "forbid"))
    inverted, negated = draw.flip(), draw.flip()
    rule = f"do not {verb}" if negated else verb
    if inverted:
        verb = opposite
    if inverted == same:
        negated = not negated
    return first.format(rule=rule, **words), second.format(rule=f"do not {verb}" if negated else verb, **words)


def intent(draw: Draw, same: bool) -> tuple[str, str]:
    """Return a pair about a topic, a duplicate if `same`: how to begin, why, for how much, or with whom."""
    words = {"topic": draw.word(TOPICS), "city": draw.word(CITIES)}
    first, second = draw.wordings(INTENTS, same)
    return first.format(**words), second.format(**words)


def slot_change(draw: Draw, first: str, second: str) -> tuple[str, str]:
    """Return a duplicate with one word of the second question replaced by another of its pool: a non-duplicate.

    The new word, everywhere in place of the old one, is not in the second question yet. The first is unchanged.
    """
    slots = [(word, pool) for pool in (PEOPLE, CITIES, TOPICS, GUESTS) for word in pool if word in second]
    word, pool = draw.random.choice(slots)
    other = draw.random.choice([other for other in draw.allowed(pool) if other not in second])
    return first, second.replace(word, other)


FAMILIES: tuple[Callable[[Draw, bool], tuple[str, str]], ...] = (comparison, bond, route, permission, intent)


def generate(rows: int, seed: int, split: str) -> Examples:
    """Return `rows` generated question pairs, about 40 % of them duplicates; no pair comes twice, in either order.

    The same (rows, seed, split) gives the same pairs, and fewer rows a prefix of them. Whatever the seeds, no pair of
    `train` is in `validation`, a quarter of whose names, cities, topics and guests never occur in train. A split of any
    other name is made as train is.

    Raises:
        UserError: 100 draws per row do not give enough different pairs.
    """
    validation = split == "validation"
    draw = Draw(Random(f"{seed} {split}"), unseen=validation)
    pairs: dict[tuple[str, str], tuple[str, str, bool]] = {}
    for _ in range(100 * rows):
        if len(pairs) == rows:
            break
        same = draw.random.random() < POSITIVES
        write = draw.random.choice(FAMILIES)
        if not same and draw.random.random() < SLOT_CHANGES:
            first, second = slot_change(draw, *write(draw, True))
        else:
            first, second = write(draw, same)
        pair = min(first, second), max(first, second)
        if (zlib.crc32("\n".join(pair).encode()) % VALIDATION_SHARE == 0) == validation:
            pairs.setdefault(pair, (first, second, same))
    if len(pairs) < rows:
        raise UserError(
            f"is more than the {len(pairs)} pairs that were found",
            key=f"data.{split}_rows",
            value=rows,
            code=Code.INVALID_VALUE,
        )
    questions1, questions2, labels = zip(*pairs.values(), strict=True)
    return Examples(np.arange(rows), (list(questions1), list(questions2)), np.array(labels, dtype=np.int64))
