"""Perturbed texts: small, seeded, pure transforms at the level of characters, words and sentences.

Each declares what it does to the label: most keep it, `number` and `entity` make a duplicate one that is none. A row's
perturbation depends on its texts, its id, the transform, the intensity and the seed, on nothing else.
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

TRANSFORMS = {each.name: each for each in (*characters.TRANSFORMS, *words.TRANSFORMS, *sentences.TRANSFORMS)}
LEVELS = ("character", "word", "sentence")


@dataclass(frozen=True)
class PerturbedRows:
    """Those rows of some examples that a transform changed."""

    rows: NDArray[np.int64]  # (M,) their positions
    examples: Examples  # M of them, with their new labels


def perturb(examples: Examples, transform: Transform, *, seed: int | str, intensity: float) -> PerturbedRows:
    """The rows that the transform changes, changed; those whose new label would not be known are left out."""
    rows, texts, labels = [], [], []
    for row in range(len(examples)):
        found = perturb_row(examples, row, transform, seed=seed, intensity=intensity)
        if found is not None:
            rows.append(row)
            texts.append(found[0])
            labels.append(found[1])
    columns = tuple([each[c] for each in texts] for c in range(len(examples.texts)))
    places = np.array(rows, np.int64)
    new = None if examples.labels is None else np.array(labels, np.int64)
    return PerturbedRows(places, Examples(examples.ids[places], columns, new))


def perturb_row(
    examples: Examples, row: int, transform: Transform, *, seed: int | str, intensity: float
) -> tuple[tuple[str, ...], int | None] | None:
    """The row's new texts and label; None where the transform does not change it, or its label would be unknown."""
    label = None if examples.labels is None else int(examples.labels[row])
    new_label = None if label is None else transform.labels[label]
    if new_label is None and not transform.keeps_label:
        return None
    texts = tuple(column[row] for column in examples.texts)
    changed = transform.change(texts, Random(f"{seed} {transform.name} {examples.ids[row]}"), intensity)
    return None if changed == texts else (changed, new_label)


def choose_transforms(
    asked: str | Sequence[str], task: str, texts: int, key: str, *, keep_label: bool = False
) -> list[Transform]:
    """The transforms that `asked` names.

    Args:
        asked: names, levels or `all`, as one or as a list. Of a level or of all, those that suit the data are taken.
        task: the data's; label rules hold for some.
        texts: how many texts a row of the data has.
        key: the config key to blame.
        keep_label: whether the label must stay.

    Raises:
        UserError: a name is not known, or what it names does not suit the data.
    """
    chosen: dict[str, Transform] = {}
    for name in [asked] if isinstance(asked, str) else asked:
        if name in TRANSFORMS:
            chosen[name] = TRANSFORMS[name]
            _refuse_unsuited(TRANSFORMS[name], task, texts, key, keep_label)
            continue
        if name not in (*LEVELS, "all"):
            hint = nearest(name, [*TRANSFORMS, *LEVELS, "all"])
            raise UserError("is not a transform", key=key, value=name, remedy=hint, code=Code.UNKNOWN_CHOICE)
        of_level = [each for each in TRANSFORMS.values() if name in (each.level, "all")]
        suited = [each for each in of_level if each.has_rule(task) and each.texts <= texts]
        suited = [each for each in suited if each.keeps_label or not keep_label]
        if not suited:
            raise UserError(
                f"has no transform whose label rule holds for the task {task}",
                key=key,
                value=name,
                code=Code.UNSUPPORTED,
            )
        chosen |= {each.name: each for each in suited}
    if not chosen:
        raise UserError(
            "names no transform", key=key, value="[]", remedy="Give null for none, or all.", code=Code.INVALID_VALUE
        )
    return list(chosen.values())


def _refuse_unsuited(transform: Transform, task: str, texts: int, key: str, keep_label: bool) -> None:
    if keep_label and not transform.keeps_label:
        raise UserError(
            "changes labels where the answer is to stay the same",
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
        else f"What becomes of the label is known for {' and '.join(PARAPHRASE_TASKS)} (data.task)."
    )
    raise UserError(f"{reason} in the task {task}", key=key, value=transform.name, remedy=remedy, code=Code.UNSUPPORTED)
