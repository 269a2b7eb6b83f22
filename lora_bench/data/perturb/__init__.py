"""Perturbed texts: small, seeded, pure transforms at the level of characters, words and sentences.

Each declares its effect on the label: most keep it, a class or a number. `number`, `entity` and `exchange` make
non-duplicates, so they need two classes. The perturbation of a row depends only on its texts, its id, the transform,
the intensity and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import characters, exchange, sentences, words
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data
    from lora_bench.data.perturb.transform import Transform

TRANSFORMS = {
    transform.name: transform
    for transform in (*characters.TRANSFORMS, *words.TRANSFORMS, *exchange.TRANSFORMS, *sentences.TRANSFORMS)
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
    new_labels = None if examples.labels is None else np.array(labels, examples.labels.dtype)
    return PerturbedRows(indices, Examples(examples.ids[indices], columns, new_labels))


def perturb_row(
    examples: Examples, row: int, transform: Transform, *, seed: int | str, intensity: float
) -> tuple[tuple[str, ...], float | None] | None:
    """Return a row's new texts and label; None if the transform does not change it, or its new label is unknown.

    The label is None if the examples have none; a transform that changes labels does not change such a row.

    Args:
        examples: the split.
        row: position in it; the random stream depends on the row's id instead.
        transform: to apply.
        seed: of the random stream.
        intensity: in (0, 1], the share of the possible changes that is made.
    """
    label: Any = None if examples.labels is None else examples.labels[row].item()
    new_label = label if transform.labels is None else transform.labels.get(label)
    if new_label is None and not transform.keeps_label:
        return None
    texts = tuple(column[row] for column in examples.texts)
    changed = transform.change(texts, Random(f"{seed} {transform.name} {examples.ids[row]}"), intensity)
    return None if changed == texts else (changed, new_label)


def choose_transforms(
    names: str | Sequence[str],
    relation: str | None,
    texts: int,
    key: str,
    *,
    keep_label: bool = False,
    binary: bool = True,
) -> list[Transform]:
    """Return the transforms that names, levels or `all` stand for, each once, in the order of their first mention.

    Args:
        names: names of transforms, levels or `all`, as one text or a list. A level and `all` stand for those of their
            transforms that suit the data.
        relation: `data.relation`; a label rule holds for some relations.
        texts: the number of texts of a row.
        key: the config key that messages name.
        keep_label: allow only transforms that keep the label.
        binary: True if the data may have two classes, which transforms that change labels need.

    Raises:
        UserError: a name is unknown, its transform does not suit the data, no transform of a level does, or the list is
            empty.
    """
    chosen: dict[str, Transform] = {}
    for name in [names] if isinstance(names, str) else names:
        if name in TRANSFORMS:
            chosen[name] = TRANSFORMS[name]
            _refuse_unsuited(TRANSFORMS[name], relation, texts, key, keep_label, binary)
            continue
        if name not in (*LEVELS, "all"):
            hint = nearest(name, [*TRANSFORMS, *LEVELS, "all"])
            raise UserError("is not a transform", key=key, value=name, remedy=hint, code=Code.UNKNOWN_CHOICE)
        suited = [
            transform
            for transform in TRANSFORMS.values()
            if name in (transform.level, "all")
            and transform.has_rule(relation)
            and transform.texts <= texts
            and (transform.keeps_label or (binary and not keep_label))
        ]
        if not suited:
            raise UserError(
                f"has no transform whose label rule holds with data.relation={relation or 'null'}",
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


def may_be_binary(data: Data) -> bool:
    """Return whether a task may have two classes: without `data.label_names`, the data will tell."""
    return data.type == "classification" and (data.label_names is None or len(data.label_names) == 2)


_NEEDS_TWO = "changes labels, which needs a task of two classes"


def _refuse_unsuited(
    transform: Transform, relation: str | None, texts: int, key: str, keep_label: bool, binary: bool
) -> None:
    """Refuse a transform that does not suit the data; arguments are those of `choose_transforms`.

    Raises:
        UserError: it changes labels and may not, needs more texts, or has no label rule for the relation.
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
    if not transform.has_rule(relation):
        reason = "has no label rule" if transform.relations else "changes the form of a text, which the label is about"
        remedy = f"The new label is known only with data.relation={' or '.join(transform.relations or ())}."
        raise UserError(
            f"{reason} with data.relation={relation or 'null'}",
            key=key,
            value=transform.name,
            remedy=remedy if transform.relations else "",
            code=Code.UNSUPPORTED,
        )
    if not (binary or transform.keeps_label):
        raise UserError(_NEEDS_TWO, key=key, value=transform.name, code=Code.UNSUPPORTED)
