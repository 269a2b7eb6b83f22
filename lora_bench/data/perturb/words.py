"""Transforms of words: synonyms, contractions, left-out words, other numbers and names.

Numbers and names are replaced only if both texts contain them. Replaced alike in both texts, the label stays;
replaced in one, a duplicate becomes a non-duplicate.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_bench.data.perturb.transform import BREAKS, Edit, Texts, Transform, apply_edits, share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

_CONTRACTED = {
    **{f"{verb} not": f"{verb}n't" for verb in ("is", "are", "was", "were", "do", "does", "did", "has", "have", "had")},
    **{f"{verb} not": f"{verb}n't" for verb in ("could", "should", "would")},
    "cannot": "can't",
    "will not": "won't",
    "i am": "i'm",
    "let us": "let's",
    **{f"{who} are": f"{who}'re" for who in ("you", "we", "they")},
    **{f"{who} will": f"{who}'ll" for who in ("i", "you", "he", "she", "we", "they")},
    **{f"{word} is": f"{word}'s" for word in ("what", "who", "where", "how", "it", "that", "there", "he", "she")},
}
_EXPANDED = {short: long for long, short in _CONTRACTED.items()}
# Only before another word: not "I know what it is". And "what's happened" is "what has happened".
_LONG = re.compile(rf"(?<![\w'’])({'|'.join(_CONTRACTED)})(?= \w)", re.IGNORECASE)
_SHORT = re.compile(
    rf"(?<![\w'’])({'|'.join(_EXPANDED).replace(chr(39), '[’' + chr(39) + ']')})(?= (?!been|got|had|\w+ed\b)\w)",
    re.IGNORECASE,
)

_BOTH_WAYS = (
    *(("buy", "purchase"), ("buying", "purchasing"), ("bought", "purchased"), ("begin", "start"), ("big", "large")),
    *(("bigger", "larger"), ("biggest", "largest"), ("movie", "film"), ("movies", "films"), ("company", "firm")),
    *(("companies", "firms"), ("cell phone", "mobile phone"), ("cell phones", "mobile phones"), ("photo", "picture")),
    *(("photos", "pictures"), ("happen", "occur"), ("happens", "occurs"), ("happened", "occurred")),
    *(("choose", "select"), ("choosing", "selecting"), ("improve", "enhance"), ("improving", "enhancing")),
    *(("famous", "well-known"), ("weird", "strange"), ("children", "kids"), ("frequently", "often")),
    *(("nowadays", "these days"), ("make money", "earn money"), ("making money", "earning money")),
    *(("lose weight", "shed weight"), ("losing weight", "shedding weight"), ("repair", "fix"), ("gift", "present")),
    *(("the United States", "the USA"), ("difference between", "distinction between"), ("scared of", "afraid of")),
)
_ONE_WAY = (
    *(("difficult", "hard"), ("obtain", "get"), ("require", "need"), ("requires", "needs"), ("wealthy", "rich")),
    *(("physician", "doctor"), ("physicians", "doctors"), ("assist", "help"), ("get rid of", "eliminate")),
    *(("approximately", "about"), ("vacation", "holiday"), ("quickly", "rapidly")),
)
SYNONYMS = dict([*_BOTH_WAYS, *((there, back) for back, there in _BOTH_WAYS), *_ONE_WAY])
_SYNONYM = re.compile(rf"(?<![\w-])({'|'.join(sorted(map(re.escape, SYNONYMS), key=len, reverse=True))})(?![\w-])")

# Words that can be left out without a change of meaning. "a few" is not "few", and the a of "vitamin a" is a name.
_STOP_WORD = re.compile(r"(?<![\w'’-])(?:the|an?|actually|basically|please) (?!few|little|lot|bit|hell)(?=[a-z])")
_NAMED_BY_LETTER = re.compile(
    r"(?:vitamin|hepatitis|grade|type|class|plan|group|team|section|level|option|part) $", re.I
)

NUMBER = re.compile(r"(?<![\w.,:/-])[0-9]{1,9}(?![\w:/-]|[.,][0-9])")

NAMES = (
    *(("India", "China", "Japan", "Brazil", "Canada", "Australia", "Germany", "France", "Italy", "Spain", "Russia"),),
    *(("Delhi", "Mumbai", "London", "Paris", "Berlin", "Tokyo", "Sydney", "Chennai", "Bangalore", "Singapore"),),
    *(("Google", "Microsoft", "Amazon", "Apple", "Samsung", "Facebook", "Twitter", "Instagram", "Uber", "Netflix"),),
    *(("Java", "Python", "Ruby", "Perl", "Fortran", "Haskell"), ("Spanish", "French", "German", "Hindi", "Italian")),
)
"""Groups of names; a name may be replaced by any other of its group."""
_NAME = re.compile(rf"\b(?:{'|'.join(name for group in NAMES for name in group)})\b")


def _like(original: str, new: str) -> str:
    """Return `new`, with a capital first letter if the original has one."""
    return new[:1].upper() + new[1:] if original[:1].isupper() else new


def _contraction(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each contraction and long form before a word: "what is" as "what's", "don't" as "do not"."""
    matches = [(match, _CONTRACTED) for match in _LONG.finditer(text)]
    matches += [(match, _EXPANDED) for match in _SHORT.finditer(text)]
    for match, forms in sorted(matches, key=lambda item: item[0].start()):
        yield match.start(), match.end(), _like(match.group(), forms[match.group().lower().replace("’", "'")])


def _synonym(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each word or phrase in `SYNONYMS` (case matters): replace it by its synonym."""
    for match in _SYNONYM.finditer(text):
        yield match.start(), match.end(), SYNONYMS[match.group()]


def _stop_word(text: str, random: Random) -> Iterator[Edit]:
    """Yield an edit for each article or filler before a word in small letters: leave it out."""
    for match in _STOP_WORD.finditer(text):
        if not _NAMED_BY_LETTER.search(text, 0, match.start()):
            yield match.start(), match.end(), ""


def _another_number(number: str, taken: set[str], random: Random) -> str:
    """Return another number at most nine away, not negative and not taken; leading zeros are kept."""
    value = int(number)
    near = [other for other in range(max(0, value - 9), value + 10) if str(other) not in taken and other != value]
    return str(random.choice(near)).zfill(len(number) if number.startswith("0") else 0)


def _another_name(name: str, taken: set[str], random: Random) -> str:
    """Return another name of the same group that is not taken; the name itself if all are."""
    group = next(group for group in NAMES if name in group)
    return random.choice([other for other in group if other not in taken] or [name])


def _replace(
    pattern: re.Pattern[str], another: Callable[[str, set[str], Random], str], *, alike: bool
) -> Callable[[Texts, Random, float], Texts]:
    """Return a change that replaces numbers or names shared by both texts, alike in both or in a random one of them.

    It replaces `intensity` of the distinct shared ones, rounded up, wherever they occur. Texts that share none are
    returned unchanged.

    Args:
        pattern: of a number or name.
        another: returns a replacement that is not among the taken ones.
        alike: replace in both texts; otherwise in one.
    """

    def change(texts: Texts, random: Random, intensity: float) -> Texts:
        """Return the texts with a random share of their common numbers or names replaced."""
        matches_by_text = [list(dict.fromkeys(pattern.findall(text))) for text in texts]
        shared = [match for match in matches_by_text[0] if all(match in matches for matches in matches_by_text[1:])]
        taken = {match for matches in matches_by_text for match in matches}
        new = {}
        for old in random.sample(shared, share(intensity, len(shared))):
            new[old] = another(old, taken, random)
            taken.add(new[old])
        touched = set(range(len(texts))) if alike else {random.randrange(len(texts))}
        return tuple(
            pattern.sub(lambda match: new.get(match.group(), match.group()), text) if i in touched else text
            for i, text in enumerate(texts)
        )

    return change


TRANSFORMS = (
    Transform(name="contraction", level="word", change=apply_edits(_contraction)),
    Transform(name="synonym", level="word", change=apply_edits(_synonym)),
    Transform(name="stop_word", level="word", change=apply_edits(_stop_word), is_idempotent=True),
    Transform(
        name="number_alike", level="word", change=_replace(NUMBER, _another_number, alike=True), texts=2,
        relations=("paraphrase",),
    ),
    Transform(
        name="entity_alike", level="word", change=_replace(_NAME, _another_name, alike=True), texts=2,
        relations=("paraphrase",),
    ),
    Transform(
        name="number", level="word", change=_replace(NUMBER, _another_number, alike=False), labels=BREAKS, texts=2,
        relations=("paraphrase",),
    ),
    Transform(
        name="entity", level="word", change=_replace(_NAME, _another_name, alike=False), labels=BREAKS, texts=2,
        relations=("paraphrase",),
    ),
)  # fmt: skip
