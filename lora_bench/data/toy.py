"""English question pairs with structure, made by rule: nothing to download, and no bag of words can tell their labels.

Each family below draws the label first and then writes a pair for it, so that neither a word nor the number of shared
words gives the label away: what counts is who does what to whom, in which order, and which words mean the same. Two
devices do it. A *flip* changes the meaning, and two flips cancel: swap the names of "Is Anna taller than Ben?" and
nothing is left of the question; put "shorter" for "taller" too, and it is back. A *square* is two meanings with two
wordings each; the second question always takes another wording, of the same meaning or of the other one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.sources import Examples
from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

Square = tuple[tuple[str, str], tuple[str, str]]

POSITIVES = 0.4
VALIDATION_SHARE = 4  # one possible pair in so many belongs to validation; train never sees it

# The last quarter of each of these is never seen in train.
PEOPLE = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ivy",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tina",
    "Victor",
    "Wendy",
    "Adam",
    "Bella",
    "Carl",
)
CITIES = (
    "Rome",
    "Oslo",
    "Paris",
    "Madrid",
    "Vienna",
    "Berlin",
    "Dublin",
    "Athens",
    "Prague",
    "Lisbon",
    "London",
    "Zurich",
    "Warsaw",
    "Milan",
    "Boston",
    "Chicago",
    "Cairo",
    "Tokyo",
    "Delhi",
    "Sydney",
)
TOPICS = (
    "chess", "Spanish", "the guitar", "yoga", "cooking", "the piano", "drawing", "French", "photography",
    "programming", "gardening", "Arabic", "the violin", "pottery", "singing", "sailing",
)  # fmt: skip
THINGS = (
    "old car", "red bicycle", "small boat", "camera", "silver watch", "big tent", "guitar", "blue kayak",
    "laptop", "winter coat", "telescope", "sewing machine",
)  # fmt: skip

COMPARISONS = (
    ("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("richer", "poorer"), ("stronger", "weaker"),
)  # fmt: skip
COMPARING = (
    "Do you know whether {a} is really {word} than {b}?",
    "Would you say that {a} is a little {word} than {b}?",
    "Is it true that {a} is much {word} than {b}?",
)
TRANSFERS = ((("lend", "to"), ("borrow", "from")), (("sell", "to"), ("buy", "from")), (("give", "to"), ("get", "from")))
TRANSFERRING = (
    "Do you think that {a} will {verb} the {thing} {way} {b}?",
    "Is it likely that {a} will {verb} the {thing} {way} {b}?",
    "Will {a} really {verb} the {thing} {way} {b} this summer?",
)
BONDS: tuple[Square, ...] = (
    (("married to", "the spouse of"), ("living next door to", "a neighbour of")),
    (("friends with", "on good terms with"), ("angry with", "having a quarrel with")),
    (("in the same class as", "a classmate of"), ("at the same company as", "a colleague of")),
)
BONDING = (
    "Do you know whether {a} is still {bond} {b}?",
    "Can you tell me if {a} is now {bond} {b}?",
    "Is it true that {a} is {bond} {b} at the moment?",
)
TRAVELLING = (
    "What is the cheapest way to travel {route} by {vehicle}?",
    "How do I get {route} by {vehicle} for the least money?",
    "How much is the cheapest {vehicle} ticket to go {route}?",
)
VEHICLES = ("train", "bus", "plane", "ferry")
PLACES = ("hotels", "restaurants", "museums", "parks", "cafés")
PERMISSIONS = (("allow", "forbid"), ("permit", "prohibit"), ("welcome", "turn away"))
GUESTS = ("large dogs", "small children", "school groups", "street musicians", "noisy parties")
ASKING = (
    "Which {places} in {city} {rule} {guests} at the weekend?",
    "Can you name the {places} in {city} that {rule} {guests}?",
    "I want to know which {places} in {city} {rule} {guests}.",
)
SIZES = (("small", "large"), ("old", "new"), ("light", "heavy"), ("short", "long"))
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
GOODS = ("bag", "coat", "table", "lamp", "carpet", "scarf")
CHOOSING = (
    "Should I buy the {one} {noun} or the {other} {noun}?",
    "Which one is nicer, the {one} {noun} or the {other} {noun}?",
    "Would you rather have the {one} {noun} or the {other} {noun}?",
)
INTENTS = (
    ("How do I get started with {topic} here in {city}?", "What would be a first step into {topic} in {city}?"),
    ("Why do so many people in {city} take up {topic}?", "What makes {topic} such a popular hobby in {city}?"),
    ("How much do I pay for {topic} lessons in {city}?", "What does a course in {topic} cost in {city}?"),
    ("Who is a good teacher of {topic} in {city}?", "Where in {city} do I find somebody to teach me {topic}?"),
)
SQUARES: tuple[Square, ...] = (
    (("cheap", "inexpensive"), ("expensive", "costly")),
    (("quiet", "peaceful"), ("loud", "noisy")),
    (("tiny", "very small"), ("huge", "very big")),
    (("famous", "well-known"), ("unknown", "obscure")),
)
SEEKING = (
    "Where in {city} can I find {kind} {places} for a party?",
    "What are some {kind} {places} in {city} for a party?",
    "Could you recommend a few {kind} {places} in {city}?",
)


@dataclass(frozen=True)
class Draw:
    """Random words for one split."""

    random: Random
    unseen: bool  # whether words that train never sees may come up

    def words(self, pool: tuple[str, ...], count: int) -> list[str]:
        return self.random.sample(pool if self.unseen else pool[: len(pool) * 3 // 4], count)

    def word(self, pool: tuple[str, ...]) -> str:
        return self.words(pool, 1)[0]

    def frames(self, frames: tuple[str, ...]) -> tuple[str, str]:
        """Two different wordings of one request."""
        first, second = self.random.sample(frames, 2)
        return first, second

    def flip(self) -> bool:
        return self.random.random() < 0.5

    def wordings(self, square: Square, same: bool) -> tuple[str, str]:
        """Two different wordings: of one meaning of the square, or of both."""
        one, other = self.random.sample(square, 2)
        if same:
            first, second = self.random.sample(one, 2)
            return first, second
        return self.random.choice(one), self.random.choice(other)


def comparison(draw: Draw, same: bool) -> tuple[str, str]:
    """Taller or shorter, Anna than Ben or Ben than Anna."""
    a, b = draw.words(PEOPLE, 2)
    word, inverse = draw.random.sample(draw.random.choice(COMPARISONS), 2)
    first, second = draw.frames(COMPARING)
    swap = draw.flip()
    c, d = (b, a) if swap else (a, b)
    return first.format(a=a, b=b, word=word), second.format(a=c, b=d, word=inverse if swap == same else word)


def transfer(draw: Draw, same: bool) -> tuple[str, str]:
    """Lend to or borrow from, Anna or Ben."""
    a, b = draw.words(PEOPLE, 2)
    thing = draw.word(THINGS)
    (verb, way), inverse = draw.random.sample(draw.random.choice(TRANSFERS), 2)
    first, second = draw.frames(TRANSFERRING)
    swap = draw.flip()
    c, d = (b, a) if swap else (a, b)
    other, back = inverse if swap == same else (verb, way)
    return (
        first.format(a=a, b=b, verb=verb, way=way, thing=thing),
        second.format(a=c, b=d, verb=other, way=back, thing=thing),
    )


def bond(draw: Draw, same: bool) -> tuple[str, str]:
    """A relation that holds both ways, so that swapping the names changes nothing; its wording may."""
    a, b = draw.words(PEOPLE, 2)
    one, other = draw.wordings(draw.random.choice(BONDS), same)
    first, second = draw.frames(BONDING)
    c, d = (b, a) if draw.flip() else (a, b)
    return first.format(a=a, b=b, bond=one), second.format(a=c, b=d, bond=other)


def route(draw: Draw, same: bool) -> tuple[str, str]:
    """From Rome to Oslo, or to Rome from Oslo."""
    a, b = draw.words(CITIES, 2)
    vehicle = draw.random.choice(VEHICLES)
    first, second = draw.frames(TRAVELLING)
    c, d = (a, b) if same else (b, a)
    ways = [f"from {x} to {y}" if draw.flip() else f"to {y} from {x}" for x, y in ((a, b), (c, d))]
    return first.format(route=ways[0], vehicle=vehicle), second.format(route=ways[1], vehicle=vehicle)


def permission(draw: Draw, same: bool) -> tuple[str, str]:
    """Allow or forbid, with or without a "not"."""
    words = {"places": draw.random.choice(PLACES), "city": draw.word(CITIES), "guests": draw.random.choice(GUESTS)}
    verb, opposite = draw.random.sample(draw.random.choice(PERMISSIONS), 2)
    first, second = draw.frames(ASKING)
    denied, negate = draw.flip(), draw.flip()
    other = opposite if negate == same else verb
    return (
        first.format(rule=f"do not {verb}" if denied else verb, **words),
        second.format(rule=f"do not {other}" if denied != negate else other, **words),
    )


def choice(draw: Draw, same: bool) -> tuple[str, str]:
    """The small red bag or the large blue one: the order does not matter, what goes with what does."""
    sizes = draw.random.sample(draw.random.choice(SIZES), 2)
    colours = draw.random.sample(COLOURS, 2)
    noun = draw.random.choice(GOODS)
    first, second = draw.frames(CHOOSING)
    bags = [f"{size} {colour}" for size, colour in zip(sizes, colours, strict=True)]
    again = bags if same else [f"{size} {colour}" for size, colour in zip(sizes, colours[::-1], strict=True)]
    again = again[::-1] if draw.flip() else again
    return first.format(one=bags[0], other=bags[1], noun=noun), second.format(one=again[0], other=again[1], noun=noun)


def intent(draw: Draw, same: bool) -> tuple[str, str]:
    """How, why, what it costs, who teaches: the same topic in other words, or another question about it."""
    words = {"topic": draw.word(TOPICS), "city": draw.word(CITIES)}
    one, other = draw.random.sample(INTENTS, 2)
    first, second = draw.wordings((one, other), same)
    return first.format(**words), second.format(**words)


def description(draw: Draw, same: bool) -> tuple[str, str]:
    """Cheap or inexpensive, expensive or costly."""
    words = {"places": draw.random.choice(PLACES), "city": draw.word(CITIES)}
    one, other = draw.wordings(draw.random.choice(SQUARES), same)
    first, second = draw.frames(SEEKING)
    return first.format(kind=one, **words), second.format(kind=other, **words)


FAMILIES: tuple[Callable[[Draw, bool], tuple[str, str]], ...] = (
    comparison, transfer, bond, route, permission, choice, intent, description,
)  # fmt: skip


def generate(rows: int, seed: int, split: str) -> Examples:
    """`rows` question pairs, the same for the same (rows, seed, split): about 40 % duplicates, no pair twice.

    No pair of `train` is in `validation`, whatever the seeds; a quarter of the names, cities, things and topics of
    `validation` is never in `train`.

    Raises:
        UserError: there are fewer different pairs than rows.
    """
    validation = split == "validation"
    random = Random(f"{seed} {split}")
    draw = Draw(random, unseen=validation)
    pairs: dict[tuple[str, str], int] = {}
    for _ in range(100 * rows):
        if len(pairs) == rows:
            break
        same = random.random() < POSITIVES
        one, other = random.choice(FAMILIES)(draw, same)
        pair = min(one, other), max(one, other)
        ours = (zlib.crc32("\n".join(pair).encode()) % VALIDATION_SHARE == 0) is validation
        if ours and one != other and (other, one) not in pairs:
            pairs.setdefault((one, other), int(same))
    else:
        raise UserError("is more than there are pairs to draw", key=f"data.{split}_rows", value=rows)
    questions = tuple(map(list, zip(*pairs, strict=True)))
    return Examples(np.arange(rows, dtype=np.int64), questions, np.array(list(pairs.values()), dtype=np.int64))
