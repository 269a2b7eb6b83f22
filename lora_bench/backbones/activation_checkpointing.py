"""Activation checkpointing: a layer's activations are not held, but computed again in the backward pass.

Only the inputs of the layers are held, and the activations of one layer at a time (Chen et al. 2016, arXiv 1604.06174).
The forward pass of every layer is computed twice, which adds about a third to the arithmetic of full fine-tuning, and
half to that of an adapter. Gradients are equal to the last bit on a CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

T = TypeVar("T")


class ActivationCheckpointing:
    """Wraps layers so that their activations are computed again in the backward pass.

    Args:
        capture: called before a layer is first computed; returns the context of the second computation, which restores
            whatever the layer depends on besides its inputs and torch's global random streams.
    """

    def __init__(self, capture: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.capture = capture

    def wrap(self, layer: Callable[..., T]) -> Callable[..., T]:
        """Return the layer's function, recomputed in the backward pass; without gradients it is just called."""

        @wraps(layer)
        def call(*arguments: Any, **keywords: Any) -> T:
            if not torch.is_grad_enabled():
                return layer(*arguments, **keywords)
            return checkpoint(  # type: ignore[no-any-return]
                layer, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), self.capture()), **keywords
            )

        return call
