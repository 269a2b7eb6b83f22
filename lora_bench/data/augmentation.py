"""Perturbation of training pairs on the fly: each epoch perturbs another share of them with other transforms.

The perturbed texts depend on the data, the epoch and `data.split_seed`, not on the run's seed: members of a pack with
different seeds see the same texts in different orders. Only perturbed pairs are tokenised again. A batch has the
same rows with and without perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import (
    PerturbedRows,
    choose_transforms,
    may_be_binary,
    perturb_row,
)
from lora_bench.data.tokenization import PairReader, tokenize
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.config.schema import Data
    from lora_bench.data.perturb.transform import Transform
    from lora_bench.data.tokenization import TokenTable


@dataclass(frozen=True)
class Augmentation:
    """Perturbation of a table's pairs, drawn anew in each epoch.

    Args:
        examples: the table's N texts and labels.
        transforms: candidates; each chosen pair gets one, drawn among those that change it.
        share: fraction of the pairs that is chosen in each epoch.
        intensity: of the transforms, in (0, 1].
        seed: fixes all draws, together with the epoch.
        tokenize: returns the token table of examples.
    """

    examples: Examples
    transforms: Sequence[Transform]
    share: float
    intensity: float
    seed: int
    tokenize: Callable[[Examples], TokenTable]

    def perturb(self, epoch: int) -> PerturbedRows:
        """Return the rows that this epoch perturbs, with their new texts (not yet tokenised) and labels.

        `share` of the N rows are drawn, rounded to a whole number. A drawn row is left out if no transform changes it
        into one whose label is known.
        """
        random = Random(f"{self.seed} augment {epoch}")
        count = round(self.share * len(self.examples))
        rows, texts, labels = [], [], []
        for row in sorted(random.sample(range(len(self.examples)), count)):
            for transform in random.sample(self.transforms, len(self.transforms)):
                seed = f"{self.seed} {epoch}"
                changed = perturb_row(self.examples, row, transform, seed=seed, intensity=self.intensity)
                if changed is not None:
                    rows.append(row)
                    texts.append(changed[0])
                    labels.append(changed[1])
                    break
        indices = np.array(rows, np.int64)
        columns = tuple([row_texts[c] for row_texts in texts] for c in range(len(self.examples.texts)))
        assert self.examples.labels is not None
        new_labels = np.array(labels, self.examples.labels.dtype)
        return PerturbedRows(indices, Examples(self.examples.ids[indices], columns, new_labels))

    def table(self, table: TokenTable, epoch: int) -> TokenTable:
        """Return a copy of the table in which the rows perturbed in this epoch have their new tokens and labels.

        The copy has no augmentation, and no cached hidden states if a row was perturbed. Its `reversed_view` and its
        count of truncated rows are unchanged.
        """
        perturbed = self.perturb(epoch)
        if not len(perturbed.rows):
            return replace(table, augmentation=None)
        new = self.tokenize(perturbed.examples)
        offsets, lengths = table.offsets.copy(), table.lengths.copy()
        offsets[perturbed.rows] = new.offsets + len(table.values)  # behind the table's own tokens
        lengths[perturbed.rows] = new.lengths
        labels = None if table.labels is None else table.labels.copy()
        if labels is not None and new.labels is not None:
            labels[perturbed.rows] = new.labels
        types, text_ids = (
            None
            if marks is None
            else np.concatenate([marks, np.zeros(len(new.values), np.int8) if new_marks is None else new_marks])
            for marks, new_marks in ((table.types, new.types), (table.text_ids, new.text_ids))
        )
        return replace(
            table,
            values=np.concatenate([table.values, new.values]),
            offsets=offsets,
            lengths=lengths,
            types=types,
            text_ids=text_ids,
            labels=labels,
            hidden=None,
            augmentation=None,
        )


def choose_augmentations(data: Data, objective: str) -> list[Transform]:
    """Return the transforms that `data.augment` names; an empty list if it is null.

    `data.augment` holds names of transforms, levels or `all`, as in `choose_transforms`. `perturb_consistency` allows
    only transforms that keep the label.

    Raises:
        UserError: a name is unknown, a transform does not suit the data or the objective, or the objective needs
            transforms and there are none.
    """
    keeps_labels = objective == "perturb_consistency"
    if data.augment is None:
        if keeps_labels:
            remedy = "Give data.augment=all, a level, or a list of transforms."
            raise UserError(
                "compares each pair with a perturbed copy, and data.augment names no transform",
                key="trainer.objective",
                value=objective,
                remedy=remedy,
                code=Code.CONFLICT,
            )
        return []
    return choose_transforms(
        data.augment,
        data.relation,
        len(data.text_columns),
        "data.augment",
        keep_label=keeps_labels,
        binary=may_be_binary(data),
    )


def training_tables(
    data: Data, train: Examples, backbone: PairReader, objective: str, head: int = 0
) -> tuple[TokenTable, TokenTable | None]:
    """Tokenise the training pairs, and once more if the objective needs a second view.

    With `data.augment`, tables have an `augmentation`, which perturbs them anew in each epoch.

    Args:
        data: settings of the task.
        train: its training pairs.
        backbone: gives the template and the tokenizer.
        objective: `trainer.objective`.
        head: index of the member's head that classifies the rows.

    Returns:
        (table, second view). For `order_consistency`, the second view has the texts in reversed order, and both are
        perturbed. For `perturb_consistency`, it has the texts in order, and it alone is perturbed. For other objectives
        it is None; `alternate_order` gives the table a `reversed_view` instead.

    Raises:
        UserError: as `choose_augmentations`.
    """
    first_view, second_view = (
        partial(
            tokenize,
            columns=data.text_columns,
            backbone=backbone,
            max_length=data.max_length,
            truncation=data.truncation,
            reverse=reverse,
            head=head,
        )
        for reverse in (False, True)
    )
    transforms = choose_augmentations(data, objective)

    def augmented(view: Callable[..., TokenTable]) -> TokenTable:
        """Return the tokens of the training pairs in a view, with an augmentation if there are transforms.

        The cache holds unperturbed tokens only.
        """
        if not transforms:
            return view(train)
        uncached = partial(view, cached=False)
        augmentation = Augmentation(train, transforms, data.augment_share, data.intensity, data.split_seed, uncached)
        return replace(view(train), augmentation=augmentation)

    if objective == "perturb_consistency":
        return first_view(train), augmented(first_view)
    table = augmented(first_view)
    if objective == "alternate_order":
        return replace(table, reversed_view=augmented(second_view)), None
    return table, augmented(second_view) if objective == "order_consistency" else None
