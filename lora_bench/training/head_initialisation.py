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
def initialise(pack: Pack, member: int, batches: Iterable[Batch]) -> str | None:
    """Initialise a member's pair features from training batches, with its adapter as it is now.

    Up to `BATCHES` batches are read, without dropout. Nothing happens if the member has no pair features.

    Returns:
        A note for the record if the batches have too few pairs or one label only, so that the pair features start at
        zero; else None.
    """
    if str(member) not in pack.pair_features:
        return None
    calibration_batches = list(islice(batches, BATCHES))
    if shortage := explain_insufficient_data(calibration_batches, member, reads_labels=True):
        return f"head.pair_features: {shortage}, so it starts at zero."
    matching: Any = pack.pair_features[str(member)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    handle = matching.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with handle, evaluation_of(pack, member):
        for batch in calibration_batches:
            member_batch = batch.select_members([member]).to(pack.backbone.device)
            assert member_batch.labels is not None
            pack(member_batch)
            labels.append(member_batch.labels)
    matching.initialise(torch.cat(features), torch.cat(labels))
    return None
