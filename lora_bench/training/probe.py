"""A step of made-up tokens: what it computes, and what it keeps for its backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_bench.data.batching import Batch

if TYPE_CHECKING:
    from lora_bench.adapters.pack import Pack


def probe_step(pack: Pack, rows: int, length: int) -> None:
    """Forward and backward of made-up tokens; leaves weights, gradients and random streams as they were."""
    ids = torch.ones(rows, length, dtype=torch.long, device=pack.backbone.device)
    backbone = pack.backbone
    hidden = None  # what is kept is read, at no arithmetic
    if pack.cut is not None:
        hidden = torch.zeros(rows, length, backbone.hidden_size, dtype=backbone.compute_dtype, device=backbone.device)
    batch = Batch(ids, torch.ones_like(ids), None, torch.zeros_like(ids[:, 0]), full=True, hidden=hidden)
    pack.eval()  # no dropout: it would draw from the members' streams
    logits = pack(batch)
    assert batch.labels is not None
    F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(len(pack.live))).backward()  # type: ignore[no-untyped-call]
    for p in pack.parameters():
        p.grad = None


def saved_bytes(pack: Pack, rows: int, length: int) -> int:
    """Bytes that a step of made-up tokens keeps for its backward pass, besides the weights."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        probe_step(pack, rows, length)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*pack.parameters(), *pack.buffers()]}
    return sum(size for pointer, size in kept.items() if pointer not in weights)
