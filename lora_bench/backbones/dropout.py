"""Dropout (Srivastava et al. 2014) whose random numbers cost little on a CPU.

torch draws a random number for each element there, which takes a fifth of a step of full fine-tuning. Here a number of
64 bits serves four elements. A probability is so rounded to a multiple of 2⁻¹⁶.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STEPS = 1 << 16


def keep_mask(x: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Return an inverted-dropout mask of x's shape and type: 0 with this probability, else 1 / (1 − probability).

    Args:
        x: of any shape.
        probability: 0 ≤ p < 1.
        generator: random stream on x's device; None: torch's global one. Members of a pack have their own, so that each
            drops what a single run would drop.
    """
    keep = 1.0 - probability
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
    count = x.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    numbers = drawn.view(torch.int16)[:count].view(x.shape)  # uniform from -2¹⁵ to 2¹⁵ - 1
    return (numbers >= round(probability * _STEPS) - _STEPS // 2).to(x.dtype).mul_(1 / keep)


def drop_out(x: Tensor, probability: float) -> Tensor:
    """Return x with elements dropped out by torch's global random stream; x itself if the probability is 0."""
    return x * keep_mask(x, probability) if probability else x


class Dropout(nn.Dropout):
    """Dropout in place of a module of torch; no random numbers are drawn in evaluation mode.

    Args:
        original: the module, which `restore_dropout` puts back.
    """

    def __init__(self, original: nn.Dropout) -> None:
        super().__init__(original.p)
        self.original = (original,)  # in a tuple, so that it is not a submodule
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Return the input with elements dropped out: (…)."""
        return drop_out(input, self.p) if self.training else input


def replace_dropout(network: nn.Module) -> None:
    """Replace every `nn.Dropout` in the network, but not subclasses of other packages."""
    for parent, name, child in _children(network):
        if type(child) is nn.Dropout:
            setattr(parent, name, Dropout(child))


def restore_dropout(network: nn.Module) -> None:
    """Put the modules back that `replace_dropout` has replaced."""
    for parent, name, child in _children(network):
        if isinstance(child, Dropout):
            setattr(parent, name, child.original[0])


def _children(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
