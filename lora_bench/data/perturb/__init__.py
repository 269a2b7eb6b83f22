"""Perturbed texts: small, seeded, pure transforms at the level of characters, words and sentences.

Each declares its effect on the label: most keep it, `number` and `entity` make a duplicate a non-duplicate. The
perturbation of a row depends only on its texts, its id, the transform, the intensity and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import characters, sentences, words
from lora_bench.data.perturb.transform import FORM_TASKS, PARAPHRASE_TASKS, Transform
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TRANSFORMS = {
    transform.name: transform for transform in (*characters.TRANSFORMS, *words.TRANSFORMS, *sentences.TRANSFORMS)
}
LEVELS = ("character", "word", "sentence")


@dataclass(frozen=True)
class PerturbedRows:
    """The rows that a transform changed, with their new texts and labels."""

    rows: NDArray[np.int64]  # (M,) their positions
    examples: Examples  # M of them, with their new labels


def perturb(examples: Examples, transform: Transform, *, seed: int | str, intensity: float) -> PerturbedRows:
    """Apply a transform to every row, and return the changed rows.

    Rows are left out if the transform does not change them, or if their new label is unknown. Examples without labels
    stay without; a transform that changes labels changes none of them.
    """
    rows, texts, labels = [], [], []
    for row in range(len(examples)):
        changed = perturb_row(examples, row, transform, seed=seed, intensity=intensity)
        if changed is not None:
            rows.append(row)
            texts.append(changed[0])
            labels.append(changed[1])
    columns = tuple([row_texts[c] for row_texts in texts] for c in range(len(examples.texts)))
    indices = np.array(rows, np.int64)
    new_labels = None if examples.labels is None else np.array(labels, np.int64)
    return PerturbedRows(indices, Examples(examples.ids[indices], columns, new_labels))


def perturb_row(
    examples: Examples, row: int, transform: Transform, *, seed: int | str, intensity: float
) -> tuple[tuple[str, ...], int | None] | None:
    """Return a row's new texts and label; None if the transform does not change it, or its new label is unknown.

    The label is None if the examples have none; a transform that changes labels does not change such a row.

    Args:
        examples: the split.
        row: position in it; the random stream depends on the row's id instead.
        transform: to apply.
        seed: of the random stream.
        intensity: in (0, 1], the share of the possible changes that is made.
    """
    label = None if examples.labels is None else int(examples.labels[row])
    new_label = None if label is None else transform.labels[label]
    if new_label is None and not transform.keeps_label:
        return None
    texts = tuple(column[row] for column in examples.texts)
    changed = transform.change(texts, Random(f"{seed} {transform.name} {examples.ids[row]}"), intensity)
    return None if changed == texts else (changed, new_label)


def choose_transforms(
    names: str | Sequence[str], task: str, texts: int, key: str, *, keep_label: bool = False
) -> list[Transform]:
    """Return the transforms that names, levels or `all` stand for, each once, in the order of their first mention.

    Args:
        names: names of transforms, levels or `all`, as one text or a list. A level and `all` stand for those of their
            transforms that suit the data.
        task: the task of the data; a label rule holds for some tasks.
        texts: the number of texts of a row.
        key: the config key that messages name.
        keep_label: allow only transforms that keep the label.

    Raises:
        UserError: a name is unknown, its transform does not suit the data, no transform of a level does, or the list is
            empty.
    """
    chosen: dict[str, Transform] = {}
    for name in [names] if isinstance(names, str) else names:
        if name in TRANSFORMS:
            chosen[name] = TRANSFORMS[name]
            _refuse_unsuited(TRANSFORMS[name], task, texts, key, keep_label)
            continue
        if name not in (*LEVELS, "all"):
            hint = nearest(name, [*TRANSFORMS, *LEVELS, "all"])
            raise UserError("is not a transform", key=key, value=name, remedy=hint, code=Code.UNKNOWN_CHOICE)
        of_level = [transform for transform in TRANSFORMS.values() if name in (transform.level, "all")]
        suited = [t for t in of_level if t.has_rule(task) and t.texts <= texts and (t.keeps_label or not keep_label)]
        if not suited:
            raise UserError(
                f"has no transform whose label rule holds for the task {task}",
                key=key,
                value=name,
                code=Code.UNSUPPORTED,
            )
        chosen |= {transform.name: transform for transform in suited}
    if not chosen:
        raise UserError(
            "names no transform", key=key, value="[]", remedy="Give null for none, or all.", code=Code.INVALID_VALUE
        )
    return list(chosen.values())


def _refuse_unsuited(transform: Transform, task: str, texts: int, key: str, keep_label: bool) -> None:
    """Refuse a transform that does not suit the data; arguments are those of `choose_transforms`.

    Raises:
        UserError: it changes labels and may not, needs more texts, or has no label rule for the task.
    """
    if keep_label and not transform.keeps_label:
        raise UserError(
            "changes labels, which trainer.objective=perturb_consistency does not allow",
            key=key,
            value=transform.name,
            code=Code.CONFLICT,
        )
    if transform.texts > texts:
        raise UserError("needs pairs, and the data has single texts", key=key, value=transform.name, code=Code.CONFLICT)
    if transform.has_rule(task):
        return
    reason = "changes the form of a text, which the label is about" if task in FORM_TASKS else "has no label rule"
    remedy = (
        ""
        if task in FORM_TASKS
        else f"The new label is known only for the tasks {' and '.join(PARAPHRASE_TASKS)} (data.task)."
    )
    raise UserError(f"{reason} in the task {task}", key=key, value=transform.name, remedy=remedy, code=Code.UNSUPPORTED)
