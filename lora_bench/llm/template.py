"""The chat messages of an example: system message, few-shot examples, question."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.errors import Code, UserError, require
from lora_bench.llm.parsing import normalise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

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
    answers: Sequence[str]
    """The words for the classes 0, 1, …; empty for regression."""
    range: tuple[str, str] | None
    """The least and the greatest number in train; None without train, and for classes."""
    columns: Sequence[str]
    shots: Messages
    """Few-shot questions and answers, before the question."""
    notes: Sequence[str]
    """Sentences on the choice of the few-shot examples."""

    @classmethod
    def build(cls, prompt: Prompt, data: Data, train: Examples | None, seed: int) -> Template:
        """Return the template with its few-shot examples.

        The words that answer a question are `prompt.answers`; if that is None, the label names of the data. The answers
        of a regression are numbers.

        Args:
            prompt: the question, the words that answer it, and the number of examples.
            data: columns and label names of the task.
            train: the split that examples are drawn from; None if there is none.
            seed: of the choice and order of the examples.

        Raises:
            UserError: a field of the template is unknown, a text of the data has no field, the answers are not one
                word for each class, are empty or alike, or train is missing or holds too few examples of a class.
        """
        words = [] if data.label_names is None else prompt.answers or data.label_names
        numbers = train.labels if train is not None and data.label_names is None else None
        limits = None if numbers is None else (_number_text(numbers.min()), _number_text(numbers.max()))
        answers = [word.strip() for word in words]
        template = cls(prompt.system, prompt.template, answers, limits, data.text_columns, [], [])
        template._check(prompt, data)
        if not prompt.shots:
            return template
        if train is None:
            raise UserError(
                "there is no train split to take examples from", key="prompt.shots", value=prompt.shots, code=Code.EMPTY
            )
        if not answers:
            reason = f"takes more examples than the {len(train)} rows of train"
            require(prompt.shots <= len(train), "prompt.shots", prompt.shots, reason, "Give fewer.")
        notes = []
        if prompt.shots < len(answers):
            reason = f"prompt.shots={prompt.shots} examples show as many of the {len(answers)} classes"
            notes.append(f"{reason}, chosen by the seed; {len(answers)} would show each")
        return replace(template, shots=template._examples(prompt.shots, train, seed), notes=notes)

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
        if self.answers:
            *others, last = self.answers
            fields["labels"] = f"{', '.join(others)} or {last}"
            fields |= {f"label_{label}": word for label, word in enumerate(self.answers)}
        if self.range:
            fields["min"], fields["max"] = self.range
        return fields | named

    def _check(self, prompt: Prompt, data: Data) -> None:
        """Check that the data fills every field, the question has every text, and each class has an answer of its own.

        Raises:
            UserError: naming the key.
        """
        self._check_answers(prompt, data)
        values = self._values([""] * len(self.columns))
        for key, text in (("prompt.system", self.system or ""), ("prompt.template", self.question)):
            for name in _FIELD.findall(text):
                if name not in values:
                    fields = [field for field in values if not re.fullmatch(r"label_([2-9]|\d\d+)", field)]
                    remedy = f"Use {', '.join('{' + field + '}' for field in fields)}. {_suitable_prompt(data)}"
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

    def _check_answers(self, prompt: Prompt, data: Data) -> None:
        """Refuse answers that are not one word for each class, and words that `normalise` makes equal or empty.

        Raises:
            UserError: naming the key.
        """
        given, names = prompt.answers, data.label_names
        if names is None:
            reason = "are words for classes, and data.type=regression asks for a number"
            remedy = f"Set it to null. {_suitable_prompt(data)}"
            require(given is None, "prompt.answers", given, reason, remedy, code=Code.CONFLICT)
            return
        reason = f"has {len(self.answers)} words for {len(names)} classes"
        remedy = f"Give a word for each class; null takes the names of the classes. {_suitable_prompt(data)}"
        require(len(self.answers) == len(names), "prompt.answers", given, reason, remedy, code=Code.MISMATCH)
        if len(names) == 2:
            reason = "must be even: as many examples of one label as of the other"
            require(prompt.shots % 2 == 0, "prompt.shots", prompt.shots, reason)
        words: dict[str, str] = {}
        for word in self.answers:
            key = normalise(word)
            reason = f"{words[key]!r} and {word!r} differ in case or punctuation only" if key in words else ""
            reason = reason or ("" if key else f"{word!r} has neither letter nor digit")
            remedy = "Give a word for each class that differs from the others."
            require(not reason, "prompt.answers", list(self.answers)[:20], reason, remedy)
            words[key] = word

    def _examples(self, shots: int, train: Examples, seed: int) -> Messages:
        """Return `shots` questions with answers, in an order given by the seed.

        There are as many of each class as of another, to within one: the classes that have one more are those that the
        order reaches first. For regression the rows are divided by their numbers into `shots` groups of equal size, of
        which each gives one. An example is a user message and an assistant message.

        Raises:
            UserError: train has fewer rows of a class than are taken.
        """
        assert train.labels is not None
        # numpy promises the raw stream of PCG64 for ever, but not that of `permutation`.
        order = np.argsort(np.random.PCG64(seed).random_raw(len(train)), kind="stable")
        groups, count = (train.labels, len(self.answers)) if self.answers else (_by_size(train.labels, shots), shots)
        reached = list(dict.fromkeys(groups[order].tolist()))
        rows: list[int] = []
        for group in range(count):
            quota = shots // count + (group in reached[: shots % count])
            candidates = order[groups[order] == group]
            if len(candidates) < quota:
                name = f"of label {group}" if count == 2 else f"of {self.answers[group]!r}"
                reason = f"takes {quota} examples {name}, and train has {len(candidates)}"
                raise UserError(reason, key="prompt.shots", value=shots, remedy="Give fewer.", code=Code.INVALID_VALUE)
            rows += candidates[:quota].tolist()
        rank = {row: i for i, row in enumerate(order.tolist())}
        messages = []
        for row in sorted(rows, key=rank.__getitem__):
            question = self._fill(self.question, [column[row] for column in train.texts])
            label = train.labels[row]
            answer = self.answers[int(label)] if self.answers else _number_text(label)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


def _by_size(numbers: NDArray[Any], groups: int) -> NDArray[np.int64]:
    """Return the group of each number, (N,): 0 for the smallest ones to `groups` - 1, all of the same size."""
    ranks = np.empty(len(numbers), np.int64)
    ranks[np.argsort(numbers, kind="stable")] = np.arange(len(numbers))
    return ranks * groups // len(numbers)


def _number_text(number: float) -> str:
    """Return a number as a prompt has it: without trailing zeros."""
    return f"{number:g}"


def _suitable_prompt(data: Data) -> str:
    """Return a sentence that names the prompt for any columns of the task's type."""
    return f"prompt={'labels' if data.label_names else 'similarity'} suits any columns."
