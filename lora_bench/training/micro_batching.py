"""Micro-batches: the pairs per forward pass, halved whenever memory does not suffice.

A step that ran out of memory is repeated from its start: gradients are cleared and random streams restored. Its batch
is the same and its micro-batches are smaller, so the run continues as one with that micro-batch size would.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, TypeVar

import torch

from lora_bench.errors import Code, RunFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch

T = TypeVar("T")

QUICK_TOKENS = {"training": 2048, "evaluation": 4096}
"""Tokens of each member per forward pass on a CPU if no micro-batch size is set: a layer's output then stays in the
CPU's cache, and long pairs need no more memory than short ones. An evaluation holds no activations for a backward
pass."""

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")
"""Messages of torch's CPU allocator, on Windows and on other systems."""


def in_micro_batches(pack: Pack, batch: Batch, requested: int | None, work: Callable[[int], T]) -> T:
    """Return the result of `work(pairs)`, with as many pairs per forward pass as memory allows.

    When memory does not suffice, all gradients are cleared, random streams restored, and `work` runs again with half
    the pairs. Other errors pass.

    Args:
        pack: remembers in `max_micro_batch` the pairs that fit, if fewer than requested did; training and evaluation
            (without gradients) have limits of their own, which later calls keep to.
        batch: the batch to work on.
        requested: pairs of each member per forward pass; None: all, on a CPU as many as `QUICK_TOKENS` hold.
        work: processes the batch in micro-batches of the given number of pairs per member.

    Raises:
        RunFailedError: not even one pair fits.
    """
    phase = "training" if torch.is_grad_enabled() else "evaluation"
    if requested is None and pack.backbone.device.type == "cpu":
        requested = max(1, QUICK_TOKENS[phase] // (batch.orders * batch.input_ids.shape[1]))
    states = [(stream, stream.get_state()) for stream in _streams(pack)]
    while True:
        pairs = min(limit for limit in (batch.pairs, requested, pack.max_micro_batch.get(phase)) if limit is not None)
        try:
            return work(pairs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error held the stack frames, and these held the activations.
        if pack.backbone.is_sharded:
            key = "trainer.micro_batch_size" if phase == "training" else "trainer.eval_batch_size"
            raise RunFailedError(
                f"memory does not suffice for the {phase} of {pairs} pairs, and a process with sharded weights cannot "
                "repeat a pass without the others",
                remedy=f"Set {key} to a smaller number.",
                code=Code.OUT_OF_MEMORY,
            )
        if pairs == 1:
            holds_activations = phase == "training" and not pack.recomputes_activations
            first = "trainer.activation_checkpointing=true, " if holds_activations else ""
            remedy = (
                f"Use {first}trainer.precision=bf16, a smaller data.max_length or model, or a device with more memory."
            )
            raise RunFailedError(
                f"memory does not suffice for the {phase} of a single pair", remedy=remedy, code=Code.OUT_OF_MEMORY
            )
        pack.max_micro_batch[phase] = -(-pairs // 2)
        for p in pack.parameters():
            p.grad = None
        for stream, state in states:
            stream.set_state(state)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the device or of the machine did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _streams(pack: Pack) -> list[torch.Generator]:
    """Return the random streams of a forward pass: torch's global ones (full fine-tuning) and the members' dropout."""
    device: torch.device = pack.backbone.device
    streams: list[torch.Generator] = [torch.default_generator]
    if device.type == "cuda":
        streams.append(torch.cuda.default_generators[device.index or 0])
    return [*streams, *pack.dropout]
