"""Resolution of `trainer.device` and `trainer.precision`: `auto` is bf16 only if the device computes it fast."""

from __future__ import annotations

import functools
import math
import time

import torch

from lora_bench.config.launch import Launch
from lora_bench.errors import Code, UserError

MINIMAL_BF16_SPEED = 1.25
"""`auto` takes bf16 on a CPU without AMX from this speed on, in multiples of fp32's: less is not worth its digits."""


def resolve_device(device: str) -> torch.device:
    """Return the device that `cpu`, `cuda` or `auto` (a GPU if there is one) names.

    Each process of `torchrun` gets a GPU of its own.

    Raises:
        UserError: CUDA is requested and not available, or `LOCAL_RANK` is not set or names no existing GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is usable on this machine",
            key="trainer.device",
            value=device,
            remedy="Use trainer.device=auto or cpu.",
            code=Code.NO_DEVICE,
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and (launch := Launch.read()).world_size > 1:  # torchrun: each process has a GPU of its own
        count = torch.cuda.device_count()
        if launch.local_rank is None or launch.local_rank >= count:
            reason = "is not set" if launch.local_rank is None else f"has no GPU: this machine has {count}"
            remedy = "Start as many processes as there are GPUs with torchrun, or use trainer.device=cpu."
            code = Code.MISSING if launch.local_rank is None else Code.NO_DEVICE
            raise UserError(reason, key="LOCAL_RANK", value=launch.local_rank, remedy=remedy, code=code)
        return torch.device("cuda", launch.local_rank)
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products that `fp32`, `bf16` or `auto` names on this device.

    `auto` is bf16 where `has_fast_bf16`, else fp32. A CPU takes `bf16` even if it is slow.

    Raises:
        UserError: bf16 is requested on a CUDA device that does not support it.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" and _is_lacking_bf16(device):
        raise UserError(
            "this GPU does not support bf16",
            key="trainer.precision",
            value=precision,
            remedy="Use trainer.precision=fp32.",
            code=Code.NO_DEVICE,
        )
    if precision == "auto" and not has_fast_bf16(device):
        return torch.float32
    return torch.bfloat16


def continued_precision(precision: str, before: str | None, device: torch.device) -> str:
    """Return the `trainer.precision` of a run that is resumed: `auto` stays what it was where the run began.

    Args:
        precision: `fp32`, `bf16` or `auto`, as requested.
        before: the dtype of its products so far, `float32` or `bfloat16`; None in an older record.
        device: on which it is resumed. If that has no bf16, `auto` stays `auto`.
    """
    if precision != "auto" or before not in ("float32", "bfloat16") or _is_lacking_bf16(device):
        return precision
    if str(resolve_precision("auto", device)) == f"torch.{before}":
        return "auto"
    return "fp32" if before == "float32" else "bf16"


def _is_lacking_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies matrices faster in bf16 than in fp32.

    A GPU from Ampere on and a CPU with AMX do. A CPU with other instructions for bf16 is measured once per process, in
    about 0.1 s: with AVX512-BF16 alone, an AMD EPYC takes less than half of the time of fp32, an Intel Xeon 1.6 times
    as long.
    """
    if device.type == "cuda":
        return not _is_lacking_bf16(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("amx_bf16", "amx_tile")):
        return True
    return any(capabilities.get(name) for name in ("avx512_bf16", "bf16")) and cpu_bf16_speed() > MINIMAL_BF16_SPEED


@functools.cache
def cpu_bf16_speed() -> float:
    """Return how many times as fast as in fp32 the CPU multiplies matrices in bf16.

    The fastest of ten products each, which take turns, in the thread's own time: other processes hardly disturb it.
    """
    fastest = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    factors = {dtype: (torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)) for dtype in fastest}
    for _ in range(10):
        for dtype, (rows, weight) in factors.items():
            start = time.thread_time()
            torch.nn.functional.linear(rows, weight)
            fastest[dtype] = min(fastest[dtype], time.thread_time() - start)
    return fastest[torch.float32] / fastest[torch.bfloat16]
