"""Scores of a token table, by the members of a pack."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.data.batching import evaluation_batches, micro_batches
from lora_bench.head.loss import scores_of_logits
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.micro_batching import in_micro_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable


@torch.no_grad()
def predict(
    pack: Pack, table: TokenTable, batch_size: int, processes: Processes = SINGLE_PROCESS
) -> NDArray[np.float64]:
    """Return the scores of every row for every active member, in the table's order, not calibrated.

    Of two classes a score is P(label 1): (K, N); of C > 2 it is a probability of each: (K, N, C); in regression it is
    the predicted number: (K, N).

    A table with a `reversed_view` is scored in both orders, and the mean is returned. With several processes each
    scores a part and all get the whole. Afterwards the pack is in the mode (training or evaluation) that it was in
    before.
    """
    if table.reversed_view is not None:
        forward, reversed_view = replace(table, reversed_view=None), table.reversed_view
        return (predict(pack, forward, batch_size, processes) + predict(pack, reversed_view, batch_size, processes)) / 2
    outputs = pack.outputs(pack.active[0], table.head)
    scores = np.zeros((len(pack.active), len(table), *([outputs] if outputs > 2 else [])))
    mode = pack.training
    pack.eval()
    batches = evaluation_batches(table, batch_size, pack.backbone.tokenizer.pad_token_id)
    for rows, batch in processes.shard_batches(batches):
        logits = in_micro_batches(pack, batch, None, partial(_logits, pack, batch)).double()  # (K, B, C)
        scores[:, rows] = scores_of_logits(logits).cpu().numpy()
    pack.train(mode)
    return processes.gather(scores)


def _logits(pack: Pack, batch: Batch, pairs: int) -> Tensor:
    """Return logits (K, B, C), computed for `pairs` of the B pairs at a time."""
    return torch.cat([pack(micro.to(pack.backbone.device)) for micro in micro_batches(batch, pairs)], dim=1)
