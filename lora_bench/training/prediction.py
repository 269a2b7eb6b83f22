"""Scores of a token table, by the members of a pack."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.console.stages import stage
from lora_bench.data.batching import evaluation_batches, micro_batches
from lora_bench.head.loss import scores_of_logits
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.memory import trim_freed_memory
from lora_bench.training.micro_batching import in_micro_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.console.stages import Stage
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable


def predict(
    pack: Pack, table: TokenTable, batch_size: int | None, processes: Processes = SINGLE_PROCESS
) -> NDArray[np.float64]:
    """Return the scores of every row for every active member, in the table's order, not calibrated.

    Of two classes a score is P(label 1): (K, N); of C > 2 it is a probability of each: (K, N, C); in regression it is
    the predicted number: (K, N).

    A table with a `reversed_view` is scored in both orders, and the mean is returned. With several processes each
    scores a part and all get the whole. Afterwards the pack is in the mode (training or evaluation) that it was in
    before. A stage shows the pairs that this process has scored.
    """
    views = [view for view in (table, table.reversed_view) if view is not None]
    trim_freed_memory()  # the blocks of training's activations do not fit those of scoring
    with stage("scoring", total=sum(map(len, views)), unit="pairs") as progress:
        by_view = [_score_view(pack, view, batch_size, processes, progress) for view in views]
    return by_view[0] if len(by_view) == 1 else (by_view[0] + by_view[1]) / 2


@torch.no_grad()
def _score_view(
    pack: Pack, table: TokenTable, batch_size: int | None, processes: Processes, progress: Stage
) -> NDArray[np.float64]:
    """Return the scores of every row as the table has it, without its `reversed_view`: see `predict`."""
    outputs = pack.outputs(pack.active[0], table.head)
    scores = np.zeros((len(pack.active), len(table), *([outputs] if outputs > 2 else [])))
    mode = pack.training
    pack.eval()
    batches = evaluation_batches(table, batch_size, pack.backbone.tokenizer.pad_token_id)
    for rows, batch in batches if pack.backbone.is_sharded else processes.shard_batches(batches):
        if pack.backbone.is_sharded:
            logits, positions = in_micro_batches(pack, batch, None, partial(_logits_in_step, pack, batch, processes))
            rows = rows[positions]
        else:
            logits = in_micro_batches(pack, batch, None, partial(_logits, pack, batch))  # (K, B, C)
        scores[:, rows] = scores_of_logits(logits.double()).cpu().numpy()
        progress.advance(len(rows))
    pack.train(mode)
    return processes.gather(scores)


def _logits_in_step(pack: Pack, batch: Batch, processes: Processes, pairs: int) -> tuple[Tensor, list[int]]:
    """Return logits (K, S, C) of this process's S of the B pairs, computed in as many passes as in every process.

    Returns:
        The logits, and the positions of their pairs in the batch.
    """
    logits, positions = [], list[int]()
    for micro, of_micro in processes.equal_shares(batch, pairs):
        logits.append(pack(micro.to(pack.backbone.device))[:, : len(of_micro)])
        positions += of_micro
    return torch.cat(logits, dim=1), positions


def _logits(pack: Pack, batch: Batch, pairs: int) -> Tensor:
    """Return logits (K, B, C), computed for `pairs` of the B pairs at a time."""
    return torch.cat([pack(micro.to(pack.backbone.device)) for micro in micro_batches(batch, pairs)], dim=1)
