"""Adapter files: what peft can express is written as peft writes it, tensors in safetensors only.

    adapter_model.safetensors    base_model.model.<module>.lora_A.weight, for the head base_model.model.<parameter>
    adapter_config.json          peft's own keys; the head is in `modules_to_save`

A method that peft has no name for (`head_only`) gets the same two files with `peft_type: null`. Full fine-tuning has
no adapter: it leaves a plain Hugging Face model, config.json and model.safetensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_bench.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.adapters.pack import Pack

PREFIX = "base_model.model."


def save(folder: Path, pack: Pack, member: int, base_model: str) -> None:
    """Write a member's trained tensors below `folder`.

    Args:
        folder: the run's `adapter/`; made here.
        pack: still attached.
        member: which of its members.
        base_model: where the backbone came from, for peft's `base_model_name_or_path`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in pack.state(member).items()}
    if pack.trains_backbone:
        pack.network.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        pack.backbone.tokenizer.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    renamed = {_peft_name(name, pack): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": None,
        **pack.members[member].adapter.peft_settings(),
        "base_model_name_or_path": base_model,
        "task_type": pack.backbone.peft_task,
        "inference_mode": True,
        "target_modules": pack.targets[member],
        "modules_to_save": list(pack.backbone.head_modules) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, pack: Pack, member: int) -> None:
    """Put the tensors that `save` wrote into a pack of the same backbone and adapter settings.

    Raises:
        UserError: the file is absent or damaged, or tensors are missing, left over, misshapen or not finite.
    """
    path = folder / ("model.safetensors" if pack.trains_backbone else "adapter_model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is absent or damaged ({error})", file=path) from None
    if not pack.trains_backbone:
        own = {_peft_name(name, pack): name for name in pack.trainable(member)}
        tensors = {own.get(name, name): tensor for name, tensor in tensors.items()}
    try:
        pack.load_state(member, tensors)
    except UserError as error:
        raise UserError(error.reason, file=path) from None


def _peft_name(name: str, pack: Pack) -> str:
    """peft keeps lora_A and lora_B as linears, so their tensors end in `.weight`."""
    in_head = name.startswith(tuple(f"{head}." for head in pack.backbone.head_modules))
    return f"{PREFIX}{name}" if in_head else f"{PREFIX}{name}.weight"
