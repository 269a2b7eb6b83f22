"""The machine of a measurement: processor, instructions for bf16, and the speed of plain matrix products."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = ((384, 384), (384, 1536), (1536, 384))
"""(in, out) of MiniLM's linears."""
ROWS = 1024


def describe_machine() -> str:
    """Return a line with processor, threads, instructions and the measured peaks of products in fp32 and bf16."""
    import torch

    from lora_bench.records import environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = [
        f"{name} {measure_gemm(dtype, device) / 1e9:,.0f}"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else environment.describe()["cpu"]
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads, {bf16_instructions()}"
    return f"{name}{threads}, torch {torch.__version__}; matrix products in GFLOP/s: {', '.join(peaks)}"


def bf16_instructions() -> str:
    """Return the fastest instructions that the processor has for products in bf16; empty where Linux does not say."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in known.items() if flag in flags), "")


def measure_gemm(dtype: Any, device: Any) -> float:
    """Return the FLOPs per second of matrix products at MiniLM's shapes: the median of the fastest shape."""
    import torch

    rates = []
    for inputs, outputs in SHAPES:
        x, weight = (torch.randn(rows, inputs, device=device, dtype=dtype) for rows in (ROWS, outputs))
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            x @ weight.T
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rates.append(2 * ROWS * inputs * outputs / median(seconds))
    return max(rates)
