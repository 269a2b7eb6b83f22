"""Templates: one text around the text columns of an example, for models that read a pair as one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.backbones.tokenizer import SECONDS, call_with_timeout, first_line
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Template:
    """A text with `{fields}`, which stands for the named text columns of an example, and optionally with `{task}`."""

    text: str
    task: str
    """The task's short name, filled in for `{task}`."""
    separator: str
    """The text between two fields."""

    @property
    def parts(self) -> tuple[str, str]:
        """The texts before and after the fields."""
        before, after = self.text.replace("{task}", self.task).split("{fields}", 1)
        return before, after

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> list[str]:
        """Return the text of each example; a field is `name: text`."""
        before, after = self.parts
        named = zip(*[[f"{name}: {text}" for text in texts] for name, texts in columns], strict=True)
        return [before + self.separator.join(fields) + after for fields in named]

    def spans(self, columns: Sequence[tuple[str, list[str]]]) -> NDArray[np.int64]:
        """Return the first character and the end (exclusive) of each column's text in the result of `render`.

        Returns:
            (N, columns, 2).
        """
        spans = np.empty((len(columns[0][1]), len(columns), 2), np.int64)
        position = np.full(len(spans), len(self.parts[0]))  # (N,) of the next field
        for c, (name, texts) in enumerate(columns):
            spans[:, c, 0] = position + len(f"{name}: ")
            spans[:, c, 1] = spans[:, c, 0] + [len(text) for text in texts]
            position = spans[:, c, 1] + len(self.separator)
        return spans


def wrap_in_chat(text: str, tokenizer: Any) -> str:
    """Return a template as a user message in the tokenizer's chat template, followed by the beginning of the reply.

    A beginning token that the tokenizer adds itself is left out.

    Raises:
        UserError: the tokenizer has no chat template, or its template fails or takes too long.
    """
    key, value, mark = "model.chat_template", "true", "{fields}"
    if tokenizer.chat_template is None:
        reason, remedy = "the tokenizer has none", "Set model.chat_template=false."
        raise UserError(reason, key=key, value=value, remedy=remedy, code=Code.UNSUPPORTED)
    messages = [{"role": "user", "content": mark}]
    try:
        chat = call_with_timeout(
            lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), SECONDS
        )
    except Exception as error:  # whatever a template of unknown origin raises
        reason = f"the tokenizer's chat template fails ({first_line(error)})"
        raise UserError(reason, key=key, value=value, remedy="Set it to false.", code=Code.UNSUPPORTED) from None
    if chat.count(mark) != 1:
        reason = "the tokenizer's chat template does not show the user's message once"
        raise UserError(reason, key=key, value=value, remedy="Set it to false.", code=Code.UNSUPPORTED)
    start = tokenizer.bos_token
    if start and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        chat = chat.removeprefix(start)
    return str(chat.replace(mark, text))
