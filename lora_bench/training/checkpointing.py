"""Decide whether activations are held or recomputed: `trainer.activation_checkpointing`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.training.dummy_step import saved_bytes
from lora_bench.training.memory import TRANSIENT, free_bytes
from lora_bench.training.micro_batching import is_out_of_memory

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Trainer

PROBE_TOKENS = 16
SHARE_OF_FREE = 0.8
"""Share of the free memory that a step's activations may take; the rest is for the optimizer and for evaluation."""


def set_checkpointing(pack: Pack, trainer: Trainer, longest: int, orders: int) -> None:
    """Let the pack recompute activations if `trainer.activation_checkpointing` is true, or is `auto` and they must be.

    They must be if the backbone is sharded, because each process has its own free memory and all must decide alike, or
    if one forward pass does not fit into the free memory of the device otherwise. Without a
    `trainer.micro_batch_size` that is a pass of a single pair: smaller micro-batches save memory and cost no
    arithmetic, so they come first.

    Args:
        pack: prepared.
        trainer: the setting, and the micro-batch size.
        longest: tokens of the longest training pair.
        orders: views of each pair in a step.
    """
    setting = trainer.activation_checkpointing
    pack.checkpoint_activations(False)
    if setting == "auto":
        setting = pack.backbone.is_sharded or not _activations_fit(pack, trainer, longest, orders)
    pack.checkpoint_activations(bool(setting))


def _activations_fit(pack: Pack, trainer: Trainer, longest: int, orders: int) -> bool:
    """Return whether the activations of one forward pass fit; False also if not even a short pass does."""
    room = SHARE_OF_FREE * free_bytes(pack.backbone.device)
    try:
        return _activation_bytes(pack, trainer, longest, orders, room) <= room
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False


def _activation_bytes(pack: Pack, trainer: Trainer, longest: int, orders: int, room: float) -> float:
    """Estimate the peak memory of the activations of one forward pass of the longest pairs.

    A bound that grows with the square of the length costs one short pass. Only if it is above `room` bytes, a
    polynomial in the length is fitted: attention grows with its square, the rest linearly.
    """
    pairs = min(trainer.batch_size, trainer.micro_batch_size or 1)
    rows = orders * pairs * min(pack.size, pack.group_size)
    probe = min(PROBE_TOKENS, longest)
    one = saved_bytes(pack, 1, probe)
    bound = TRANSIENT * rows * one * (longest / probe) ** 2
    if bound <= room or longest < 4 * probe:
        return bound
    two, three = saved_bytes(pack, 1, 2 * probe), saved_bytes(pack, 1, 3 * probe)
    square = (three - 2 * two + one) / 2
    linear = two - one - 3 * square
    x = longest / probe
    return TRANSIENT * rows * (square * x * x + linear * x + one - square - linear)
