"""Special tokens that are written out in a text: `[SEP]` in a question is five characters, and separates nothing.

By default a tokenizer reads them as its own marks. Then a text could end itself, a classifier such as BART's would find
two ends in a row, and pair features would take a part of one text for the other.

Exports for deployment contain `break_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SpecialTokens:
    """The reading of a tokenizer's special tokens where a text contains them: as other characters."""

    are_split: bool = True
    """The tokenizer splits them itself (`split_special_tokens` of transformers). It does not if a template has some,
    which must stay special."""
    broken: tuple[str, ...] = ()
    """Special tokens that the tokenizer does not split: in texts they get a space behind their first character."""

    @classmethod
    def of(cls, tokenizer: Any, template: Sequence[str] = ()) -> SpecialTokens:
        """Choose the reading for a tokenizer, which is left without padding and truncation.

        The token for unknown words is left out: any text may give it.

        Args:
            tokenizer: of transformers, a fast one.
            template: the parts of the text that surrounds every example.
        """
        backend = tokenizer.backend_tokenizer
        ids = {token: backend.token_to_id(token) for token in tokenizer.all_special_tokens}
        ids |= {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        tokens = sorted(token for token in ids if token.strip() and token != tokenizer.unk_token)
        if any(token in part for token in tokens for part in template):
            return cls(are_split=False, broken=tuple(tokens))
        cls().configure(backend)
        texts = [text for token in tokens for text in (token, f"a{token}a")]  # by itself, and within a word
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        unsplit = [token for token in tokens if ids[token] in [*next(encodings).ids, *next(encodings).ids]]
        return cls(broken=tuple(unsplit))

    def configure(self, backend: Any) -> None:
        """Let a tokenizer read texts so, without padding and truncation.

        The state lasts until a call of transformers' tokenizer changes it: whoever encodes texts sets it first.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = self.are_split

    def break_in(self, texts: Sequence[str]) -> list[str]:
        """Return the texts as the tokenizer has to be given them."""
        first_characters = {token[0] for token in self.broken}  # few, and rare in texts
        return [
            break_tokens(text, self.broken) if any(character in text for character in first_characters) else text
            for text in texts
        ]


def break_tokens(text: str, tokens: Sequence[str]) -> str:
    """Return a text with a space behind the first character of each of these tokens.

    A token of one character becomes a space.
    """
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text
