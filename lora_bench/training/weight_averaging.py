"""Weight averaging: at every evaluation a member is scored, and its state kept, with the mean of its latest weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn


class WeightAverage:
    """The running mean, in fp32, of one member's trained tensors over about the latest share of its steps so far.

    Polynomial-decay averaging (Shamir and Zhang 2013, arXiv 1212.1824, section 4): with w̄_t after t steps,

        w̄_t = (1 − c) w̄_{t−1} + c w_t,    c = (η + 1) / (t + η),    η = 2 / share − 2

    The plain mean of the last `share` of t steps has the same mean age of weights, but its sum would have to start at
    a step that depends on t; this mean is available at any time. A share of 1 weighs all steps equally (Izmailov et al.
    2018, arXiv 1803.05407, algorithm 1, over steps). Each tensor is averaged by itself, as there. If a method's update
    is a product of tensors (LoRA's B A), the product of the means is not the mean of the products.

    Args:
        parameters: the tensors.
        share: from 0 (no averaging) to 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], share: float = 1.0) -> None:
        self.parameters = list(parameters)
        self.share = share
        self.means: dict[nn.Parameter, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the mean; with a share of 0, do nothing."""
        if not self.share:
            return
        if not self.steps:
            self.means = {p: torch.zeros_like(p, dtype=torch.float32) for p in self.parameters}
        self.steps += 1
        eta = 2 / self.share - 2
        weight = (eta + 1) / (self.steps + eta)
        for p, mean in self.means.items():
            mean.lerp_(p.float(), weight)


@contextmanager
@torch.no_grad()
def averaged_weights(averages: Iterable[WeightAverage]) -> Iterator[None]:
    """Put the means, if any, into the parameters within the context; afterwards their own values, bit for bit."""
    swaps = [(p, mean, p.clone()) for average in averages for p, mean in average.means.items()]
    for p, mean, _ in swaps:
        p.copy_(mean)
    try:
        yield
    finally:
        for p, _, raw in swaps:
            p.copy_(raw)
