"""What loading holds in memory: weights of 16 bits as they are stored, quantised ones as codes, and not too much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.base import Backbone
from lora_bench.data import sources
from lora_bench.errors import Code
from lora_bench.run import model_memory, preflight
from lora_bench.run.inputs import load_backbone
from lora_bench.training.dummy_step import dummy_step, saved_bytes
from tests.adapters.tools import experiment, stir
from tests.backbones.tools import make, random_batch, save
from tests.command_line import refused, refuses

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.run.settings import Experiment

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32


@pytest.fixture(scope="module", params=["bert", "t5"])
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[torch.dtype, Path]]:
    """One network stored in bf16 and, with the same numbers, in fp32."""
    path, network = tmp_path_factory.mktemp(request.param), make(f"tiny_{request.param}").network.to(BF16)
    tokenizer = tiny_tokenizers.tokenizer(request.param)
    return request.param, {dtype: save(path / str(dtype), network.to(dtype), tokenizer) for dtype in (BF16, FP32)}


def settings(model: str, folder: Path, *overrides: str) -> Experiment:
    made = experiment(f"model={model}", f"model.path={folder}", *overrides)
    return made.with_data([sources.load(made.data)[0]])


def test_weights_stored_in_bf16_are_loaded_in_it_and_have_the_hash_of_fp32(folders: Any) -> None:
    model, by_type = folders
    loaded = {dtype: load_backbone(settings(model, folder), CPU, BF16) for dtype, folder in by_type.items()}
    assert loaded[BF16][1] == loaded[FP32][1]  # as records name it, whose weights were fp32 when they were hashed
    assert loaded[BF16][0].hash() == loaded[BF16][1]
    for mine, other in zip(*(backbone.network.parameters() for backbone, _ in loaded.values()), strict=True):
        assert mine.dtype == other.dtype == BF16
        assert torch.equal(mine, other)
    full, sha256 = load_backbone(settings(model, by_type[BF16], "adapter=full"), CPU, BF16)
    assert {p.dtype for p in full.network.parameters()} == {FP32}
    assert sha256 == loaded[BF16][1]


@pytest.mark.parametrize("option", ["qlora", "loftq"])
def test_a_quantised_run_holds_codes_and_scales_and_computes_with_what_they_stand_for(
    folders: Any, option: str
) -> None:
    model, by_type = folders
    experiments = [settings(model, by_type[BF16], f"adapter={option}", "adapter.magnitude=true")] * 2
    backbone, sha256 = load_backbone(experiments[0], CPU, FP32)
    pack = stir(Pack(backbone, [member for one in experiments for member in one.members()], batched=False))
    updates = pack.updates[0]
    held = pack.weight_bytes([0, 1])
    assert held == pack.weight_bytes([0])  # members of equal codes share them
    assert held["quantized_codes_bytes"] + held["quantized_scales_bytes"] <= 0.3 * held["quantized_bf16_bytes"]
    stored = dict(backbone.network.named_parameters())
    assert all(stored[f"{name}.base.weight"].dtype == BF16 for name in updates)  # untouched, where the file is mapped
    batch = random_batch(backbone)
    logits = pack(batch)
    logits.square().sum().backward()
    taken = {name: p.grad for name, p in pack.trainable(0).items()}
    pack.zero_grad()
    pack.active = [0]
    step = saved_bytes(pack, 4, 11)
    for update in updates.values():  # the same with the weights held
        assert isinstance(update, LowRank)
        assert update.quantized is not None
        update.base[0].weight.data, update.quantized = update.quantized.dequantize(), None
    assert saved_bytes(pack, 4, 11) > step
    same = pack(batch)
    assert torch.equal(same[0], logits[0])
    same.square().sum().backward()
    for name, p in pack.trainable(0).items():
        torch.testing.assert_close(p.grad, taken[name], rtol=0, atol=0)
    assert sha256 != pack.backbone.hash()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_quantised_backbone_takes_the_bytes_that_its_types_promise(folders: Any, dtype: torch.dtype) -> None:
    model, by_type = folders
    types = ("model.quantize=nf4", "model.quantize_embeddings=int8", "adapter.layers=top:1")
    plain, sha256 = load_backbone(settings(model, by_type[BF16]), CPU, BF16)
    experiment = settings(model, by_type[BF16], *types)
    backbone, of_quantised = load_backbone(experiment, CPU, dtype)
    assert of_quantised == sha256  # of the checkpoint's weights
    before = backbone.hash()
    pack = Pack(backbone, experiment.members())
    cost = pack.weight_bytes([0])
    network: Any = plain.network
    table = network.get_input_embeddings().weight
    weights = [linear.weight for linear in Backbone.linears(plain).values()]
    others = sum(p.numel() for p in network.parameters()) - table.numel() - sum(w.numel() for w in weights)
    others -= sum(p.numel() for name in plain.head_modules for p in network.get_submodule(name).parameters())
    blocks = sum(-(-weight.numel() // 64) for weight in weights)
    assert (cost["quantized_codes_bytes"], cost["quantized_scales_bytes"]) == (32 * blocks, 4 * blocks)
    assert cost["backbone_linears_bytes"] == 36 * blocks
    assert cost["backbone_embeddings_bytes"] >= table.numel() + 4 * len(table)
    buffers = sum(b.nbytes for b in plain.network.buffers() if not b.is_floating_point())
    quantised = 36 * blocks + table.numel() + 4 * len(table)
    assert cost["backbone_bytes"] == pytest.approx(quantised + dtype.itemsize * others + buffers, abs=64)
    assert cost["backbone_bf16_bytes"] == 2 * (others + table.numel() + sum(w.numel() for w in weights))
    dummy_step(pack, 2, 8)
    pack.detach()
    assert backbone.hash() == before


def test_weights_that_are_trained_or_sharded_are_not_quantised() -> None:
    for key, value in (("model.quantize", "nf4"), ("model.quantize_embeddings", "int8")):
        with refuses(Code.CONFLICT, key=key):
            experiment("model=tiny_bert", "adapter=full", f"{key}={value}")
        with refuses(Code.CONFLICT, key="trainer.sharding"):
            experiment("model=tiny_bert", "trainer.sharding=fsdp", f"{key}={value}")


def test_kernels_need_their_library_and_a_weight_for_them(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses(Code.CONFLICT, key="trainer.quantization_kernels"):
        experiment("model=tiny_bert", "model.quantize=int8", "trainer.quantization_kernels=bitsandbytes")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    options = ("model=tiny_bert", "model.quantize=nf4", "trainer.quantization_kernels=bitsandbytes")
    error = refused("train", *options)
    assert (error.code, error.key) == (Code.MISSING_PACKAGE, "trainer.quantization_kernels")
    assert "lora-bench[bitsandbytes]" in str(error.remedy)


def test_a_backbone_loaded_for_quantised_runs_serves_others(folders: Any) -> None:
    model, by_type = folders
    plain = settings(model, by_type[FP32])
    quantised = settings(model, by_type[FP32], "adapter=qlora", "adapter.quantize=int8")
    backbone, sha256 = load_backbone(quantised, CPU, FP32)
    assert backbone.offloaded
    pack = Pack(backbone, quantised.members())
    pack.detach()
    assert backbone.hash() == sha256
    mixed = Pack(backbone, [*plain.members(), *quantised.members()], batched=False)
    assert not backbone.offloaded
    alone = Pack(load_backbone(plain, CPU, FP32)[0], plain.members())
    batch = random_batch(backbone)
    with torch.no_grad():
        assert torch.equal(mixed(batch)[0], alone(batch)[0])
    mixed.detach()
    assert backbone.hash() == sha256


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ((), "model.quantize=nf4, trainer.precision=bf16, a smaller"),
        (("adapter=full",), "adapter=qlora, adapter=lora, a smaller"),
        (("adapter=qlora",), "trainer.precision=bf16, a smaller"),
        (("model.quantize=nf4", "model.quantize_embeddings=int8"), "trainer.precision=bf16, a smaller"),
    ],
)
def test_a_model_too_large_for_the_device_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], remedy: str
) -> None:
    folder = save(tmp_path / "bert", make().network, tiny_tokenizers.tokenizer("bert"))
    monkeypatch.setattr(model_memory, "free_bytes", lambda device: 1000)
    with refuses(Code.OUT_OF_MEMORY, key="model.path") as caught:
        load_backbone(settings("bert", folder, *overrides), CPU, FP32)
    assert remedy in str(caught.value)
