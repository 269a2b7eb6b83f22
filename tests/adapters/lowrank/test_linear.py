"""The low-rank linear: its three equations against closed forms, in fp32 and bf16, and what it keeps of itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench.adapters.lowrank.linear import LowRank, _LowRankLinear
from lora_bench.adapters.pack.member import stream
from lora_bench.backbones.quantization import quantize
from tests.adapters.tools import assert_close
from tests.backbones.tools import enliven

OUT, IN, RANK = 24, 40, 3


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    return enliven(nn.Linear(IN, OUT, bias=bias)).to(dtype).requires_grad_(False)  # type: ignore[return-value]


def low_rank(base: nn.Linear, *, scaling: float = 1.7, **options: Any) -> LowRank:
    A, B = draw(RANK, IN, seed=1, scale=0.3), draw(OUT, RANK, seed=2, scale=0.3)
    return LowRank(base, A, B, scaling, 0.0, stream(0, "dropout"), **options)


def output(made: LowRank, base: nn.Linear, x: Tensor) -> Tensor:
    return made(x, base(x) if made.takes_output else x)


def move(made: LowRank) -> None:
    """Away from where it began, as training would."""
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(draw(*p.shape, seed=10 + i, scale=0.1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", [False, True])
def test_a_magnitude_is_equation_5_of_dora(start: bool, bias: bool) -> None:
    base = linear(bias=bias)
    made = low_rank(base)
    W, s = base.weight, made.scaling
    subtracted = torch.zeros(OUT, IN)
    if start:
        made.initialise(draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4), subtract=True)
        subtracted = s * made.lora_B.detach() @ made.lora_A.detach()
    made.add_magnitude()
    assert made.magnitude is not None
    move(made)
    x = draw(2, 5, IN)
    direction = W + s * made.lora_B @ made.lora_A - subtracted
    # Section 4.3 of the paper: the norm is a constant in the backward pass.
    weight = made.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    expected = x @ weight.T + (base.bias if bias else 0)
    found = output(made, base, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.merge(W, base.bias)[0], weight, atol=1e-5, rtol=0)
    parameters = dict(made.named_parameters())
    weights = draw(2, 5, OUT, seed=5)
    ours = torch.autograd.grad((found * weights).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_has_the_gradients_of_its_formula(bias: bool, scaled: bool, dropout: bool) -> None:
    x, weight = draw(6, IN).double().requires_grad_(), draw(OUT, IN, seed=1).double()
    mask = (draw(6, IN, seed=2) > 0) / 0.5 if dropout else torch.ones(())
    A, B = (draw(*shape, seed=3).double().requires_grad_() for shape in ((RANK, IN), (OUT, RANK)))
    ratio = (draw(OUT, seed=4).double().abs() + 0.5).requires_grad_() if scaled else None
    shift = draw(OUT, seed=5).double() if bias else None
    learned = [x, A, B, *([] if ratio is None else [ratio])]
    out = _LowRankLinear.apply(x, x * mask if dropout else x, weight, shift, A, B, 1.7, ratio)
    expected = (x @ weight.T + 1.7 * (x * mask) @ A.T @ B.T) * (1 if ratio is None else ratio)
    expected = expected if shift is None else expected + shift
    torch.testing.assert_close(out, expected)
    weights = draw(6, OUT, seed=6).double()
    ours = torch.autograd.grad((out * weights).sum(), learned)
    theirs = torch.autograd.grad((expected * weights).sum(), learned)
    torch.testing.assert_close(ours, theirs)


def test_a_ratio_close_to_1_is_not_rounded_before_it_is_used() -> None:
    x, weight = draw(64, IN).bfloat16(), draw(OUT, IN, seed=2).bfloat16()
    ratio = torch.full((OUT,), 1.005)  # bf16 has no number between 1 and 1.0078
    nothing = torch.zeros(RANK, IN), torch.zeros(OUT, RANK)
    out = _LowRankLinear.apply(x, x, weight, None, *nothing, 1.0, ratio).float()
    plain = x.float() @ weight.float().T
    found = (out * plain).sum() / (plain * plain).sum()  # the factor that explains the output best
    assert found.item() == pytest.approx(1.005, abs=1e-3)


def test_a_magnitude_begins_at_the_norms_and_changes_nothing() -> None:
    base = linear()
    made = low_rank(base)
    made.initialise(draw(RANK, IN), torch.zeros(OUT, RANK), subtract=False)
    made.add_magnitude()
    x = draw(4, IN)
    torch.testing.assert_close(made.magnitude, base.weight.norm(dim=1))
    torch.testing.assert_close(output(made, base, x), base(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subtracted_start_is_exactly_the_backbones_function(dtype: torch.dtype) -> None:
    base = linear(dtype)
    made = low_rank(base)
    made.initialise(draw(RANK, IN), draw(OUT, RANK), subtract=True)
    x = draw(2, 5, IN).to(dtype)
    assert torch.equal(output(made, base, x), base(x))
    assert torch.equal(made.merge(base.weight.float(), None)[0], base.weight.float())


def test_small_steps_away_from_a_large_start_survive_bf16() -> None:
    """Steps of a thousandth are below what bf16 resolves beside a start of order one."""
    base = linear(torch.bfloat16, bias=False)
    base.weight.zero_()
    made = low_rank(base, scaling=1.0)
    made.initialise(draw(RANK, IN), draw(OUT, RANK), subtract=True)
    before = made.lora_B.detach() @ made.lora_A.detach()
    with torch.no_grad():
        made.lora_A.add_(draw(RANK, IN, seed=7, scale=1e-3))
        made.lora_B.add_(draw(OUT, RANK, seed=8, scale=1e-3))
    x = draw(64, IN).bfloat16()
    change = output(made, base, x).float()
    expected = x.float() @ (made.lora_B @ made.lora_A - before).T
    assert (change - expected).norm() < 0.01 * expected.norm()
    rounded = (made.lora_B.bfloat16().float() @ made.lora_A.bfloat16().float()) - before
    assert (x.float() @ rounded.T - expected).norm() > 0.3 * expected.norm()  # what casting A and B alone would give


def test_the_same_change_is_a_lora_of_twice_the_rank() -> None:
    base = linear()
    made = low_rank(base)
    made.initialise(draw(RANK, IN), draw(OUT, RANK), subtract=True)
    move(made)
    saved = made.to_tensors()
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        "lora_A.weight": (2 * RANK, IN),
        "lora_B.weight": (OUT, 2 * RANK),
    }
    change = made.scaling * saved["lora_B.weight"] @ saved["lora_A.weight"]
    torch.testing.assert_close(base.weight + change, made.merge(base.weight, None)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_what_is_saved_comes_back_bit_for_bit(kind: str | None, subtract: bool, magnitude: bool) -> None:
    base = linear()

    def make(scale: float) -> LowRank:
        made = low_rank(base)
        if kind:
            made.quantize_base(quantize(base.weight * scale, kind))
        made.initialise(draw(RANK, IN, scale=scale), draw(OUT, RANK, scale=scale), subtract=subtract)
        if magnitude:
            made.add_magnitude()
        return made

    made, other = make(1.0), make(0.5)
    move(made)
    other.load_tensors({name: tensor.clone() for name, tensor in made.to_tensors().items()})
    x = draw(2, 5, IN)
    assert torch.equal(output(other, base, x), output(made, base, x))
    assert_close(dict(other.state_dict()), dict(made.state_dict()), atol=0)


def test_a_quantised_base_stands_in_the_frozen_ones_stead() -> None:
    base = linear()
    before = copy.deepcopy(base.state_dict())
    made = low_rank(base)
    quantized = quantize(base.weight, "int4")
    made.quantize_base(quantized)
    Q = quantized.dequantize()
    x = draw(2, 5, IN)
    weight = Q + made.scaling * made.lora_B @ made.lora_A
    torch.testing.assert_close(output(made, base, x), x @ weight.T + base.bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.merge(base.weight, base.bias)[0], weight)
    assert (Q - base.weight).abs().max() > 0.01
    assert_close(base.state_dict(), before, atol=0)
    assert set(dict(made.named_parameters())) == {"lora_A", "lora_B"}


def test_a_frozen_factor_is_kept_and_not_trained() -> None:
    base = linear()
    made = low_rank(base, freeze_A=True)
    assert set(dict(made.named_parameters())) == {"lora_B"}
    assert torch.equal(made.to_tensors()["lora_A.weight"], draw(RANK, IN, seed=1, scale=0.3))
    output(made, base, draw(2, IN)).sum().backward()
    assert made.lora_A.grad is None
    assert made.lora_B.grad is not None


@pytest.mark.parametrize("option", ["lora", "dora"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_may_change_the_output_in_place(option: str, bias: bool) -> None:
    """As DeBERTa scales its position scores; the gradients are those of the same without it."""
    gradients = []
    base = linear(bias=bias)
    for in_place in (True, False):
        made = low_rank(base)
        if option == "dora":
            made.add_magnitude()
        x = draw(2, 5, IN).requires_grad_()
        y = output(made, base, x)
        y = y.mul_(0.5) if in_place else y * 0.5
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *made.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_start_sets_the_magnitude_to_the_norms_of_what_it_begins_as() -> None:
    base = linear()
    made = low_rank(base)
    made.add_magnitude()
    A, B = draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4)
    made.initialise(A, B, subtract=False)
    started = base.weight + made.scaling * B @ A
    torch.testing.assert_close(made.magnitude, started.norm(dim=1))
    torch.testing.assert_close(made.merge(base.weight, base.bias)[0], started, atol=1e-5, rtol=0)
