"""A check before training that a pair's score does not depend on the other pairs of its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from lora_bench.backbones.identity import PAIRS
from lora_bench.backbones.tokenizer import first_line
from lora_bench.data.batching import Batch
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.backbones.base import Backbone

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference, relative to the largest logit, that counts as rounding in weights of this type."""


def check_padding(backbone: Backbone) -> None:
    """Score a short pair by itself and in a batch with a long one; add a note to the backbone if the scores differ.

    The backbone's head scores them, so no adapter may be attached.

    Raises:
        UserError: the network cannot score a padded batch.
    """
    rows, network = _rows(backbone), cast("Any", backbone.network)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone = _logits(backbone, _batch(rows[:1], backbone.tokenizer.pad_token_id))
            padded = _logits(backbone, _batch(rows, backbone.tokenizer.pad_token_id))[:1]
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot score two pairs of different lengths in one batch ({first_line(error)})",
            file=network.config._name_or_path or None,
            remedy="Check that its config.json and its tokenizer belong together.",
            code=Code.UNSUPPORTED,
        ) from None
    difference = float((alone - padded).abs().max())
    if difference <= TOLERANCES[alone.dtype] * max(1.0, float(alone.abs().max())):
        return
    backbone.notes.append(
        f"{type(network).__name__} scores a pair differently in a batch of longer ones (logits of a test pair "
        f"differ by {difference:.2g}), also in transformers; trainer.eval_batch_size=1 avoids it."
    )


def _rows(backbone: Backbone) -> list[list[int]]:
    """Return the token ids of a short and a long pair, at most 64 each, as the backbone reads them.

    Truncation and padding of its tokenizer are turned off.
    """
    short, long = ("Is it?", "Yes?"), (" ".join(PAIRS[0]), " ".join(PAIRS[1]))
    first, second = backbone.render([("first", [short[0], long[0]]), ("second", [short[1], long[1]])])
    backend = backbone.tokenizer.backend_tokenizer
    backbone.special_tokens.configure(backend)
    limit = backbone.max_tokens or 64
    backend.enable_truncation(min(limit, 64) if limit > 8 else 64, strategy="longest_first")  # -1 for XLNet
    encoded = backend.encode_batch_fast(first if second is None else list(zip(first, second, strict=True)))
    backend.no_truncation()
    return [encoding.ids for encoding in encoded]


def _batch(rows: list[list[int]], pad_id: int) -> Batch:
    """Return rows of token ids as a batch, padded on the right to the longest."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch(ids, mask, None, None, full=bool(mask.all()))


def _logits(backbone: Backbone, batch: Batch) -> Tensor:
    """Return the logits (B, 2) of a batch without any adapter."""
    return backbone.suffix(backbone.prefix(batch, 0), batch, 0)
