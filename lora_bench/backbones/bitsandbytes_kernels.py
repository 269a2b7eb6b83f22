"""Dequantise nf4 weights with the library bitsandbytes, which gives the values of `Quantized.dequantize` to the bit.

Its codes and scales are those of `quantize`, so it is chosen for a process and not for a weight. It is imported when it
is chosen.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 64
_library: Any = None
"""`bitsandbytes.functional` where it was chosen; None: torch dequantises."""
_levels: dict[torch.device, Tensor] = {}


def choose_kernels(choice: str, device: torch.device) -> None:
    """Choose what dequantises nf4 weights in this process from now on.

    Args:
        choice: `torch`, `bitsandbytes`, or `auto`, which is the second on a GPU. Without the library it is torch.
        device: of the weights.
    """
    global _library
    is_chosen = choice == "bitsandbytes" or (choice == "auto" and device.type == "cuda")
    if is_chosen and find_spec("bitsandbytes") is not None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports kernels that are not needed here
        import bitsandbytes.functional

        _library = bitsandbytes.functional
    else:
        _library = None


def can_dequantize(quant_type: str, shape: tuple[int, ...]) -> bool:
    """Return whether the library was chosen and has a compiled kernel for a weight."""
    return _library is not None and quant_type == "nf4" and shape[-1] % 2 == 0


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an nf4 weight in `dtype` from its codes (blocks, 32), uint8, and scales (blocks,)."""
    device = codes.device
    if device not in _levels:
        _levels[device] = _library.get_4bit_type("nf4", device=device)
    state = _library.QuantState(
        absmax=scales, shape=torch.Size(shape), code=_levels[device], blocksize=_BLOCK, quant_type="nf4", dtype=dtype
    )
    count = -(-torch.Size(shape).numel() // 2)  # the last block may be padded
    weight: Tensor = _library.dequantize_4bit(codes.flatten()[:count, None], state)
    return weight
