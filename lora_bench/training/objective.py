"""What a step minimises: from the logits and labels of a batch to one loss per member.

The likelihood of a pair's label can be asked for with a margin, smoothed, focused on hard pairs, or with the labels
counted alike (`likelihood`), and a pair shown in one order of its texts, in the next epoch in the other. Or a second
look at the pair can be asked to give the same answer (`consistency`): with its texts exchanged, as the label does not
depend on which comes first; perturbed; or under other dropout. With dropout in the adapter the first two look through
another mask as well.

All of it is a sum over pairs, so that neither portions, nor packs, nor processes change what is learned. What compares
pairs of a batch with one another (a supervised contrastive term, a loss of ranks) is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.config.schema import Trainer

    Likelihood = Callable[[Tensor, Tensor], Tensor]


ONCE = ("cross_entropy", "either_order")
"""Objectives that look at each pair once in a step."""


@dataclass(frozen=True)
class Objective:
    """A loss, and the rows that it is computed from."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """Each member's mean over the pairs, (K,), from logits (K, orders · B, 2) and labels (K, orders · B)."""
    orders: int
    """2 where each member's B rows are followed by the same pairs exchanged, perturbed, or once more; otherwise 1."""


def make_objective(trainer: Trainer, labels: NDArray[np.int64] | None) -> Objective:
    """The objective that the settings name, for training pairs of these labels."""
    of_rows = partial(
        likelihood,
        label_smoothing=trainer.label_smoothing,
        focal_gamma=trainer.focal_gamma,
        margin=trainer.margin,
        shift=trainer.logit_adjustment * log_odds(labels) if trainer.logit_adjustment and labels is not None else 0.0,
    )
    if trainer.objective in ONCE:
        return Objective(lambda logits, labels: of_rows(logits, labels).mean(1), orders=1)
    return Objective(partial(consistency, weight=trainer.consistency_weight, of_rows=of_rows), orders=2)


def check_objective(trainer: Trainer, text_columns: Sequence[str], drops_out: bool, pair_features: bool) -> None:
    """Refuse to ask for two texts where they come alone, or for two dropout masks where nothing drops out."""
    for key, value, asked in (
        ("trainer.objective", trainer.objective, trainer.objective in ("either_order", "order_consistency")),
        ("trainer.score_both_orders", "true", trainer.score_both_orders),
        ("head.pair_features", "true", pair_features),
    ):
        if asked and len(text_columns) < 2:
            raise UserError(
                f"needs pairs, and the data has the single text column {text_columns[0]!r}",
                key=key,
                value=value,
                code=Code.CONFLICT,
            )
    if trainer.objective == "dropout_consistency" and not drops_out:
        raise UserError(
            "needs dropout: without it both looks at a pair are the same",
            key="trainer.objective",
            value=trainer.objective,
            remedy="Give adapter.dropout a value above 0.",
            code=Code.CONFLICT,
        )


def likelihood(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    margin: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    """What each row costs, in nats: −log p(label) with the settings at 0; (K, N) from logits (K, N, 2), labels (K, N).

    Of two labels only the difference of logits z₁ − z₀ counts: u = ±(z₁ − z₀ + shift) − margin, with + for label 1.
    The row costs −(1 − ε / 2) log σ(u) − (ε / 2) log σ(−u), times σ(−u)^γ.

    Args:
        label_smoothing: ε, the share of the label that is spread evenly over both (Szegedy et al. 2016).
        focal_gamma: γ; rows that are answered surely and rightly count less (Lin et al. 2017, eq. 4).
        margin: by how much the label's logit must be ahead (Cao et al. 2019, eq. 12, with one margin for both labels).
        shift: added to the logit of label 1 while training: τ log(π₁ / π₀); with τ = 1 the plain logits, which scores
            are made of, come to be those of two equally frequent labels (Menon et al. 2021, eq. 10).
    """
    signs = 2.0 * labels - 1.0
    u = signs * (logits[..., 1] - logits[..., 0] + shift) - margin  # (K, N)
    right, wrong = F.logsigmoid(u), F.logsigmoid(-u)
    losses = -(1 - label_smoothing / 2) * right
    if label_smoothing:
        losses = losses - label_smoothing / 2 * wrong
    return losses * (focal_gamma * wrong).exp() if focal_gamma else losses


def consistency(logits: Tensor, labels: Tensor, *, weight: float, of_rows: Likelihood = likelihood) -> Tensor:
    """The likelihood of both looks at each pair, and how far the answers p to the one and p′ to the other differ.

    The mean over pairs of (L(p) + L(p′)) / 2 + weight · (KL(p ‖ p′) + KL(p′ ‖ p)) / 2. R-Drop (Liang et al. 2021,
    arXiv 2106.14448, section 2.1, where L is cross-entropy and summed) brings the answers under two dropout masks
    together in this way.

    Args:
        logits: (K, 2 · B, 2), the second half of a member's rows the second looks at the pairs of the first.
        labels: (K, 2 · B).
        weight: of the divergence, in nats.
        of_rows: L, (K, N) from logits and labels of N rows.
    """
    log_p, log_q = logits.log_softmax(-1).chunk(2, dim=1)  # (K, B, 2) each
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2  # (K, B), the two KL terms in one
    return of_rows(logits, labels).mean(1) + weight * divergence.mean(1)


def log_odds(labels: NDArray[np.int64]) -> float:
    """log(π₁ / π₀), each label counted once more than it is there (Laplace): finite where one is missing."""
    ones = int(labels.sum())
    return math.log((ones + 1) / (len(labels) - ones + 1))
