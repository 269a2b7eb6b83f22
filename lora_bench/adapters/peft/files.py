"""Adapter files: what peft can express is written as peft writes it, tensors in safetensors only.

    adapter_model.safetensors    base_model.model.<module>.lora_A.weight, for the head base_model.model.<parameter>
    adapter_config.json          peft's own keys; the head is in `modules_to_save`

What peft has no name for (`head_only`, the query of a fused linear) gets the same two files with `peft_type: null`.
Full fine-tuning has no adapter: it leaves a plain Hugging Face model, config.json and model.safetensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lora_bench.adapters.peft.fused_rows import has_parts, join_parts
from lora_bench.adapters.peft.names import OF_PEFT
from lora_bench.backbones.fused_linear import is_transposed
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from lora_bench.adapters.pack.pack import Pack

PREFIX = "base_model."
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TENSORS = "adapter_model.safetensors"


def save(
    folder: Path,
    pack: Pack,
    member: int,
    base_model: str,
    *,
    head: int = 0,
    for_peft: bool = False,
    label_names: Sequence[str] | None = ("LABEL_0", "LABEL_1"),
) -> None:
    """Write a member's adapter and one head into `folder`; with `full` a whole Hugging Face model with its tokenizer.

    Existing files are overwritten.

    Args:
        folder: the run's `adapter/`; made here if it is absent.
        pack: still attached.
        member: which of its members.
        base_model: where the backbone came from, for peft's `base_model_name_or_path`.
        head: which of its heads goes along.
        for_peft: leave out what peft has no name for, without which `load` cannot put the member together again.
        label_names: of the classes, for the config of a model that was trained whole; None: it predicts a number.
    """
    folder.mkdir(exist_ok=True)
    if pack.trains_backbone:
        pack.backbone.export_config(label_names).save_pretrained(folder)
        pack.backbone.tokenizer.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in pack.state(member, head).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    tensors = {name: tensor.contiguous().cpu() for name, tensor in _saved(pack, member, head).items()}
    adapter = pack.members[member].adapter
    if for_peft and not adapter.is_in_peft_format:
        of_head = {f"{PREFIX}model.{name}" for name in pack.head_parameters(member, head)}
        tensors = {name: tensor for name, tensor in tensors.items() if name in of_head or OF_PEFT.fullmatch(name)}
    updates = pack.updates[member]
    settings, targets = adapter.peft_settings(updates), list(updates)
    if settings and has_parts(pack.network, targets):
        if for_peft:
            tensors, settings, targets = join_parts(pack.network, tensors, settings, targets, f"{PREFIX}model.")
        else:
            settings = {}  # PEFT has no name for a part of a linear
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    if settings and all(is_transposed(linear) for linear in _adapted(pack, updates)):
        settings["fan_in_fan_out"] = True  # PEFT's name for weights that are stored as (in, out)
    config = {
        "peft_type": None,
        **settings,
        "base_model_name_or_path": base_model,
        "task_type": pack.backbone.peft_task,
        "inference_mode": True,
        "target_modules": settings.get("target_modules") or targets,
        "modules_to_save": list(pack.backbone.head_modules) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapted(pack: Pack, updates: Iterable[str]) -> Iterator[nn.Module]:
    """Yield the frozen module beside each update."""
    for name in updates:
        adapted: Any = pack.network.get_submodule(name)
        yield adapted.base


def load(folder: Path, pack: Pack, member: int, *, with_head: bool = True) -> None:
    """Put the tensors that `save` wrote into a pack of the same backbone, adapter settings and ranks, and into head 0.

    `adapter_config.json` is not read. Without `with_head` the head stays as it is, and that of the file may be of any
    number of classes.

    Raises:
        UserError: the file is absent or damaged, or tensors are missing, left over, misshapen or not finite.
    """
    path = folder / ("model.safetensors" if pack.trains_backbone else TENSORS)
    tensors = read(path)
    heads = {f"model.{name}": p for name, p in pack.head_parameters(member, 0).items()}
    if not with_head:
        prefix = "" if pack.trains_backbone else f"{PREFIX}model."
        tensors |= {f"{prefix}{name.removeprefix('model.')}": p.detach().cpu() for name, p in heads.items()}
    if pack.trains_backbone:
        try:
            pack.load_state(member, tensors)
        except UserError as error:
            raise UserError(error.reason, file=path, code=Code.DAMAGED) from None
        return
    expected = _saved(pack, member)
    integers = {name for name, tensor in expected.items() if tensor.dtype not in FLOATS}
    refuse_misfits(path, tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}, integers)
    unprefixed = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, p in heads.items():
            p.copy_(unprefixed.pop(name))
    try:
        pack.members[member].adapter.load_tensors(pack.updates[member], unprefixed)
    except (IndexError, RuntimeError) as error:
        reason = f"the saved tensors do not fit: {' '.join(str(error).split())}"
        raise UserError(reason, file=path, code=Code.DAMAGED) from None


def _saved(pack: Pack, member: int, head: int = 0) -> dict[str, Tensor]:
    """Return the member's adapter and one of its heads by the names they have in the file."""
    adapter = pack.members[member].adapter.to_tensors(pack.updates[member])
    head_tensors = {f"model.{name}": p.detach() for name, p in pack.head_parameters(member, head).items()}
    return {f"{PREFIX}{name}": tensor for name, tensor in {**adapter, **head_tensors}.items()}


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU; a `UserError` if it is absent or damaged."""
    try:
        untrusted.open_file(path, max_bytes=2**63).close()  # the library would wait for a writer of a FIFO
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is absent or damaged ({error})", file=path, code=Code.DAMAGED) from None


def check_ranks(folder: Path, ranks: Mapping[str, int | list[int]]) -> None:
    """Refuse ranks from a record that exceed every side of every saved tensor, before updates of that size are made.

    Args:
        folder: of the adapter; only the shapes in its file are read.
        ranks: by module, one number or one for each member.

    Raises:
        UserError: a rank is too large, or the file is absent or damaged.
    """
    path = folder / TENSORS
    try:
        untrusted.open_file(path, max_bytes=2**63).close()  # as in `read`
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is absent or damaged ({error})", file=path, code=Code.DAMAGED) from None
    largest = max((max(shape, default=0) for shape in shapes), default=0)
    for name, rank in ranks.items():
        if max(rank, default=0) > largest if isinstance(rank, list) else rank > largest:
            raise UserError(
                f"the saved tensors do not fit: {name} has rank {rank} in the run's record",
                file=path,
                code=Code.DAMAGED,
            )


def refuse_misfits(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    integers: Collection[str] = frozenset(),
) -> None:
    """Refuse a file whose tensors are not those of `shapes`, or are not finite.

    Args:
        path: of the file, for the message.
        tensors: its content.
        shapes: of the tensors that it must have, by name.
        integers: names of those that may hold whole numbers: codes of quantised weights, positions.

    Raises:
        UserError: tensors are missing, superfluous, of another shape, of a type that is not floating-point, or not
            finite. It names at most three, of the first of these problems.
    """
    both = [name for name in shapes if name in tensors]
    odd = [f"{name} ({tensors[name].dtype})" for name in both if not _type_fits(tensors[name], name in integers)]
    problems = {
        "are missing": [name for name in shapes if name not in tensors],
        "do not belong to this adapter": [name for name in tensors if name not in shapes],
        "have another shape": [
            f"{name} {tuple(tensors[name].shape)} for {shapes[name]}"
            for name in both
            if tensors[name].shape != shapes[name]
        ],
        "are of another type": odd,
        "hold numbers that are not finite": [
            name for name in both if tensors[name].dtype in FLOATS and not torch.isfinite(tensors[name]).all()
        ],
    }
    for trouble, names in problems.items():
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"the saved tensors do not fit: {', '.join(names[:3])}{rest} {trouble}", file=path, code=Code.DAMAGED
            )


def _type_fits(tensor: Tensor, may_be_integer: bool) -> bool:
    """Return whether a tensor is of floating-point numbers, or of whole numbers where these are expected."""
    return tensor.dtype in FLOATS or (may_be_integer and not tensor.is_complex())
