"""A cache of the FLOPs of training steps, for tests that train hundreds of tiny runs of the same few shapes.

A run counts the FLOPs of four dummy steps, in which torch's counter follows every operation: a quarter of a tiny run's
time. They depend on the shapes alone, so they are cached by all that gives the shapes. Runs with a cached prefix or
recomputed activations are counted as always. Writes are not forced onto the disk either: no test survives the loss of
power.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from lora_bench import train
from lora_bench.config.canonical import settings_hash

if TYPE_CHECKING:
    import pytest


def measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache the FLOP models of packs, until the patch is undone."""
    models: dict[str, Any] = {}
    measure = train._flop_models

    def measured(pack: Any) -> Any:
        if pack.prefix_depth is not None or pack.recomputes_activations:
            return measure(pack)
        if (key := _shapes(pack)) not in models:
            models[key] = measure(pack)
        return models[key]

    monkeypatch.setattr(train, "_flop_models", measured)


def _shapes(pack: Any) -> str:
    """Return a text that is equal for packs whose steps take the same FLOPs."""
    backbone, config = pack.backbone, pack.network.config.to_dict()
    members = [
        settings_hash((member.adapter, member.pair_features, ranks))
        for member, ranks in zip(pack.members, pack.assigned_ranks, strict=True)
    ]
    tensors = [(name, tuple(p.shape), p.requires_grad) for name, p in pack.network.named_parameters()]
    settings = (type(backbone).__name__, backbone.template, backbone.words, backbone.device.type, pack.group_size)
    return json.dumps([members, str(tensors), str(settings), config], sort_keys=True, default=str)


def write_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writes return before the disk has them, until the patch is undone."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
