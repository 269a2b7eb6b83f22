"""The training objective: from the logits and labels of a batch to one loss per member.

Every objective is cross-entropy on the label, or, where a number is to be predicted, the squared error.
`alternate_order` shows each pair in one order of its texts, and in the other order in the next epoch. The consistency
objectives add a second view of each pair (the reversed order of its texts, or a perturbed copy) and penalise answers
that differ between the two views (`consistency`). With dropout in the adapter, the two views also have different
dropout masks.

A loss is a mean over pairs, so neither micro-batches, nor packs, nor processes change what is learned. A loss that
compares pairs of a batch with one another (supervised contrastive learning, ranking losses) would not have this
property, so there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.config.schema import DIRECTED
from lora_bench.errors import Code, UserError
from lora_bench.head.loss import label_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.config.schema import Trainer

SINGLE_VIEW_OBJECTIVES = ("cross_entropy", "alternate_order")
"""Objectives that see each pair once in a step."""
REVERSING_OBJECTIVES = ("alternate_order", "order_consistency")
"""Objectives that also see pairs with their texts in reversed order."""


@dataclass(frozen=True)
class Objective:
    """A loss and the number of views of each pair that it is computed from."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """The mean loss (K,) over each member's pairs, from logits (K, orders · B, C) and labels (K, orders · B)."""
    orders: int
    """2 if the B rows of each member are followed by the second views of the same pairs, otherwise 1."""


def make_objective(trainer: Trainer, class_weights: Tensor | None = None) -> Objective:
    """Build the objective that `trainer.objective` names: `label_loss` for one view (null, too), else `consistency`.

    Args:
        trainer: the settings.
        class_weights: (C,) weights of the classes in the loss; None: all are 1.
    """
    loss = partial(label_loss, class_weights=class_weights)
    if trainer.objective is None or trainer.objective in SINGLE_VIEW_OBJECTIVES:
        return Objective(lambda logits, labels: loss(logits, labels).mean(1), orders=1)
    return Objective(partial(consistency, weight=trainer.consistency_weight, loss=loss), orders=2)


def balanced_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """Return weights (C,) that are inversely proportional to the sizes of the classes, with mean 1 over the examples.

    A class of n of N examples has the weight N / (k n), with k the classes that occur, as scikit-learn's `balanced`
    does. A class without examples has the weight 1.

    Args:
        labels: (N,) class numbers of the training examples.
        classes: C.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / np.maximum(counts, 1) / max(1, (counts > 0).sum())
    return torch.tensor(np.where(counts > 0, weights, 1.0), dtype=torch.float32)


def check_objective(trainer: Trainer, text_columns: Sequence[str]) -> None:
    """Refuse settings that need pairs of texts if the data has a single text column.

    Args:
        trainer: the objective, and whether both orders are scored.
        text_columns: names of the text columns, one or two.

    Raises:
        UserError: naming the setting that needs two texts.
    """
    for key, value, needs_pairs in (
        ("trainer.objective", trainer.objective, trainer.objective in REVERSING_OBJECTIVES),
        ("trainer.score_both_orders", "true", trainer.score_both_orders),
    ):
        if needs_pairs and len(text_columns) < 2:
            raise UserError(
                f"needs pairs of texts, and the data has the single text column {text_columns[0]!r}",
                key=key,
                value=value,
                code=Code.CONFLICT,
            )


def order_note(trainer: Trainer, relation: str | None) -> str | None:
    """Return a sentence on settings that reverse the order of the texts where the label depends on it; None without.

    Args:
        trainer: the objective, and whether both orders are scored.
        relation: `data.relation`; of entailment alone it is known that the order matters.
    """
    settings = [f"trainer.objective={trainer.objective}"] if trainer.objective in REVERSING_OBJECTIVES else []
    settings += ["trainer.score_both_orders=true"] if trainer.score_both_orders else []
    if relation != DIRECTED or not settings:
        return None
    verb = "reads" if len(settings) == 1 else "read"
    return f"{' and '.join(settings)} {verb} pairs in both orders, and data.relation={DIRECTED} holds in one of them."


def consistency(
    logits: Tensor, labels: Tensor, *, weight: float, loss: Callable[[Tensor, Tensor], Tensor] = label_loss
) -> Tensor:
    """Return each member's loss on both views of its pairs, plus the divergence between the two answers: (K,).

    The mean over pairs of (L(p) + L(p′)) / 2 + weight · (KL(p ‖ p′) + KL(p′ ‖ p)) / 2, with L the loss and p, p′ the
    predicted distributions of the two views. R-Drop (Liang et al. 2021, arXiv 2106.14448, section 2.1, where L is
    summed) regularises two dropout masks of the same input in this way. For numbers the divergence is that of two
    normal distributions of variance 1: half of the squared difference.

    Args:
        logits: (K, 2 · B, C); the second half of a member's rows are the second views of the first half's pairs.
        labels: (K, 2 · B).
        weight: of the divergence, in nats.
        loss: of each row.
    """
    if logits.shape[-1] == 1:
        one, other = logits[..., 0].chunk(2, dim=1)  # (K, B) each
        divergence = (one - other).square() / 2
    else:
        log_p, log_q = logits.log_softmax(-1).chunk(2, dim=1)  # (K, B, C) each
        divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2  # (K, B), the two KL terms in one
    return loss(logits, labels).mean(1) + weight * divergence.mean(1)
