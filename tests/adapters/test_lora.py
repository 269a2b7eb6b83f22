"""LoRA is the paper's: equal to peft's with equal tensors, begun as loralib begins, dropping what its seed says."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.lora import LoRAUpdate, keep_mask
from lora_bench.adapters.pack import stream
from lora_bench.errors import UserError
from tests.adapters.tools import adapter, assert_close, doubled, pack, stir, trainer
from tests.adapters.tools import train as fit
from tests.backbones.tools import FORMS, enliven, random_batch, reference

BASE = enliven(nn.Linear(48, 32))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def update(*overrides: str, seed: int = 0, base: nn.Linear = BASE) -> LoRAUpdate:
    made = adapter("lora", *overrides).update("some.linear", base, stream(seed, "adapter"), stream(seed, "dropout"))
    assert isinstance(made, LoRAUpdate)
    return made


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("settings", [("rank=3", "alpha=7"), ("rank=8", "alpha=2", "target_modules=qv", "layers=[1]")])
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_are_those_of_peft(form: str, settings: tuple[str, ...]) -> None:
    chosen = adapter("lora", *settings)
    ours = stir(pack(form, (chosen, 0))).eval()
    twin = pack(form, (chosen, 0))
    twin.detach()
    theirs = copy.deepcopy(twin.network)
    config = peft.LoraConfig(r=chosen.rank, lora_alpha=chosen.alpha, target_modules=ours.targets[0], lora_dropout=0.0)
    peft.get_peft_model(theirs, config)  # in place
    names = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.adapter_parameters(0).items():
            names[f"{name}.default.weight"].copy_(p)
        for name, p in ours.head_parameters(0).items():
            names[name].copy_(p)
    doubled(ours)  # a gradient of T5 in fp32 is a matter of luck in its last digits
    theirs.double()
    batch = random_batch(ours.backbone)
    assert batch.labels is not None
    (logits,) = ours(batch)
    expected = reference(theirs.eval(), batch, getattr(ours.backbone, "label_tokens", None))
    torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=0)
    F.cross_entropy(logits, batch.labels).backward()
    F.cross_entropy(expected, batch.labels).backward()
    compared = 0
    for name, p in ours.adapter_parameters(0).items():
        expected_gradient = names[f"{name}.default.weight"].grad
        torch.testing.assert_close(p.grad, expected_gradient, atol=1e-5, rtol=1e-4)
        compared += bool(expected_gradient.abs().max() > 1e-4)
    assert compared > len(ours.targets[0])  # more than half of the gradients are far above the tolerance


def test_the_update_is_equation_3() -> None:
    made = update("rank=4", "alpha=6")
    enliven(made)
    x = draw(2, 5, 48)
    y = BASE(x)
    expected = x @ (BASE.weight + 6 / 4 * made.lora_B @ made.lora_A).T + BASE.bias
    torch.testing.assert_close(made(x, y), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.delta_weight(), 6 / 4 * made.lora_B @ made.lora_A)
    assert not made.delta_weight().requires_grad
    assert (made.lora_A.shape, made.lora_B.shape, made.rank) == ((4, 48), (32, 4), 4)


def test_it_begins_as_loralib_begins() -> None:
    base = nn.Linear(400, 300)
    made = update("rank=64", base=base)
    bound = 1 / math.sqrt(400)  # Kaiming uniform with a = sqrt(5)
    assert bound * 0.99 < made.lora_A.max() <= bound
    assert -bound <= made.lora_A.min() < -bound * 0.99
    assert abs(made.lora_A.mean()) < bound * 0.02
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not made.lora_B.any()


def test_the_base_is_never_written_to() -> None:
    before = copy.deepcopy(BASE.state_dict())
    made = update()
    x = draw(3, 48)
    made(x, BASE(x)).sum().backward()
    assert_close(BASE.state_dict(), before, atol=0)
    assert not [p for p in made.parameters() if p is BASE.weight or p is BASE.bias]


def test_parameters_stay_fp32_beside_a_bf16_base() -> None:
    base = nn.Linear(48, 32, dtype=torch.bfloat16)
    made = update("rank=2", base=base)
    x = draw(3, 48).bfloat16()
    assert made(x, base(x)).dtype == torch.bfloat16
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert made.delta_weight().dtype == torch.float32


# -- dropout --


def test_dropout_keeps_the_share_it_says_and_the_mean() -> None:
    mask = keep_mask(torch.empty(400, 500), 0.3, stream(0, "dropout"))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)


def test_dropout_falls_on_the_updates_input_alone_and_only_in_training() -> None:
    made = update("rank=4", "dropout=0.5", seed=3)
    enliven(made)
    x = draw(2, 5, 48)
    y = BASE(x)
    mask = keep_mask(x, 0.5, stream(3, "dropout"))
    torch.testing.assert_close(made(x, y), y + (x * mask) @ made.delta_weight().T, atol=1e-5, rtol=0)
    assert not torch.equal(made(x, y), made(x, y))  # a new mask each time
    made.eval()
    torch.testing.assert_close(made(x, y), y + x @ made.delta_weight().T, atol=1e-5, rtol=0)


def test_dropout_comes_from_the_members_seed_and_not_from_the_global_stream() -> None:
    x = draw(2, 5, 48)

    def outputs(seed: int) -> Tensor:
        made = update("dropout=0.5", seed=seed)
        enliven(made)
        return made(x, BASE(x))

    before = torch.get_rng_state()
    assert torch.equal(outputs(0), outputs(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(outputs(0), outputs(1))


class Losses:
    """A watcher that keeps the training losses."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def stepped(self, step: int, losses: list[float], pairs: int) -> None:
        self.seen.append(list(losses))

    def evaluated(self, member: int, line: dict[str, object]) -> None:
        pass


def losses(dropout: float, eval_every: int) -> list[list[float]]:
    made = pack("bert", (adapter("lora", f"dropout={dropout}"), 0))
    watcher = Losses()
    fit(made, settings=trainer(6, eval_every=eval_every), watcher=watcher)
    return watcher.seen


def test_looking_at_the_selection_split_changes_nothing_of_training_with_dropout() -> None:
    seldom, often = losses(0.5, 10_000), losses(0.5, 1)
    assert often == seldom
    assert seldom[1:] != losses(0.0, 10_000)[1:]


# -- seeds --


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_reaches_adapter_and_head(form: str) -> None:
    one, same, other = (pack(form, (adapter("lora"), seed)) for seed in (5, 5, 6))
    assert_close(one.state(0), same.state(0), atol=0)
    state, unlike = one.state(0), other.state(0)
    assert all(not torch.equal(p, unlike[name]) for name, p in state.items() if name.endswith("lora_A"))
    drawn = [n for n, p in one.head_parameters(0).items() if p.ndim > 1]
    assert all(not torch.equal(state[name], unlike[name]) for name in drawn)
    assert bool(drawn) == (form != "t5")


def test_the_rank_does_not_reach_the_head() -> None:
    one, other = (pack("bert", (adapter("lora", f"rank={rank}"), 0)) for rank in (1, 8))
    assert_close(dict(one.head_parameters(0)), dict(other.head_parameters(0)), atol=0)


# -- settings --


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("rank=0", "must be a finite number of at least 1"),
        ("rank=-3", "must be a finite number of at least 1"),
        ("rank=2.5", "is not a whole number"),
        ("alpha=0", "must be a finite number above 0"),
        ("alpha=nan", "must be a finite number above 0"),
        ("alpha=1e400", "must be a finite number above 0"),
        ("dropout=1", "must be at least 0 and below 1"),
        ("dropout=-0.1", "must be at least 0 and below 1"),
        ("dropout=nan", "must be at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^adapter\.{setting.partition('=')[0]}=.*: {reason}"):
        adapter("lora", setting)


def test_a_rank_above_the_smaller_side_is_refused_and_leaves_the_backbone_as_it_was() -> None:
    assert update("rank=32").rank == 32
    with pytest.raises(UserError, match=r"^rank=33: is above 32, the smaller side of some\.linear \(32 by 48\)"):
        update("rank=33")
    fine = pack("bert", (adapter("lora", "rank=32"), 0))
    fine.detach()
    before = dict(fine.network.named_modules())
    with pytest.raises(UserError, match=r"^adapter\.rank=33: is above 32, the smaller side of bert\.encoder\.layer\.0"):
        pack("bert", (adapter("lora"), 0), (adapter("lora", "rank=33"), 0), backbone=fine.backbone)
    assert dict(fine.network.named_modules()) == before
