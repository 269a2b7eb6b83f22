"""What a step minimises: from the logits and labels of a batch to one loss per member.

The label of a pair does not depend on which of its texts comes first. `order_consistency` shows a member each pair in
both orders and asks for the same answer; `perturb_consistency` does so with each pair as it is and perturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F

from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lora_bench.config import Trainer


@dataclass(frozen=True)
class Objective:
    """A loss, and the rows that it is computed from."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """Each member's mean over the pairs, (K,), from logits (K, orders · B, 2) and labels (K, orders · B)."""
    orders: int
    """2 where each member's B rows are followed by the same pairs exchanged, or perturbed; otherwise 1."""


def make_objective(trainer: Trainer) -> Objective:
    """The objective that the settings name."""
    consistency = partial(order_consistency, weight=trainer.consistency_weight)
    objectives = {
        "cross_entropy": Objective(cross_entropy, orders=1),
        "order_consistency": Objective(consistency, orders=2),
        "perturb_consistency": Objective(consistency, orders=2),
    }
    return objectives[trainer.objective]


def check_columns(trainer: Trainer, text_columns: Sequence[str]) -> None:
    """Refuse an objective that asks for both orders of texts that come alone."""
    if trainer.objective == "order_consistency" and len(text_columns) < 2:
        raise UserError(
            f"needs pairs, and the data has the single text column {text_columns[0]!r}",
            key="trainer.objective",
            value=trainer.objective,
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log p(label) over each member's rows, in nats: (K,) from logits (K, N, 2) and labels (K, N)."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")  # (K·N,)
    return losses.view(len(logits), -1).mean(1)


def order_consistency(logits: Tensor, labels: Tensor, *, weight: float) -> Tensor:
    """Cross-entropy of both orders, and how far the answers p to a pair and p′ to the exchanged pair differ.

    The mean over pairs of (CE(p) + CE(p′)) / 2 + weight · (KL(p ‖ p′) + KL(p′ ‖ p)) / 2. R-Drop (Liang et al. 2021,
    arXiv 2106.14448, section 2.1, where CE is summed) brings the answers under two dropout masks together in this way.

    Args:
        logits: (K, 2 · B, 2), the second half of a member's rows the exchanged pairs of the first.
        labels: (K, 2 · B).
        weight: of the divergence, in nats.
    """
    log_p, log_q = logits.log_softmax(-1).chunk(2, dim=1)  # (K, B, 2) each
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2  # (K, B), the two KL terms in one
    return cross_entropy(logits, labels) + weight * divergence.mean(1)
