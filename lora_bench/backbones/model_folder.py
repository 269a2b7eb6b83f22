"""Local model folders are untrusted input: what transformers would follow, wrap or allocate is checked beforehand.

`from_pretrained` injects an adapter that lies beside a model, replaces layers where config.json names a quantisation,
follows an index to any file and allocates what config.json asks for. A few kilobytes of each file are read here
first, and such folders are refused with the reason.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.modeling_utils import load_state_dict

from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
OTHER_WEIGHTS = (PICKLED_WEIGHTS, PICKLE_INDEX, "tf_model.h5", "flax_model.msgpack")
DOWNLOAD_AGAIN = "Copy or download the model's files once more."
LARGEST_JSON_BYTES = 64 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST_NUMBER = 2**21
"""The largest setting, unless a tensor of the checkpoint has a longer side."""
MOST_LAYERS = 1000
"""The largest number of layers, unless the checkpoint has more tensors."""
SPARE_ELEMENTS = 2**26
"""Elements that a network may have beyond four times those of its checkpoint, for a new head."""
_FREE_NUMBERS = ("theta", "seed", "version")
"""Settings whose names contain one of these may be of any size: nothing is allocated for them."""


class TensorInfo(NamedTuple):
    """The type and shape of a tensor in a file of weights."""

    dtype: str
    shape: tuple[int, ...]


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return bf16 if all numbers of a checkpoint are stored in it, else fp32, in which numbers of 16 bits are exact."""
    types = {info.dtype for info in tensors.values() if info.dtype in FLOATS}
    return torch.bfloat16 if types == {"BF16"} else torch.float32


def check_model_folder(folder: Path, *, allow_bin: bool = False) -> dict[str, TensorInfo]:
    """Refuse a local model folder that cannot be loaded unchanged, before large files are read.

    Of the weights only headers are read. With `allow_bin` they may be PyTorch's pickled files.

    Returns:
        The tensors of the checkpoint by name.

    Raises:
        UserError: a file is absent, damaged, or would change what is loaded; the message names it.
    """
    _refuse_special_files(folder)
    _refuse_adapter(folder)
    config_file = folder / "config.json"
    settings = read_json(config_file)
    check_settings(settings, config_file)
    tensors = checkpoint_tensors(folder, allow_bin=allow_bin)
    _refuse_adapted_tensors(tensors, folder)
    _refuse_types(tensors, folder)
    _refuse_impossible_numbers(settings, tensors, config_file)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder.

    Raises:
        UserError: it is absent, no regular file, too large, damaged, or holds no object.
    """
    try:
        values = json.loads(untrusted.read_bytes(path, LARGEST_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=path, code=Code.UNREADABLE) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is damaged: {error}", file=path, code=Code.DAMAGED) from None
    if not isinstance(values, dict):
        raise UserError("is damaged: it holds no object", file=path, code=Code.DAMAGED)
    return values


def check_settings(settings: Mapping[str, Any], file: str | Path) -> None:
    """Refuse settings of config.json by which transformers would load something other than the plain model.

    These are a quantisation, an attention or experts implementation to download, and another file of weights. The first
    two are also refused one level deeper, as in a `text_config`.

    Args:
        settings: as the file holds them, or the attributes of the config that was made of it.
        file: to name in the message.

    Raises:
        UserError: there is such a setting; it is named.
    """
    nested = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    for values in nested:
        for key in ("quantization_config", "compression_config"):
            if values.get(key):
                remedy = "Give the model's weights in fp32, fp16 or bf16; adapter=qlora quantises them itself."
                raise UserError(f"{key}: the weights are quantised", file=file, remedy=remedy, code=Code.UNSUPPORTED)
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(values.get(key)):
                raise UserError(
                    f"{key}: names code to download", file=file, remedy="Leave that key out.", code=Code.FORBIDDEN
                )
    if settings.get("transformers_weights"):
        reason = f"transformers_weights: names another file of weights than {WEIGHTS}"
        raise UserError(reason, file=file, remedy="Leave that key out.", code=Code.UNSUPPORTED)


@contextmanager
def bounded_construction(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[None]:
    """Limit the size of networks that are built on the meta device within the context by a folder's checkpoint.

    The limit is four times the elements of the checkpoint, and SPARE_ELEMENTS. It holds for all threads of the process.

    Args:
        folder: of the model.
        tensors: of its checkpoint.

    Raises:
        UserError: config.json asks for more.
    """
    most = 4 * sum(prod(info.shape) for info in tensors.values()) + SPARE_ELEMENTS
    count = 0

    def add(_module: Any, name: str, parameter: Any) -> None:
        """Count a new parameter if it is on the meta device; a `UserError` if the sum is above the limit."""
        nonlocal count
        if parameter is not None and parameter.is_meta:
            count += parameter.numel()
            if count > most:
                reason = f"asks for a network far larger than the checkpoint (at {name})"
                raise UserError(
                    reason,
                    file=folder / "config.json",
                    remedy="Give the config.json of these weights.",
                    code=Code.DAMAGED,
                )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _refuse_special_files(folder: Path) -> None:
    """Refuse pipes, devices and links that lead nowhere: opening one may wait for ever.

    Folders inside are accepted, except under the name of a file that is read. A missing folder is a `UserError` too.
    """
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=folder, code=Code.UNREADABLE) from None
    needed = {"config.json", WEIGHTS, INDEX, PICKLED_WEIGHTS, PICKLE_INDEX, *ADAPTER_FILES}
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", file=path, code=Code.UNREADABLE) from None
        if not stat.S_ISREG(mode) and (path.name in needed or not stat.S_ISDIR(mode)):
            raise UserError("is not a regular file", file=path, code=Code.NOT_A_FILE)


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds a file of an adapter beside the model.

    Raises:
        UserError: naming the first of `ADAPTER_FILES` that exists, and the ways to go on.
    """
    name = next((name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if name:
        raise UserError(
            "belongs to an adapter, which transformers would add to the model in the same folder",
            file=folder / name,
            remedy="To train on the adapted model, merge the two (lora-bench export format=merged, or peft's "
            "merge_and_unload); to go on from a run's adapter, give adapter.init_from=RUN; "
            "to train on the model alone, move the adapter's files elsewhere.",
            code=Code.UNSUPPORTED,
        )


def is_pickled(folder: Path) -> bool:
    """Return whether a folder has weights in PyTorch's pickled format only."""
    has_safetensors = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return not has_safetensors and any((folder / name).exists() for name in (PICKLED_WEIGHTS, PICKLE_INDEX))


def checkpoint_tensors(folder: Path, *, allow_bin: bool) -> dict[str, TensorInfo]:
    """Return the tensors of the checkpoint by name, read from the headers of its files.

    They are those of model.safetensors if it exists, else of the files that its index names; with `allow_bin` those of
    pickled files, if there are no others.

    Raises:
        UserError: there is neither, or a file is damaged.
    """
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if allow_bin and is_pickled(folder):
        single, pickled = folder / PICKLED_WEIGHTS, dict[str, TensorInfo]()
        for path in [single] if single.exists() else _shards(folder / PICKLE_INDEX, ".bin"):
            pickled |= _pickled_header(path)
        return pickled
    if not (folder / INDEX).exists():
        raise _without_safetensors(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in _shards(folder / INDEX, ".safetensors"):
        tensors |= read_header(shard)
    return tensors


def _shards(index: Path, suffix: str) -> list[Path]:
    """Return the files that an index names, each once; all of them lie beside it.

    Raises:
        UserError: the index is damaged, or names a file elsewhere, of another type or that does not exist.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("is damaged: it has no weight_map", file=index, code=Code.DAMAGED)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(suffix):
            reason = f"weight_map: {tensor!r} is in {name!r}, which is not a {suffix} file of this folder"
            raise UserError(reason, file=index, remedy="Save the model anew with save_pretrained.", code=Code.DAMAGED)
    shards = [index.with_name(name) for name in dict.fromkeys(weight_map.values())]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing:
        reason = f"weight_map: {missing.name} is not in this folder"
        raise UserError(reason, file=index, remedy=DOWNLOAD_AGAIN, code=Code.DAMAGED)
    return shards


def read_header(path: Path, remedy: str = DOWNLOAD_AGAIN) -> dict[str, TensorInfo]:
    """Return the type and shape of each tensor in a safetensors file, by name; a `UserError` if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: TensorInfo(entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"is damaged: {error}", file=path, remedy=remedy, code=Code.DAMAGED) from None


def _pickled_header(path: Path) -> dict[str, TensorInfo]:
    """Return the type and shape of each tensor in a pickled file, by name; nothing in it is executed.

    transformers reads it with `torch.load(weights_only=True)`, here without the numbers.

    Raises:
        UserError: the file is damaged, or holds anything else than tensors by name.
    """
    try:
        state: Any = load_state_dict(path, map_location="meta", weights_only=True)
        return {name: TensorInfo(_type_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()}
    except Exception as error:  # of the unpickler, of the archive, or of what is no dictionary of tensors
        reason = f"is damaged, or holds something else than tensors ({type(error).__name__})"
        raise UserError(reason, file=path, remedy=DOWNLOAD_AGAIN, code=Code.DAMAGED) from None


def _type_name(dtype: torch.dtype) -> str:
    """Return the name that safetensors has for a type: `F32`, `BF16`, `I64`."""
    name = str(dtype).removeprefix("torch.")
    return name.upper().replace("BFLOAT", "BF").replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")


def _without_safetensors(folder: Path) -> UserError:
    """Return the error for a folder without safetensors files.

    It names weights of another format if there are such, and for those of PyTorch a command that converts them.
    """
    reason = f"holds no {WEIGHTS}"
    other_weights = [name for name in OTHER_WEIGHTS if (folder / name).exists()]
    if not other_weights:
        return UserError(
            reason, file=folder, remedy="Give the folder that save_pretrained of a model wrote.", code=Code.NOT_FOUND
        )
    reason += f", only {other_weights[0]}"
    if other_weights[0].startswith("pytorch_model"):
        remedy = "Set model.allow_bin=true to read it with torch.load(weights_only=True), which runs no code of it."
        return UserError(reason, file=folder, remedy=remedy, code=Code.UNSUPPORTED)
    return UserError(
        reason, file=folder, remedy="Load it with transformers and save it with save_pretrained.", code=Code.UNSUPPORTED
    )


def _refuse_adapted_tensors(tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Refuse the tensors of a network that peft had wrapped: they would be left out, or layers stay random."""
    wrappers = {"base_layer", "modules_to_save", "original_module"}
    for name in tensors:
        modules = name.split(".")
        if wrappers.intersection(modules) or any(module.startswith(("lora_", "vera_")) for module in modules):
            remedy = "Merge the adapter first: peft's merge_and_unload, then save_pretrained."
            raise UserError(
                f"the checkpoint holds an adapter ({name})", file=folder, remedy=remedy, code=Code.UNSUPPORTED
            )


def _refuse_types(tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Refuse weights that are no floating-point numbers of 16 bits or more: cast as they are, they mean nothing.

    Integer buffers, such as position_ids and GPT-2's causal masks (called bias, 4 dimensions), are no weights. Tensors
    of 8-bit floating-point or complex numbers are refused under any name.
    """
    for name, info in tensors.items():
        leaf = name.rpartition(".")[2]
        weight = leaf == "weight" or (leaf == "bias" and len(info.shape) < 4)
        if info.dtype not in FLOATS and (weight or info.dtype.startswith(("F", "C"))):
            remedy = "Give the model's weights in fp32, fp16 or bf16."
            raise UserError(f"{name} is of type {info.dtype}", file=folder, remedy=remedy, code=Code.UNSUPPORTED)


def _refuse_impossible_numbers(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], file: Path) -> None:
    """Refuse sizes that no tensor has, and those below zero, before a list, a table or a network is made so large.

    Keys that contain `theta`, `seed` or `version` or end in `_id` may have any value.

    Args:
        settings: of config.json, nested ones included.
        tensors: of the checkpoint.
        file: to name in the message.
    """
    longest = max((side for info in tensors.values() for side in info.shape), default=0)
    for key, value in _numbers(settings):
        if any(word in key for word in _FREE_NUMBERS) or key.endswith("_id"):
            continue
        if "layer" in key and value > max(MOST_LAYERS, len(tensors)):
            reason = f"{key}: {str(value)[:20]} layers are more than the {len(tensors)} tensors of the checkpoint"
        elif abs(value) > max(LARGEST_NUMBER, longest):
            reason = f"{key}: {str(value)[:20]} is larger than every tensor of the checkpoint"
        elif value < 0 and (key.startswith(("n_", "num_")) or key.endswith(("_layers", "_heads", "_size"))):
            reason = f"{key}: {str(value)[:20]} is below zero"
        else:
            continue
        raise UserError(reason, file=file, remedy="Give the config.json of these weights.", code=Code.DAMAGED)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (key, value) of all whole numbers, those in nested objects and lists included; booleans are no numbers.

    The key is the last one, without those around it; a number in a list has the list's.
    """
    pending: list[tuple[str, Any]] = list(values.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif type(value) is int:
            yield key, value
