"""Initialise the head from training data: the pair features, and the bias of a head that predicts numbers."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.adapters.lowrank.calibration_batches import evaluation_of, explain_insufficient_data
from lora_bench.adapters.pack.attachment import output_linear
from lora_bench.head.pair_features import BATCHES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch
    from lora_bench.training.task_mixture import TaskData


@torch.no_grad()
def centre_numbers(pack: Pack, member: int, tasks: Iterable[TaskData]) -> None:
    """Set the bias of each head that predicts a number to the mean label of its training examples.

    It is the constant with the smallest squared error, so that no steps are spent on it. Heads of classes, and members
    with pair features, whose own initialisation has the mean, are left as they are.
    """
    if str(member) in pack.pair_features:
        return
    for task in tasks:
        labels = task.train.labels
        if pack.outputs(member, task.train.head) != 1 or labels is None:
            continue
        for name in pack.backbone.head_modules:
            heads: Any = pack.network.get_submodule(name)
            module = heads.of(member, task.train.head)
            linear = output_linear(module, 1)
            bias = None if linear is None else module.get_submodule(linear).bias
            if bias is not None:
                bias.fill_(float(labels.mean()))


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
