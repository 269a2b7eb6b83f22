"""Initialise the head from training data: output layer, pair features, and the bias where it predicts numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.adapters.lowrank.calibration_batches import evaluation_of, explain_insufficient_data
from lora_bench.adapters.pack.attachment import output_linear
from lora_bench.head.fitting import fit_output_layer
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


@dataclass
class Fitted:
    """The outcome of `fit` for a member."""

    pair_features: bool = False
    """Their weights are part of a fitted layer."""
    notes: list[str] = field(default_factory=list)
    """For the record: why a layer starts at random although a fit was requested."""


@torch.no_grad()
def fit(pack: Pack, member: int, batches_by_task: Iterable[Iterable[Batch]]) -> Fitted:
    """Fit the output layer of each of a member's heads, pair features included, if its settings ask for it.

    `Member.fit_batches` batches of each task are read, without dropout, before the adapter changes anything. A layer
    that they cannot tell anything about starts as it would without a fit.
    """
    fitted, count = Fitted(), pack.members[member].fit_batches
    if not count:
        return fitted
    for batches in batches_by_task:
        of_head = list(islice(batches, count))
        linear = _output_linear(pack, member, of_head[0].head)
        reason = explain_insufficient_data(of_head, member, reads_labels=True)
        if linear is None:
            reason = "a text-to-text model has no output layer"
        if reason is None and linear is not None:
            pair_features = dict(pack.pair_features.items()).get(str(member))
            reason = _fit_layer(pack, member, of_head, linear, pair_features)
            fitted.pair_features |= reason is None and pair_features is not None
        if reason is not None:
            fitted.notes.append(f"head.fit_batches: {reason}, so nothing is fitted.")
    return fitted


def _output_linear(pack: Pack, member: int, head: int) -> nn.Linear | None:
    """Return the linear of a member's head that gives its logits; None if there is none."""
    outputs = pack.outputs(member, head)
    for name in pack.backbone.head_modules:
        heads: Any = pack.network.get_submodule(name)
        module = heads.of(member, head)
        name_in_module = output_linear(module, outputs)
        if name_in_module is not None:
            linear = module.get_submodule(name_in_module)
            assert isinstance(linear, nn.Linear)
            return linear
    return None


def _compute(pack: Pack, member: int, batches: Iterable[Batch]) -> Tensor:
    """Compute the member's pass over its own rows of the batches, without dropout, and return their labels: (N,).

    Hooks of the caller see what the modules compute.
    """
    labels: list[Tensor] = []
    with evaluation_of(pack, member):
        for batch in batches:
            member_batch = batch.select_members([member]).to(pack.backbone.device)
            assert member_batch.labels is not None
            pack(member_batch)
            labels.append(member_batch.labels)
    return torch.cat(labels)


def _fit_layer(pack: Pack, member: int, batches: list[Batch], linear: nn.Linear, pair_features: Any) -> str | None:
    """Fit a linear, and the weights of pair features if there are any, to batches of its task.

    Returns:
        Why it was not fitted, as a clause; else None.
    """
    inputs: list[Tensor] = []
    features: list[Tensor] = []
    handles = [linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))]
    if pair_features is not None:
        handles.append(pair_features.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0])))
    try:
        labels = _compute(pack, member, batches)
    finally:
        for handle in handles:
            handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])  # (N, D)
    if len(rows) != len(labels):
        return "the output layer reads several positions of a text"
    D, C = rows.shape[1], linear.out_features
    layer = fit_output_layer(torch.cat([rows, *([torch.cat(features)] if features else [])], 1), labels, C)
    if layer is None:
        return "the model's features do not predict the labels"
    weight, bias = layer  # (C, D + 2 H), (C,)
    linear.weight.copy_(weight[:, :D])
    if linear.bias is not None:
        linear.bias.copy_(bias)
    if pair_features is not None:
        of_pairs = weight[:, D:]
        of_pairs = (of_pairs[1] - of_pairs[0]) / 2 if C == 2 else of_pairs.view_as(pair_features.weight)
        pair_features.weight.copy_(of_pairs)
        pair_features.bias.zero_()
    return None


@torch.no_grad()
def initialise(pack: Pack, member: int, batches: Iterable[Batch]) -> str | None:
    """Initialise a member's pair features from training batches, with its adapter as it is now.

    Up to `BATCHES` batches are read, without dropout. Nothing happens if the member has no pair features. Those of
    classes of single texts, which have no cosines, start at zero: a bias fitted to a few batches would all but exclude
    the classes that they lack.

    Returns:
        A note for the record if the batches have too few pairs or one label only, so that the pair features start at
        zero; else None.
    """
    if str(member) not in pack.pair_features:
        return None
    pair_features: Any = pack.pair_features[str(member)]
    calibration_batches = list(islice(batches, BATCHES))
    if shortage := explain_insufficient_data(calibration_batches, member, reads_labels=True):
        return f"head.pair_features: {shortage}, so it starts at zero."
    if pair_features.outputs > 1 and not any(pack.backbone.text_masks(batch)[1].any() for batch in calibration_batches):
        return None
    features: list[Tensor] = []
    handle = pair_features.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with handle:
        labels = _compute(pack, member, calibration_batches)
    pair_features.initialise(torch.cat(features), labels)
    return None
