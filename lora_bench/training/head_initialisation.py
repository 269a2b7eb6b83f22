"""Initialise the pair features of the head from training batches."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.adapters.lowrank.calibration_batches import evaluation_of, explain_insufficient_data
from lora_bench.head.pair_features import BATCHES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch


@torch.no_grad()
def begin(pack: Pack, member: int, batches: Iterable[Batch]) -> str | None:
    """Let a member's matching start from training batches, as its adapter is now; without one nothing is done.

    Returns:
        Where the batches tell too little, why it begins at zero instead: a sentence for the record.
    """
    if str(member) not in pack.pair_features:
        return None
    look = list(islice(batches, BATCHES))
    if lacking := explain_insufficient_data(look, member, reads_labels=True):
        return f"head.pair_features: {lacking}, so their weights start at zero."
    matching: Any = pack.pair_features[str(member)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    handle = matching.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    with handle, evaluation_of(pack, member):
        for batch in look:
            own = batch.of([member]).to(pack.backbone.device)
            assert own.labels is not None
            pack(own)
            labels.append(own.labels)
    matching.initialise(torch.cat(features), torch.cat(labels))
    return None
