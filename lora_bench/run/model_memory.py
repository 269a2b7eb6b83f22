"""Refuse a model whose weights do not fit into the memory of the device, before they are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from lora_bench.backbones.quantization import bytes_per_value
from lora_bench.console.format import format_number
from lora_bench.errors import Code, UserError
from lora_bench.training.memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.run.settings import Experiment

TRAINED_BYTES = 4 * 4
"""Bytes of a trained weight in fp32: value, gradient, and AdamW's two moments."""
_IN_LAYER = re.compile(r".*\.\d+\..*weight")
_EMBEDDING = re.compile(r".*\b(word_embeddings|embed_tokens|tok_embeddings|shared|wte|lm_head)\.weight")


@dataclass(frozen=True)
class WeightMemory:
    """The memory that the weights of a run's model take on a device."""

    experiment: Experiment
    device: torch.device
    dtype: torch.dtype
    """Of a frozen backbone's weights."""
    shards: int = 1
    """Number of processes of which each holds a part of the weights, on a GPU of its own."""

    def required_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Return a lower bound of the bytes that weights of these shapes, by name, take on a device.

        All matrices of the layers count as quantised if the model or the method quantises any.
        """
        adapter, model = self.experiment.adapter, self.experiment.model
        per_weight = TRAINED_BYTES if adapter.trains_backbone else self.dtype.itemsize
        per_linear = min((bytes_per_value(name) for name in self.quant_types), default=per_weight)
        per_embedding = per_weight if model.quantize_embeddings is None else 1
        devices = self.shards if self.device.type == "cuda" else 1  # processes on a CPU share its memory

        def bytes_of(name: str, shape: tuple[int, ...]) -> float:
            if len(shape) == 2 and _IN_LAYER.fullmatch(name):
                return prod(shape) * per_linear
            return prod(shape) * (per_embedding if _EMBEDDING.fullmatch(name) else per_weight)

        return sum(bytes_of(name, shape) for name, shape in shapes.items()) / devices

    @property
    def quant_types(self) -> list[str]:
        """Return the types in which linears are quantised; empty if none is."""
        types = (self.experiment.model.quantize, getattr(self.experiment.adapter, "quantize", None))
        return [name for name in types if name is not None]

    def refusal(self, shapes: Mapping[str, tuple[int, ...]]) -> UserError | None:
        """Return the error if weights of these shapes, by name, do not fit into the free memory; None if they do."""
        required, free = self.required_bytes(shapes), free_bytes(self.device)
        if required <= free:
            return None
        model, adapter = self.experiment.model, self.experiment.adapter
        count = format_number(sum(map(prod, shapes.values())))
        held = "weights, gradients and moments" if adapter.trains_backbone else "weights"
        key = "model.path" if model.path else "model.hub_id"
        remedies = ["a smaller model or another device"]
        if adapter.trains_backbone:
            remedies.insert(0, "adapter=lora")
        elif self.dtype == torch.float32:
            remedies.insert(0, "trainer.precision=bf16")
        if self.shards > 1:
            remedies.insert(0, "more processes")
        elif not self.quant_types:
            remedies.insert(0, "adapter=qlora" if adapter.trains_backbone else "model.quantize=nf4")
            if self.device.type == "cuda":
                remedies.append("trainer.sharding=fsdp with torchrun and several GPUs")
        return UserError(
            f"its {count} parameters take at least {format_number(required, 'B')} ({held}), and "
            f"{self.device.type} has {format_number(free, 'B')} of free memory",
            key=key,
            value=getattr(model, key.partition(".")[2]) or model.package or model.folder,
            remedy=f"Use {', '.join(remedies)}.",
            code=Code.OUT_OF_MEMORY,
        )
