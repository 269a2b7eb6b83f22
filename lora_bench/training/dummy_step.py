"""A training step on a dummy pair, to measure its FLOPs and the memory of its backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.backbones.attention import KEPT_LENGTH, counting_recomputation
from lora_bench.data.batching import Batch
from lora_bench.evaluation.cost import FlopModel
from lora_bench.head.loss import label_loss

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, forward and backward, as a function of rows and tokens."""

    step: FlopModel
    recomputation: FlopModel
    """FLOPs that a batch of more than `KEPT_LENGTH` tokens adds: its attention is computed again."""

    @classmethod
    def measure(cls, pack: Pack) -> StepFlops:
        """Measure the steps of the pack's active members, with the effects of `dummy_step`."""
        recomputations: list[int] = []

        def call(rows: int, length: int) -> None:
            with counting_recomputation() as flops:
                dummy_step(pack, rows, length)
            recomputations.append(sum(flops))

        step = FlopModel.measure(call)
        config: Any = pack.network.config
        drops_out = pack.trains_backbone and getattr(config, "attention_probs_dropout_prob", 0.0) > 0
        # Dropout, which a dummy step leaves out, needs the probabilities: then they are saved whatever the length.
        return cls(step, FlopModel.fit([0] * len(recomputations) if drops_out else recomputations))

    def __call__(self, rows: int, length: int) -> float:
        """Return the FLOPs of a step on `rows` rows of `length` tokens."""
        return self.step(rows, length) + (self.recomputation(rows, length) if length > KEPT_LENGTH else 0.0)


def dummy_step(pack: Pack, rows: int, length: int) -> None:
    """Run forward and backward on copies of a dummy pair; weights and random streams stay as they are.

    Gradients are cleared, and the pack is left in evaluation mode.

    Args:
        pack: its active members compute.
        rows: copies of the pair.
        length: tokens of the pair.
    """
    backbone = pack.backbone
    batch = probe_batch(backbone, rows, length)
    hidden = None
    if pack.prefix_depth is not None:  # reading the cached prefix takes no arithmetic
        hidden = torch.zeros(rows, length, backbone.hidden_size, dtype=backbone.compute_dtype, device=backbone.device)
    batch = replace(batch, hidden=hidden)
    pack.eval()  # no dropout: it would draw from the members' streams
    logits = pack(batch)
    assert batch.labels is not None
    label_loss(logits, batch.labels.expand(len(pack.active), -1)).mean().backward()  # type: ignore[no-untyped-call]
    for p in pack.parameters():
        p.grad = None


def probe_batch(backbone: Backbone, rows: int, length: int) -> Batch:
    """Return `rows` copies of a dummy pair of `length` tokens with label 0, on the backbone's device."""
    ids, types = (row.expand(rows, -1).contiguous().to(backbone.device) for row in backbone.probe_row(length))
    text_ids = torch.where(torch.arange(length, device=ids.device) < length // 2, 1, 2).expand(rows, -1)
    return Batch(ids, torch.ones_like(ids), types, torch.zeros_like(ids[:, 0]), full=True, text_ids=text_ids)


def saved_bytes(pack: Pack, rows: int, length: int) -> int:
    """Return the bytes that a dummy step saves for its backward pass, without the weights.

    The step has the effects of `dummy_step`.
    """
    bytes_by_pointer: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        for dense in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = dense.untyped_storage()
            bytes_by_pointer[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        dummy_step(pack, rows, length)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*pack.parameters(), *pack.buffers()]}
    return sum(size for pointer, size in bytes_by_pointer.items() if pointer not in weights)
