"""A quantised network computes with the values that its codes stand for, and holds nothing else of its weights."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.base import Backbone
from lora_bench.backbones.fused_linear import FusedLinear, LinearRows
from lora_bench.backbones.quantization import quantize
from lora_bench.backbones.quantized_modules import QuantizedTable, quantize_linear, quantized_linear
from lora_bench.backbones.quantized_network import Quantization
from tests.adapters.tools import adapter, stir
from tests.backbones.architectures import ARCHITECTURES
from tests.backbones.tools import FORMS, cut_logits, make, random_batch

if TYPE_CHECKING:
    from pathlib import Path

CPU, FP32 = torch.device("cpu"), torch.float32
DECODERS = {a.name: a for a in ARCHITECTURES if a.name in ("GPT-2", "Gemma 3, text to text")}


@pytest.fixture(scope="module", params=["bert", "t5", *DECODERS])
def makers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that loads the same network again and again."""
    if request.param in FORMS:
        return lambda: make(*FORMS[request.param])
    architecture = DECODERS[request.param]
    folder: Path = architecture.save(tmp_path_factory.mktemp("model"))
    return lambda: make(architecture.choice, f"model.path={folder}", *architecture.overrides)


def round_int8(weight: Tensor) -> Tensor:
    """Return an embedding rounded to 255 levels of each row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales.clamp(min=1e-30)).round() * scales


@torch.no_grad()
def rounded(backbone: Backbone, quant_type: str) -> Backbone:
    """Return the backbone with the numbers of quantised weights, held as numbers."""
    for linear in Backbone.linears(backbone).values():
        if not isinstance(linear, LinearRows):
            linear.weight.copy_(quantize(linear.weight, quant_type).dequantize())
    network: Any = backbone.network
    weights = [network.get_input_embeddings().weight]
    if (output := network.get_output_embeddings()) is not None and output.weight is not weights[0]:
        weights.append(output.weight)
    for weight in weights:
        weight.copy_(round_int8(weight))
    backbone.to(CPU, FP32, trained=False)
    return backbone


def numbers() -> list[Tensor]:
    """Return every tensor of floating-point numbers that the process holds."""
    gc.collect()
    return [t for t in gc.get_objects() if isinstance(t, Tensor) and t.is_floating_point()]


def quantized(backbone: Backbone, quant_type: str, **options: Any) -> Backbone:
    backbone.to(CPU, FP32, trained=False, quantization=Quantization(quant_type, "int8"), **options)
    return backbone


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("method", [("lora", "layers=top:1"), ("dora", "target_modules=qv"), ("vera",)])
def test_a_member_learns_what_it_learns_beside_the_rounded_weights(
    makers: Any, method: tuple[str, ...], quant_type: str
) -> None:
    results = []
    for backbone in (rounded(makers(), quant_type), quantized(makers(), quant_type)):
        pack = stir(Pack(backbone, [Member(adapter(*method), seed) for seed in (0, 1)]))
        with pack.accumulating_gradients():
            logits = pack(random_batch(backbone))
            logits.square().sum().backward()
        gradients = {name: p.grad for name, p in pack.trainable(1).items()}
        results.append((logits, gradients, pack.count_parameters(0)))
    (logits, gradients, counts), (of_quantized, gradients_of_quantized, counts_of_quantized) = results
    torch.testing.assert_close(of_quantized, logits, atol=1e-5, rtol=1e-5)
    assert counts_of_quantized == counts
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_quantized[name], gradient, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_codes_are_held_and_numbers_come_back_on_request(makers: Any) -> None:
    plain = rounded(makers(), "nf4")
    network: Any = plain.network
    weights = [*Backbone.linears(plain).values(), network.get_input_embeddings()]
    shapes = {tuple(shape) for module in weights for shape in (module.weight.shape, module.weight.T.shape)}
    batch = random_batch(plain)
    expected, state = cut_logits(plain, batch, 0), plain.network.state_dict()
    existing = numbers()
    backbone = quantized(makers(), "nf4")
    heads = [p for name in backbone.head_modules for p in backbone.network.get_submodule(name).parameters()]
    known = {id(tensor) for tensor in (*existing, *heads)}
    assert not shapes & {tuple(tensor.shape) for tensor in numbers() if id(tensor) not in known}
    torch.testing.assert_close(cut_logits(backbone, batch, 0), expected, atol=1e-5, rtol=1e-5)
    backbone.dequantize()
    restored = backbone.network.state_dict()
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(restored[name], tensor, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cut_logits(backbone, batch, 0), expected, atol=1e-5, rtol=1e-5)


def test_a_table_gives_the_rows_of_its_tokens() -> None:
    weight = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    table = QuantizedTable(weight, torch.empty(0))
    torch.testing.assert_close(table.dequantize(), round_int8(weight), atol=1e-6, rtol=0)
    assert (table.dequantize() - weight).abs().max() <= weight.abs().max() / 254
    assert not table[3].any()
    ids = torch.tensor([[3, 7], [49, 7]])
    assert torch.equal(table[ids], table.dequantize()[ids])
    assert table.codes.nbytes + table.scales.nbytes == 50 * (12 + 4)


def test_the_backward_pass_dequantises_again_and_holds_no_weight() -> None:
    linear = nn.Linear(64, 8)
    rounded_weight = quantize(linear.weight, "int8").dequantize()
    made = quantize_linear(linear, "int8", torch.empty(0))
    x = torch.randn(5, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = quantized_linear(x, made.quantized, made.bias)
    assert not saved
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, rounded_weight.sum(0).expand(5, 64))
    torch.testing.assert_close(y, x @ rounded_weight.T + made.bias)


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@torch.no_grad()
def test_the_key_of_a_fused_linear_is_held_apart_where_query_and_value_are_quantised_by_the_adapter(
    quant_type: str | None, tmp_path: Path
) -> None:
    architecture = DECODERS["GPT-2"]
    backbone = make(architecture.choice, f"model.path={architecture.save(tmp_path)}")
    method = adapter("qlora", "target_modules=qv")
    fused = {name: m for name, m in backbone.network.named_modules() if isinstance(m, FusedLinear)}
    before = {name: m.weight.clone() for name, m in fused.items()}
    offload = method.replaced_weights(backbone)
    backbone.to(CPU, FP32, trained=False, offload=offload, quantization=Quantization(quant_type))
    pack = stir(Pack(backbone, [Member(method, 0)]))
    for module in fused.values():
        assert [part.is_held for part in module.parts.values()] == [False, True, False]
    sizes = pack.weight_bytes([0])
    width, layers = 32, len(fused)
    rows = quantize(torch.zeros(width, width), "nf4")
    codes = rows.codes.nbytes + rows.scales.nbytes
    linears = [m for m in Backbone.linears(backbone).values() if not isinstance(m, FusedLinear | LinearRows)]
    others = (
        sum(4 * m.weight.numel() for m in linears)
        if quant_type is None
        else sum(int(m.weight.numel() * 0.5625) for m in linears)
    )
    key = 4 * width * width if quant_type is None else codes
    assert sizes["backbone_linears_bytes"] == layers * (2 * codes + key) + others
    # What the model computes is what the joined weight computes.
    batch = random_batch(backbone)
    expected, merged, head = pack(batch)[0], pack.merged(0), pack.head_parameters(0)
    pack.detach()
    backbone.dequantize()
    for name, tensor in {**merged, **head}.items():
        module, _, key_name = name.rpartition(".")
        getattr(backbone.network.get_submodule(module), key_name).copy_(tensor)
    torch.testing.assert_close(backbone.run_network(batch).logits, expected, atol=1e-4, rtol=0)
    if quant_type is None:  # the key is the checkpoint's
        for name, weight in before.items():
            module = fused[name]
            assert torch.equal(module.weight[module.parts["k"].rows], weight[module.parts["k"].rows])
