"""How A and B begin is what the papers say: peft's PiSSA and OLoRA, singular vectors by numpy and scikit-learn."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn

from lora_bench.adapters.lowrank import init
from lora_bench.adapters.lowrank.calibration_batches import weight_gradients
from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.pack.member import stream
from lora_bench.config.adapter_values import INITS
from tests.adapters.tools import adapter, assert_close, pack, tables, trainer
from tests.backbones.tools import FORMS, random_batch
from tests.training.tools import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = [(32, 32), (24, 40), (40, 24)]
FROM_GRADIENT = {"lora_ga": init.lora_ga, "lora_one": init.lora_one}


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """A random matrix with the falling singular values that weights and gradients have."""
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator).double(), full_matrices=False)
    values = 3.0 * 0.8 ** torch.arange(min(shape))
    return ((U * values) @ V).float()


def linear(*shape: int) -> nn.Linear:
    made = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        made.weight.copy_(matrix(*shape))
        made.bias.copy_(matrix(shape[0], 1)[:, 0])
    return made


def best(W: Tensor, first: int, last: int) -> Tensor:
    """The part of W that its singular triplets `first` to `last` make up, by numpy in fp64."""
    U, S, V = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, first:last] * S[first:last]) @ V[first:last])


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one.double(), other.double(), atol=atol, rtol=0)


# -- random --


@pytest.mark.parametrize(("name", "theirs"), [("kaiming", True), ("gaussian", "gaussian"), ("lora_one", True)])
def test_random_starts_are_drawn_as_peft_draws_them(name: str, theirs: Any) -> None:
    config = peft.LoraConfig(r=6, target_modules=["0"])
    with torch.random.fork_rng():
        layer = peft.get_peft_model(nn.Sequential(nn.Linear(48, 32)), config).base_model.model[0]
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", theirs)
    A = init.random_A(name, 6, 48, torch.Generator().manual_seed(7))
    assert torch.equal(A, layer.lora_A["default"].weight)


def test_no_start_touches_the_global_random_stream() -> None:
    before = torch.get_rng_state()
    generator = stream(0, "adapter")
    assert set(INITS) == {"kaiming", "gaussian", "loftq", *init.FROM_WEIGHT, *init.FROM_DATA}
    for name in INITS:
        assert init.random_A(name, 4, 40, generator).shape == (4, 40)
    for from_weight in init.FROM_WEIGHT.values():
        from_weight(matrix(24, 40), 4, 2.0)
    for from_gradient in FROM_GRADIENT.values():
        from_gradient(matrix(24, 40), 4, 2.0, 16.0)
    init.eva(matrix(24, 24) @ matrix(24, 24).T, 4)
    assert torch.equal(torch.get_rng_state(), before)


# -- from the frozen weight --


def peft_twin(base: nn.Linear, settings: Any) -> Any:
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.scaling == "rank_stable",
        init_lora_weights=settings.init,
        target_modules=["0"],
    )
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]


def ours(base: nn.Linear, settings: Any) -> LowRank:
    made = settings.update("some.linear", base, stream(0, "adapter"), stream(0, "dropout"))
    assert isinstance(made, LowRank)
    return made


@pytest.mark.filterwarnings("ignore:(?s).*:UserWarning:peft")
@pytest.mark.parametrize("scaling", ["standard", "rank_stable"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_starts_are_those_of_peft_and_stay_so_over_a_step(method: str, shape: tuple[int, int], scaling: str) -> None:
    settings = adapter(method, "rank=5", "alpha=7", f"scaling={scaling}")
    base = linear(*shape)
    made, twin = ours(base, settings), peft_twin(base, settings)
    theirs = {key: getattr(twin, key)["default"].weight for key in ("lora_A", "lora_B")}
    close(made.lora_B @ made.lora_A, theirs["lora_B"] @ theirs["lora_A"])
    # Up to the sign of each rank they are peft's own.
    signs = (made.lora_B * theirs["lora_B"]).sum(0).sign()
    close(made.lora_B * signs, theirs["lora_B"])
    close(made.lora_A * signs[:, None], theirs["lora_A"])

    x, goal = matrix(20, shape[1], seed=1), matrix(20, shape[0], seed=2)
    close(made(x, base(x)), base(x), atol=0)
    for module, output in ((made, lambda: made(x, base(x))), (twin, lambda: twin(x))):
        parameters = [p for name, p in module.named_parameters() if "lora" in name]
        F.mse_loss(output(), goal, reduction="sum").backward()
        torch.optim.SGD(parameters, lr=1e-3).step()
    weight, bias = made.merge(base.weight, base.bias)
    expected = twin.base_layer.weight + twin.scaling["default"] * theirs["lora_B"] @ theirs["lora_A"]
    assert (expected - base.weight).norm() > 0.05
    close(weight, expected)
    assert bias is base.bias


@pytest.mark.parametrize("shape", SHAPES)
def test_milora_is_what_the_best_approximation_leaves(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    A, B = init.milora(W, 6, 2.0)
    smaller = min(shape)
    close(2.0 * B @ A, best(W, smaller - 6, smaller))
    close(2.0 * B @ A + best(W, 0, smaller - 6).float(), W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_singular_starts_are_shared_out_evenly(name: str, shape: tuple[int, int]) -> None:
    A, B = init.FROM_WEIGHT[name](matrix(*shape), 6, 2.0)
    first = 0 if name == "pissa" else min(shape) - 6
    expected = torch.linalg.svdvals(matrix(*shape).double())[first : first + 6].diag() / 2.0
    close(A.double() @ A.double().T, expected)
    close(B.double().T @ B.double(), expected)


def test_singular_starts_keep_their_digits_at_the_size_and_condition_of_real_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(768, 256, generator=generator) * 0.05
    W[:, 0] *= 100  # outlier features: the condition number squares in a Gram matrix
    W[:, 1] *= 1e-2
    for first, start in ((0, init.pissa), (248, init.milora)):
        A, B = start(W, 8, 1.0)
        expected = best(W, first, first + 8)
        assert (B.double() @ A.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("rank", [1, 24])
@pytest.mark.parametrize("name", init.FROM_WEIGHT)
def test_the_lowest_and_the_highest_rank_can_be_asked_for(name: str, rank: int) -> None:
    A, B = init.FROM_WEIGHT[name](matrix(24, 40), rank, 2.0)
    assert (A.shape, B.shape, A.dtype, B.dtype) == ((rank, 40), (24, rank), torch.float32, torch.float32)
    if rank == 24:
        close((1.0 if name == "olora" else 2.0) * B @ A, matrix(24, 40))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_a_start_that_is_taken_out_leaves_the_backbones_function(method: str, form: str) -> None:
    made = pack(form, (adapter(method), 0)).eval()
    (logits,) = made(random_batch(made.backbone))
    plain = pack(form, (adapter("lora"), 0)).eval()
    assert torch.equal(logits, plain(random_batch(plain.backbone))[0])
    assert all(update.lora_B.abs().max() > 1e-3 for update in made.updates[0].values())  # type: ignore[operator, union-attr]


# -- EVA --


def test_eva_spans_what_a_truncated_svd_of_the_inputs_spans() -> None:
    X = matrix(300, 40) + 0.1  # (tokens, in), with a mean
    moment = X.T @ X / len(X)
    A = init.eva(moment, 6)
    close(A @ A.T, torch.eye(6))
    expected = TruncatedSVD(6, algorithm="arpack").fit(X.double().numpy()).components_
    close((A.double() @ torch.from_numpy(expected.copy()).T).abs(), torch.eye(6), atol=1e-3)
    values = np.linalg.svd(X.double().numpy(), compute_uv=False) ** 2
    ratios = init.explained_variance_ratios({"some.linear": moment})["some.linear"]
    close(ratios, torch.from_numpy(values / values.sum()), atol=1e-5)


def test_inputs_that_are_all_zero_explain_nothing() -> None:
    ratios = init.explained_variance_ratios({"idle": torch.zeros(5, 5)})["idle"]
    assert torch.equal(ratios, torch.zeros(5))
    assert torch.isfinite(init.eva(torch.zeros(5, 5), 2)).all()


# -- LoRA-GA and LoRA-One --


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_of_lora_ga_goes_along_the_best_approximation_of_twice_the_rank(shape: tuple[int, int]) -> None:
    # Theorem 3.1: of all A and B of rank r, none gives a first-order change of s B A nearer to a multiple of G.
    G, gamma = matrix(*shape), 16.0
    settings = adapter("lora_ga", "rank=5", f"init_gamma={gamma}")
    base = linear(*shape)
    made = ours(base, settings)
    s = settings.factor
    assert s == pytest.approx(16 / math.sqrt(5))
    made.initialise(*init.lora_ga(G, 5, s, gamma), subtract=True)
    made.double()
    base.double()
    x = torch.eye(shape[1]).double()
    y = torch.zeros(shape[1], shape[0]).double()
    (made(x, y).T * G.double()).sum().backward()  # so that ∂L/∂W is G
    rate = 1e-6
    torch.optim.SGD(made.parameters(), lr=rate).step()
    change = made.merge(torch.zeros(shape).double(), None)[0].detach() / rate
    close(change, -(s**2) * math.sqrt(shape[0]) / gamma * best(G, 0, 10), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_begins_with_orthogonal_factors_of_the_papers_length(shape: tuple[int, int]) -> None:
    A, B = init.lora_ga(matrix(*shape), 5, 2.0, 16.0)
    square = math.sqrt(shape[0]) / 16.0
    close(A @ A.T, square * torch.eye(5))
    close(B.T @ B, square * torch.eye(5))
    assert torch.equal(init.lora_ga(matrix(*shape), 5, 7.0, 16.0)[0], A)  # whatever the scaling


def test_lora_ga_with_too_few_triplets_gives_b_the_last_there_are() -> None:
    G = matrix(6, 10)
    A, B = init.lora_ga(G, 4, 1.0, 16.0)
    close(B @ B.T @ G, math.sqrt(6) / 16 * best(G, 2, 6))
    close(G @ A.T @ A, math.sqrt(6) / 16 * best(G, 0, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_one_begins_a_step_down_the_best_approximation(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    A, B = init.lora_one(G, 5, 2.0, 128.0)
    largest = torch.linalg.svdvals(G)[0]
    close(B @ A, -best(G, 0, 5) / (128 * largest), atol=1e-7)
    close(A @ A.T, B.T @ B, atol=1e-7)
    for scale in (1e-6, 1e4):  # the loss's scale is of no account
        scaled = init.lora_one(scale * G, 5, 2.0, 128.0)
        close(scaled[1] @ scaled[0], B @ A, atol=1e-7)


@pytest.mark.parametrize("start", FROM_GRADIENT.values())
def test_a_gradient_of_less_than_the_rank_gives_finite_starts(start: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for G in (torch.zeros(24, 40), torch.outer(torch.arange(24.0), torch.ones(40))):
        A, B = start(G, 4, 2.0, 16.0)
        assert torch.isfinite(A).all()
        assert torch.isfinite(B).all()
    A, B = init.lora_one(torch.zeros(24, 40), 4, 2.0, 16.0)
    assert not B.any()
    close(A @ A.T, torch.eye(4))


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_do_not_depend_on_how_the_vectors_were_found(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    for start in (init.pissa, init.milora):
        _, B = start(W, 4, 1.0)
        assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
        _, turned = start(W.flip(1), 4, 1.0)  # the same left vectors, from another decomposition
        close(turned, B, atol=1e-4)
    A, _ = init.olora(W, 4, 1.0)
    assert (A.diagonal() > 0).all()  # R's


# -- in a pack --


@pytest.mark.parametrize("form", ["bert", "t5"])
@pytest.mark.parametrize("method", ["eva", "lora_ga", "lora_one"])
def test_each_member_of_a_pack_begins_as_it_begins_alone(method: str, form: str) -> None:
    chosen = adapter(method, "calibration_batches=2")
    both = pack(form, (chosen, 0), (chosen, 1))
    prepare(both, trainer(), tables(both.backbone)[0])
    for k in range(2):
        alone = pack(form, (chosen, k))
        prepare(alone, trainer(), tables(alone.backbone)[0])
        assert both.ranks(k) == alone.ranks(0)
        changes = [made.merged(member) for made, member in ((both, k), (alone, 0))]
        assert_close(changes[0], changes[1], atol=1e-5)
        assert_close(both.state(k), alone.state(0), atol=1e-3)
    assert any(not torch.equal(p, both.state(1)[name]) for name, p in both.state(0).items() if "lora_A" in name)


@pytest.mark.parametrize("form", FORMS)
def test_lora_ga_leaves_the_backbones_function_and_lora_one_lowers_the_loss_it_looked_at(form: str) -> None:
    losses = {}
    for method in ("lora", "lora_ga", "lora_one"):
        made = pack(form, (adapter(method), 0))
        batch = random_batch(made.backbone, rows=9, length=24)
        assert batch.labels is not None
        made.members[0].adapter.prepare(made, 0, iter([batch]))
        losses[method] = F.cross_entropy(made.eval()(batch)[0], batch.labels).item()
    assert losses["lora_ga"] == losses["lora"]
    assert losses["lora_one"] < losses["lora"]


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_a_first_step_that_would_raise_the_loss_is_shortened_and_said(form: str) -> None:
    losses = {}
    for gamma in (None, 128, 0.01):
        made = pack(form, (adapter("lora" if gamma is None else "lora_one", *[f"init_gamma={gamma}"] * bool(gamma)), 0))
        batch = random_batch(made.backbone, rows=9, length=24)
        assert batch.labels is not None
        note = made.members[0].adapter.prepare(made, 0, iter([batch]))
        assert (note is None) == (gamma != 0.01)
        losses[gamma] = F.cross_entropy(made.eval()(batch)[0], batch.labels).item()
    assert note is not None
    assert int(re.search(r"1/(\d+)", note)[1]) in {4**n for n in range(1, 7)}  # type: ignore[index]
    assert losses[0.01] <= losses[None]


@pytest.mark.parametrize("method", ["eva", "lora_ga", "lora_one", "sensitivity", "enhanced"])
def test_a_start_that_would_tell_little_is_left_alone_and_said(method: str) -> None:
    needs_labels = method not in ("eva", "sensitivity")
    for rows, label in ((5, None), (20, 1)):
        made, plain = pack("bert", (adapter(method), 0)), pack("bert", (adapter("lora"), 0))
        batch = random_batch(made.backbone, rows=rows, padded=False)
        assert batch.labels is not None
        labels = batch.labels if label is None else torch.full_like(batch.labels, label)
        told = made.members[0].adapter.prepare(made, 0, iter([replace(batch, labels=labels)] * 3))
        if label == 1 and not needs_labels:
            assert told is None
            continue
        assert told is not None
        assert ("5 different training pairs are too few" if rows == 5 else "the 20 training pairs") in told
        assert "init=kaiming and allocation=uniform" in told
        for (_, p), (_, q) in zip(made.state(0).items(), plain.state(0).items(), strict=True):
            assert torch.equal(p, q)


def test_lora_one_is_the_step_of_full_fine_tuning_cut_to_the_rank() -> None:
    made, plain = (pack("bert", (adapter(method, "rank=3"), 0)) for method in ("lora_one", "lora"))
    batch = random_batch(made.backbone, rows=9, length=24)
    made.members[0].adapter.prepare(made, 0, iter([batch]))
    after, before = made.merged(0), plain.merged(0)
    for name, G in weight_gradients(plain, 0, [batch]).by_linear.items():
        rate = 16 / math.sqrt(3) / 128 / torch.linalg.svdvals(G)[0]
        close(after[f"{name}.weight"], before[f"{name}.weight"] - rate * best(G, 0, 3), atol=1e-5)
