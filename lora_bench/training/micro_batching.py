"""Portions: how many pairs go through the network at a time, and half as many whenever memory is short.

A step that found too little memory is done again from where it began: gradients cleared, random streams put back. Its
portions are smaller and its batch is the same, so what follows is what a run with that micro-batch would do.
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

QUICK_TOKENS = 2048
"""So many tokens a CPU takes at a time where nothing else is asked for: what a layer makes of them stays in its cache,
and long pairs need no more memory than short ones."""

_SHORT = ("not enough memory", "can't allocate memory")
"""What torch's allocator for the CPU says, on Windows and elsewhere."""


def in_portions(pack: Pack, batch: Batch, asked: int | None, work: Callable[[int], T]) -> T:
    """The result of `work(pairs)`, with as many pairs per forward pass as memory has room for.

    Args:
        pack: remembers, in `room`, how many pairs fit where fewer did than were asked for.
        batch: what is worked on.
        asked: pairs of each member per forward pass; None: as many as are quick.
        work: goes through the batch in portions of so many pairs per member.

    Raises:
        RunFailedError: not even one pair fits.
    """
    kind = "training" if torch.is_grad_enabled() else "evaluation"
    if asked is None and pack.backbone.device.type == "cpu":
        rows_of_a_pair = batch.orders * (pack.size if pack.batched else 1)  # else members pass one after another
        asked = max(1, QUICK_TOKENS // (rows_of_a_pair * batch.input_ids.shape[1]))
    began = [(stream, stream.get_state()) for stream in _streams(pack)]
    while True:
        pairs = min(limit for limit in (batch.pairs, asked, pack.max_micro_batch.get(kind)) if limit is not None)
        try:
            return work(pairs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error held the frames, and these the activations.
        if pairs == 1:
            remedy = "Take trainer.precision=bf16, a smaller data.max_length or model, or a device with more memory."
            raise RunFailedError(
                f"memory does not suffice for the {kind} of a single pair", remedy=remedy, code=Code.OUT_OF_MEMORY
            )
        pack.max_micro_batch[kind] = -(-pairs // 2)
        for p in pack.parameters():
            p.grad = None
        for stream, state in began:
            stream.set_state(state)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of the machine, was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def _streams(pack: Pack) -> list[torch.Generator]:
    """What a forward pass draws from: torch's own streams (full fine-tuning) and the members' dropout."""
    device: torch.device = pack.backbone.device
    own: list[torch.Generator] = [torch.default_generator]
    if device.type == "cuda":
        own.append(torch.cuda.default_generators[device.index or 0])
    return [*own, *pack.dropout]
