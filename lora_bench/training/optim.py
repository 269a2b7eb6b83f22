"""AdamW with warm-up: one optimizer per member, so that each steps, decays and stops as in a single run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Optimizer


def make_optimizer(settings: Optimizer, pack: Pack, member: int) -> torch.optim.AdamW:
    """Build AdamW over a member's adapter, in the parameter groups of its method, and over its heads.

    Biases and norms of the head have no weight decay. The weight of its pair features has, though it is a vector where
    there are less than three classes. Each group's peak learning rate is in `peak_lr`.
    """
    groups = pack.members[member].adapter.param_groups(
        pack.adapter_parameters(member), settings.lr, settings.weight_decay
    )
    pair_features = dict(pack.pair_features.items()).get(str(member))
    for p in pack.head_parameters(member).values():
        is_weight = p.ndim > 1 or (pair_features is not None and p is pair_features.weight)
        groups.append({"params": [p], "lr": settings.lr, "weight_decay": settings.weight_decay if is_weight else 0.0})
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Optimizer, step: int, steps: int) -> None:
    """Set the learning rate of every parameter group for update number `step` (from 1) of `steps`."""
    factor = learning_rate_factor(settings, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rate_factor(settings: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate of update `step` (from 1) of `steps`, as a share of the peak.

    It rises linearly over the first `warmup * steps` updates (rounded up), and then follows `schedule`: `constant`, or
    a `linear` or cosine decay that would reach 0 one update after the last.
    """
    warmup = math.ceil(settings.warmup * steps)
    if step <= warmup:
        return step / warmup
    if settings.schedule == "constant":
        return 1.0
    remaining = (steps - step + 1) / (steps - warmup + 1)  # 1 is the peak, 0 would be the step after the last
    return remaining if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * remaining))
