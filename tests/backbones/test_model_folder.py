"""A foreign model folder: what would change the model, wait for ever or fill the memory is refused, and named."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.backbones.model_folder import bounded_construction, checkpoint_tensors
from lora_bench.errors import Code, UserError
from tests.backbones.tools import held, make, model_settings, save
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = make()
    return save(tmp_path_factory.mktemp("original") / "bert", backbone.network, backbone.tokenizer)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "bert")


def refusal(folder: Path, code: Code = Code.DAMAGED, *, key: str | None = None) -> UserError:
    settings = model_settings("bert", f"model.path={folder}")
    with refuses(code, key=key) as caught:
        load(settings, load_tokenizer(settings), task="qqp")
    return caught.value


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = held(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Path, name: str = "model-00001-of-00001.safetensors") -> dict[str, Any]:
    """Replace the weights by one shard and an index, which is returned."""
    tensors = held(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_read(original: Path, folder: Path) -> None:
    shard(folder)
    assert make("bert", f"model.path={folder}").hash() == make("bert", f"model.path={original}").hash()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_model_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    error = refusal(folder, Code.UNSUPPORTED)
    assert error.file == folder / name
    assert "format=merged" in str(error.remedy)
    assert "adapter.init_from" in str(error.remedy)


@pytest.mark.parametrize("part", ["lora_A.default.weight", "base_layer.weight"])
def test_the_tensors_of_a_wrapped_model_are_refused(folder: Path, part: str) -> None:
    name = f"bert.encoder.layer.0.attention.self.query.{part}"
    retensor(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    error = refusal(folder, Code.UNSUPPORTED)
    assert error.file == folder
    assert name in error.reason
    assert "merge_and_unload" in str(error.remedy)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, Code.UNSUPPORTED),
        ("transformers_weights", "../other.safetensors", Code.UNSUPPORTED),
        ("attn_implementation", "someone/kernel", Code.FORBIDDEN),
    ],
)
def test_settings_that_load_something_else_are_refused(folder: Path, name: str, value: Any, code: Code) -> None:
    configure(folder, **{name: value})
    error = refusal(folder, code)
    assert error.file == folder / "config.json"
    assert name in error.reason


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../m.safetensors", "/tmp/m.safetensors", "gone.safetensors", 3])
def test_an_index_names_shards_of_its_folder(folder: Path, name: Any) -> None:
    index = shard(folder)
    index["weight_map"]["bert.pooler.dense.bias"] = name
    (folder / INDEX).write_text(json.dumps(index))
    (folder.parent / "m.safetensors").write_bytes(b"")
    error = refusal(folder)
    assert error.file == folder / INDEX
    assert str(name) in error.reason


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "{}", '{"weight_map": []}', "[" * 100_000, "\0" * 100])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(content)
    assert refusal(folder).file == folder / INDEX


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000, "\0" * 100, '{"a": ' + "9" * 5000])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refusal(folder).file == folder / "config.json"


@pytest.mark.parametrize("content", ["{}", '{"model_type": -1}', '{"model_type": "bert", "hidden_act": -1}'])
def test_a_config_of_no_known_model_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refusal(folder, Code.UNSUPPORTED).file == str(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 10**9),
        ("intermediate_size", 10**400),
    ],
)
def test_a_huge_number_is_refused_before_anything_is_made(folder: Path, key: str, value: int) -> None:
    configure(folder, **{key: value})
    error = refusal(folder)
    assert error.file == folder / "config.json"
    assert key in error.reason


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "model_type"])
@pytest.mark.parametrize("value", [None, "many", [], {}, 0.5])
def test_a_setting_of_another_type_is_refused(folder: Path, key: str, value: Any) -> None:
    configure(folder, **{key: value})
    assert refusal(folder, Code.UNSUPPORTED).file == str(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_below_zero_is_refused(folder: Path, key: str) -> None:
    configure(folder, **{key: -1})
    error = refusal(folder)
    assert error.file == folder / "config.json"
    assert key in error.reason
    assert "-1" in error.reason


def test_a_network_that_outgrows_its_checkpoint_is_never_made(folder: Path) -> None:
    with (
        torch.device("meta"),
        refuses(Code.DAMAGED) as caught,
        bounded_construction(folder, checkpoint_tensors(folder, allow_bin=False)),
    ):
        torch.nn.Linear(2**14, 2**14)
    assert caught.value.file == folder / "config.json"
    configure(folder, hidden_size=2**14)
    assert str(folder) in str(refusal(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_odd_types_are_refused(folder: Path, dtype: torch.dtype) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    retensor(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    error = refusal(folder, Code.UNSUPPORTED)
    assert error.file == folder
    assert name in error.reason


def test_integer_buffers_of_older_checkpoints_are_no_fault(folder: Path) -> None:
    name = "bert.embeddings.position_ids"
    retensor(folder, lambda tensors: tensors.update({name: torch.arange(8)[None]}))
    make("bert", f"model.path={folder}")


def _directory(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _cut(path: Path) -> None:
    path.write_bytes(b"\x10\0\0\0")


def _huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (os.mkfifo, Code.NOT_A_FILE),
        (_directory, Code.NOT_A_FILE),
        (_loop, Code.UNREADABLE),
        (_cut, Code.DAMAGED),
        (_huge_header, Code.DAMAGED),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_never_opened(folder: Path, name: str, damage: Callable[[Path], object], code: Code) -> None:
    file = folder / name
    file.unlink()
    damage(file)
    if name == "config.json" and not file.is_file():
        assert refusal(folder, Code.NOT_FOUND, key="model.path").value == str(folder)
    else:
        assert refusal(folder, code).file == file


def test_a_pipe_by_the_name_of_an_adapter_is_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "adapter_config.json")
    assert refusal(folder, Code.NOT_A_FILE).file == folder / "adapter_config.json"
