"""LoRA-XS is the paper's: frozen singular vectors on both sides, singular values on the input's, R alone is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_bench.adapters.methods.lora_xs import SIGMA, LoRAXSUpdate
from lora_bench.adapters.pack.member import Member, stream
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.backbones.dropout import keep_mask
from lora_bench.errors import Code
from tests.adapters.tools import adapter, assert_close, assert_out_of_range, merged_logits, pack, stir, train, trainer
from tests.backbones.tools import FORMS, enliven, held, make, random_batch, reference, save, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

every_form = pytest.mark.parametrize("form", FORMS)
TALL, WIDE = enliven(nn.Linear(32, 48)), enliven(nn.Linear(48, 32))
either_shape = pytest.mark.parametrize("base", [TALL, WIDE], ids=["tall", "wide"])


def update(base: Any, *overrides: str, seed: int = 0) -> LoRAXSUpdate:
    made = adapter("lora_xs", *overrides).update("some.linear", base, stream(seed, "adapter"), stream(seed, "dropout"))
    assert isinstance(made, LoRAXSUpdate)
    return made


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@either_shape
def test_output_and_gradient_are_those_of_the_authors_formula(base: Any) -> None:
    # The paper's eq. 2 as its authors corrected and coded it: x W + s x A R B, where W is (in, out), W = U Σ Vᵀ by
    # singular values, A = U_r Σ_r and B = V_rᵀ.
    made = update(base, "rank=5", "alpha=7")
    U, S, Vh = torch.linalg.svd(base.weight.detach().double().T, full_matrices=False)
    A, B = U[:, :5] * S[:5], Vh[:5]
    signs = (made.lora_B.double() * B.T).sum(0).sign()  # each pair of singular vectors has one sign to choose
    A, B = A * signs, B * signs[:, None]
    R = draw(5, 5).double().requires_grad_()
    with torch.no_grad():
        made.latent.copy_(R.T)
    x = draw(2, 3, base.in_features)
    expected = base(x).double() + 7 / 5 * x.double() @ A @ R @ B
    got = made(x, base(x))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    towards = draw(*got.shape)
    (got * towards).sum().backward()
    (expected * towards).sum().backward()
    assert R.grad is not None
    assert made.latent.grad is not None
    torch.testing.assert_close(made.latent.grad.double(), R.grad.T, atol=1e-5, rtol=1e-5)


@either_shape
def test_with_r_the_identity_it_is_the_best_approximation_of_the_weight(base: Any) -> None:
    made = update(base, "rank=6", "alpha=6")
    with torch.no_grad():
        made.latent.copy_(torch.eye(6))
    delta = made.merge(torch.zeros_like(base.weight), None)[0].detach()
    rest = torch.linalg.svdvals(base.weight.detach())[6:]  # Eckart and Young
    torch.testing.assert_close((base.weight - delta).norm(), rest.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.lora_B.T @ made.lora_B, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.lora_A.norm(dim=1), torch.linalg.svdvals(base.weight.detach())[:6])


def test_r_alone_is_trained_and_begins_as_small_noise_from_the_seed() -> None:
    base = enliven(nn.Linear(300, 200))
    one, same, other = (update(base, "rank=150", seed=seed) for seed in (5, 5, 6))
    assert [(name, tuple(p.shape)) for name, p in one.named_parameters()] == [("latent", (150, 150))]
    assert one.latent.std().item() == pytest.approx(SIGMA, rel=0.03)
    assert abs(one.latent.mean().item()) < SIGMA * 0.03
    assert torch.equal(one.latent, same.latent)
    assert not torch.equal(one.latent, other.latent)
    assert torch.equal(one.lora_A, other.lora_A)  # the frozen part is the weight's, whatever the seed
    assert torch.equal(one.lora_B, other.lora_B)


@every_form
def test_each_module_trains_as_many_parameters_as_the_rank_squared(form: str) -> None:
    made = pack(form, (adapter("lora_xs", "rank=7"), 0))
    assert made.count_parameters(0)["adapter"] == 49 * len(made.targets[0])


def test_training_leaves_the_singular_vectors_as_they_were() -> None:
    made = pack("bert", (adapter("lora_xs", "rank=7"), 0))
    updates: Any = list(made.updates[0].values())
    before = [(u.lora_A.clone(), u.lora_B.clone(), u.latent.detach().clone()) for u in updates]
    train(made, settings=trainer(3))
    for u, (A, B, R) in zip(updates, before, strict=True):
        assert torch.equal(u.lora_A, A)
        assert torch.equal(u.lora_B, B)
        assert not torch.equal(u.latent, R)


def test_two_seeds_in_a_pack_learn_what_they_learn_alone() -> None:
    settings = adapter("lora_xs", "rank=7", "dropout=0.2")
    alone = [train(pack("bert", (settings, seed)), settings=trainer(4))[1][0] for seed in (0, 1)]
    _, together = train(pack("bert", (settings, 0), (settings, 1)), settings=trainer(4))
    for lone, member in zip(alone, together, strict=True):
        assert_close(lone, member, atol=1e-4)


def test_dropout_falls_on_the_updates_input_alone_and_only_in_training() -> None:
    made = enliven(update(WIDE, "rank=6", "dropout=0.5", seed=3))
    assert isinstance(made, LoRAXSUpdate)
    delta = made.merge(torch.zeros_like(WIDE.weight), None)[0].detach()
    x = draw(2, 5, 48)
    y = WIDE(x)
    mask = keep_mask(x, 0.5, stream(3, "dropout"))
    torch.testing.assert_close(made.train()(x, y), y + (x * mask) @ delta.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(made.eval()(x, y), y + x @ delta.T, atol=1e-4, rtol=0)


def test_it_stays_fp32_beside_a_bf16_base() -> None:
    base = nn.Linear(48, 32, dtype=torch.bfloat16)
    made = update(base, "rank=4")
    x = draw(3, 48).bfloat16()
    assert made(x, base(x)).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32}


@every_form
def test_merged_weights_say_what_the_update_says(form: str) -> None:
    made = stir(pack(form, (adapter("lora_xs"), 0))).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made(batch)
    torch.testing.assert_close(merged_logits(made, 0, batch), logits, atol=1e-5, rtol=0)


# -- files --


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@torch.no_grad()
def test_peft_reads_it_as_a_lora_and_says_the_same(tmp_path: Path) -> None:
    backbone = make("tiny_bert")
    folder = save(tmp_path / "body", backbone.network.base_model, backbone.tokenizer)
    settings = adapter("lora_xs", "rank=6", "alpha=9", "target_modules=qv")
    made = stir(pack("bert", (settings, 0), backbone=make("bert", f"model.path={folder}"))).eval()
    files.save(tmp_path / "adapter", made, 0, str(folder))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = random_batch(made.backbone)
    (logits,) = made(batch)
    assert spread(logits) > 1e-3
    torch.testing.assert_close(logits, reference(theirs.get_base_model().eval(), batch), atol=1e-5, rtol=0)


@either_shape
def test_a_file_gives_back_the_same_tensors_without_a_decomposition(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = adapter("lora_xs", "rank=6")
    made = enliven(update(base, "rank=6"))
    assert isinstance(made, LoRAXSUpdate)
    monkeypatch.delattr("lora_bench.adapters.methods.lora_xs.singular_triplets")
    other = settings.update("some.linear", base, None, stream(1, "dropout"))
    assert not any(tensor.any() for tensor in other.state_dict().values())
    other.load_tensors({name: tensor.clone() for name, tensor in made.to_tensors().items()})
    assert_close(other.state_dict(), made.state_dict(), atol=0)


def test_saved_and_loaded_gives_identical_logits(tmp_path: Path) -> None:
    made = stir(pack("roberta", (adapter("lora_xs"), 0))).eval()
    files.save(tmp_path, made, 0, "")
    assert len(held(tmp_path / "adapter_model.safetensors")) == 3 * len(made.targets[0]) + len(made.head_parameters(0))
    member = Member(made.members[0].adapter, seed=1, saved_ranks=made.ranks(0))
    other = Pack(make(*FORMS["roberta"]), [member]).eval()
    files.load(tmp_path, other, 0)
    batch = random_batch(made.backbone)
    with torch.no_grad():
        assert torch.equal(other(batch), made(batch))


# -- settings --


@pytest.mark.parametrize("setting", ["rank=0", "alpha=0.0", "dropout=1.0"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    assert_out_of_range("lora_xs", setting)


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    assert update(WIDE, "rank=32").rank == 32
    with refuses(Code.INVALID_VALUE, key="rank") as caught:
        update(WIDE, "rank=33")
    assert caught.value.value == 33
    assert "some.linear (32 by 48)" in str(caught.value)
