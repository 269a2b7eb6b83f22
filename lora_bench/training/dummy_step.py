"""A step on a made-up pair: what it computes, and what it keeps for its backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_bench.data.batching import Batch

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.base import Backbone


def probe_step(pack: Pack, rows: int, length: int) -> None:
    """Run forward and backward on a made-up pair; leave weights, gradients and random streams as they were."""
    backbone = pack.backbone
    batch = probe_batch(backbone, rows, length)
    hidden = None  # what is kept is read, at no arithmetic
    if pack.prefix_depth is not None:
        hidden = torch.zeros(rows, length, backbone.hidden_size, dtype=backbone.compute_dtype, device=backbone.device)
    batch = replace(batch, hidden=hidden)
    pack.eval()  # no dropout: it would draw from the members' streams
    logits = pack(batch)
    assert batch.labels is not None
    F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(len(pack.active))).backward()  # type: ignore[no-untyped-call]
    for p in pack.parameters():
        p.grad = None


def probe_batch(backbone: Backbone, rows: int, length: int) -> Batch:
    """Return `rows` copies of a made-up pair of `length` tokens, of label 0, on the backbone's device."""
    ids, types = (row.expand(rows, -1).contiguous().to(backbone.device) for row in backbone.probe_row(length))
    return Batch(ids, torch.ones_like(ids), types, torch.zeros_like(ids[:, 0]), full=True)


def saved_bytes(pack: Pack, rows: int, length: int) -> int:
    """Return the bytes that such a step keeps for its backward pass, besides the weights."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        probe_step(pack, rows, length)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*pack.parameters(), *pack.buffers()]}
    return sum(size for pointer, size in kept.items() if pointer not in weights)
