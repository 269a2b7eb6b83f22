"""The chat messages of an example: system message, few-shot examples, question."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.config.schema import Data
    from lora_bench.data.examples import Examples
    from lora_bench.llm.settings import Prompt

Messages = list[dict[str, str]]
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """The prompt of one task, with its few-shot examples."""

    system: str | None
    question: str
    answers: tuple[str, str]
    """The words for label 0 and label 1."""
    columns: Sequence[str]
    shots: Messages
    """Few-shot questions and answers, before the question."""

    @classmethod
    def build(cls, prompt: Prompt, data: Data, train: Examples | None, seed: int) -> Template:
        """Return the template with its few-shot examples, equally many of each label.

        The words that answer a question are `prompt.answers`; if that is None, the label names of the data.

        Args:
            prompt: the question, the words that answer it, and the number of examples.
            data: columns and label names of the task.
            train: the split that examples are drawn from; None if there is none.
            seed: of the choice and order of the examples.

        Raises:
            UserError: a field of the template is unknown, a text of the data has no field, the two answers are empty or
                equal, or train is missing or holds too few examples of a label.
        """
        words = data.label_names if prompt.answers is None else prompt.answers
        template = cls(prompt.system, prompt.template, (words[0].strip(), words[1].strip()), data.text_columns, [])
        template._check(prompt)
        return replace(template, shots=template._examples(prompt.shots, train, seed))

    def messages(self, texts: Sequence[str]) -> Messages:
        """Return the messages for an example with these texts, one for each column.

        They are the system message, if it is not empty, the few-shot questions and answers, and the question. Fields
        are filled in in the system message too.
        """
        question = {"role": "user", "content": self._fill(self.question, texts)}
        system = [{"role": "system", "content": self._fill(self.system, texts)}] if self.system else []
        return [*system, *self.shots, question]

    def _fill(self, text: str, texts: Sequence[str]) -> str:
        """Return a text with its fields `{name}` filled in; unknown ones stay."""
        values = self._values(texts)
        return _FIELD.sub(lambda match: values.get(match[1], match[0]), text)

    def _values(self, texts: Sequence[str]) -> Mapping[str, str]:
        """Return the text of each field; a column named like another field, such as `fields`, takes precedence."""
        named = dict(zip(self.columns, texts, strict=True))
        fields = {"fields": "\n".join(f"{name}: {text}" for name, text in named.items())}
        return fields | {"label_0": self.answers[0], "label_1": self.answers[1]} | named

    def _check(self, prompt: Prompt) -> None:
        """Check that the data fills every field, the question has every text, and the answers differ apart from case.

        Raises:
            UserError: naming the key.
        """
        values = self._values([""] * len(self.columns))
        for key, text in (("prompt.system", self.system or ""), ("prompt.template", self.question)):
            for name in _FIELD.findall(text):
                if name not in values:
                    remedy = f"Use {', '.join('{' + field + '}' for field in values)}."
                    raise UserError(
                        f"has a field {{{name}}} that the data does not fill",
                        key=key,
                        remedy=remedy,
                        code=Code.INVALID_SYNTAX,
                    )
        used = set(_FIELD.findall(self.question))
        if "fields" not in used:
            for name in self.columns:
                if name not in used:
                    remedy = "Put it where the text goes, or {fields} for all texts with their names."
                    raise UserError(
                        f"lacks {{{name}}}, a text of the data",
                        key="prompt.template",
                        remedy=remedy,
                        code=Code.INVALID_SYNTAX,
                    )
        zero, one = (answer.casefold() for answer in self.answers)
        if not zero or not one or zero == one:
            raise UserError(
                "must be two different words", key="prompt.answers", value=list(self.answers), code=Code.INVALID_VALUE
            )

    def _examples(self, shots: int, train: Examples | None, seed: int) -> Messages:
        """Return `shots` questions with answers, equally many of each label, in an order given by the seed.

        Each is a user message and an assistant message; 0 shots give none.

        Raises:
            UserError: there is no train split, or it has fewer than `shots / 2` rows of a label.
        """
        if not shots:
            return []
        if train is None:
            raise UserError(
                "there is no train split to take examples from", key="prompt.shots", value=shots, code=Code.EMPTY
            )
        assert train.labels is not None
        # numpy promises the raw stream of PCG64 for ever, but not that of `permutation`.
        order = np.argsort(np.random.PCG64(seed).random_raw(len(train)), kind="stable")
        rows = []
        for label in (0, 1):
            candidates = order[train.labels[order] == label]
            if len(candidates) < shots // 2:
                reason = f"takes {shots // 2} examples of label {label}, and train has {len(candidates)}"
                raise UserError(reason, key="prompt.shots", value=shots, remedy="Give fewer.", code=Code.INVALID_VALUE)
            rows += candidates[: shots // 2].tolist()
        rank = {row: i for i, row in enumerate(order.tolist())}
        messages = []
        for row in sorted(rows, key=rank.__getitem__):
            question = self._fill(self.question, [column[row] for column in train.texts])
            answer = self.answers[int(train.labels[row])]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages
