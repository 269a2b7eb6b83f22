"""Training pairs perturbed on the fly: in each epoch another share of them, by other transforms.

What an epoch's pairs become depends on the data and `data.split_seed`, not on the run's seed: members of a pack that
differ in their seeds see the same texts, each in its own order. Only what was perturbed is tokenised anew, and batches
keep the rows that they would have without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import PerturbedRows, choose_transforms, perturb_row
from lora_bench.data.tokenization import PairReader, tokenize
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.config.schema import Data
    from lora_bench.data.perturb.transform import Transform
    from lora_bench.data.tokenization import TokenTable


@dataclass(frozen=True)
class Augmentation:
    """How a table's pairs are perturbed in an epoch.

    Args:
        examples: the table's N texts and labels.
        transforms: of which each chosen pair gets one, drawn among those that change it.
        share: of the pairs, chosen anew in each epoch.
        intensity: of the transforms.
        seed: fixes all draws, together with the epoch.
        tokenize: makes a table of examples.
    """

    examples: Examples
    transforms: Sequence[Transform]
    share: float
    intensity: float
    seed: int
    tokenize: Callable[[Examples], TokenTable]

    def perturb(self, epoch: int) -> PerturbedRows:
        """The rows that are perturbed in this epoch, with new texts and labels; a row that nothing changes is not."""
        random = Random(f"{self.seed} augment {epoch}")
        count = round(self.share * len(self.examples))
        rows, texts, labels = [], [], []
        for row in sorted(random.sample(range(len(self.examples)), count)):
            for transform in random.sample(self.transforms, len(self.transforms)):
                seed = f"{self.seed} {epoch}"
                found = perturb_row(self.examples, row, transform, seed=seed, intensity=self.intensity)
                if found is not None:
                    rows.append(row)
                    texts.append(found[0])
                    labels.append(found[1])
                    break
        places = np.array(rows, np.int64)
        columns = tuple([each[c] for each in texts] for c in range(len(self.examples.texts)))
        return PerturbedRows(places, Examples(self.examples.ids[places], columns, np.array(labels, np.int64)))

    def table(self, table: TokenTable, epoch: int) -> TokenTable:
        """The table as it is in this epoch: perturbed rows hold other tokens, all others what they held."""
        found = self.perturb(epoch)
        if not len(found.rows):
            return replace(table, augmentation=None)
        new = self.tokenize(found.examples)
        offsets, lengths = table.offsets.copy(), table.lengths.copy()
        offsets[found.rows] = new.offsets + len(table.values)  # behind the table's own tokens
        lengths[found.rows] = new.lengths
        labels = None if table.labels is None else table.labels.copy()
        if labels is not None and new.labels is not None:
            labels[found.rows] = new.labels
        types = None
        if table.types is not None:
            types = np.concatenate(
                [table.types, np.zeros(len(new.values), np.int8) if new.types is None else new.types]
            )
        return replace(
            table,
            values=np.concatenate([table.values, new.values]),
            offsets=offsets,
            lengths=lengths,
            types=types,
            labels=labels,
            hidden=None,
            augmentation=None,
        )


def choose_augmentations(data: Data, objective: str) -> list[Transform]:
    """What `data.augment` names; refuses what there is not, and what suits neither the data nor the objective."""
    compared = objective == "perturb_consistency"
    if data.augment is None:
        if compared:
            remedy = "Give data.augment=all, a level, or a list of transforms."
            raise UserError(
                "needs perturbed pairs", key="trainer.objective", value=objective, remedy=remedy, code=Code.CONFLICT
            )
        return []
    return choose_transforms(data.augment, data.task, len(data.text_columns), "data.augment", keep_label=compared)


def training_tables(
    data: Data, train: Examples, backbone: PairReader, objective: str, head: int = 0
) -> tuple[TokenTable, TokenTable | None]:
    """The training pairs as tokens, and each again if the objective asks for it: exchanged, perturbed, or as it is.

    Where it takes each pair in one order, the other order goes along as what is exchanged.
    """
    first_view, second_view = (
        partial(
            tokenize,
            columns=data.text_columns,
            backbone=backbone,
            max_length=data.max_length,
            reverse=reverse,
            head=head,
        )
        for reverse in (False, True)
    )
    chosen = choose_augmentations(data, objective)

    def looked_at(view: Callable[..., TokenTable]) -> TokenTable:
        if not chosen:
            return view(train)
        once = partial(view, cached=False)
        how = Augmentation(train, chosen, data.augment_share, data.intensity, data.split_seed, once)
        return replace(view(train), augmentation=how)

    if objective == "perturb_consistency":
        return first_view(train), looked_at(first_view)
    table = looked_at(first_view)
    if objective == "either_order":
        return replace(table, reversed_view=looked_at(second_view)), None
    if objective == "order_consistency":
        return table, looked_at(second_view)
    return table, table if objective == "dropout_consistency" else None
