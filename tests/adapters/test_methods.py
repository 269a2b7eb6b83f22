"""What every method promises, whichever modules lie in `lora_bench/adapters/`: a new one is tested by being there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

import lora_bench.adapters
from lora_bench.adapters import method_class, method_names, peft_format
from lora_bench.adapters.base import Adapter
from lora_bench.cli import conf_folder
from lora_bench.config import build
from lora_bench.errors import UserError
from tests.adapters.tools import adapter, assert_close, merged_logits, pack, stir, train, trainer
from tests.backbones.tools import FORMS, random_batch, spread
from tests.helpers import composed

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.adapters.pack import Pack

# The linear probe needs a head, which T5 as a text-to-text model has not.
COMBINATIONS = [(m, form) for m in method_names() for form in FORMS if (m, form) != ("head_only", "t5")]
every_method = pytest.mark.parametrize(("method", "form"), COMBINATIONS)


def one(method: str, form: str, seed: int = 0) -> Pack:
    return pack(form, (adapter(method), seed))


@every_method
def test_training_starts_from_the_backbones_own_function(method: str, form: str) -> None:
    made = one(method, form)
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made.eval()(batch)
        head = made.head_parameters(0)
        made.detach()
        for name, tensor in head.items():
            made.network.get_parameter(name).copy_(tensor)
        expected = made.backbone.suffix(made.backbone.prefix(batch, made.depth), batch, made.depth)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@every_method
def test_only_full_fine_tuning_changes_the_backbone(method: str, form: str) -> None:
    made = one(method, form)
    made.detach()
    before = made.backbone.hash()
    made = pack(form, (adapter(method), 0), backbone=made.backbone)
    start = made.state(0)
    outcomes, (end,) = train(made, settings=trainer(3))
    assert [outcome.steps for outcome in outcomes] == [3]
    assert any(not torch.equal(start[name], end[name]) for name in start)
    made.detach()
    assert (made.backbone.hash() == before) != method_class(method).trains_backbone


def cannot_matter(name: str) -> bool:
    """Whether a tensor moves no logit of a transformer, so that its gradient is zero but for rounding.

    A key's bias shifts all attention scores of a query alike; T5's decoder, at its one step, attends to itself alone.
    """
    alone = name.startswith("decoder.") and ".SelfAttention." in name
    return name.endswith("key.bias") or (alone and any(f".{p}." in name for p in ("q", "k", "relative_attention_bias")))


@every_method
def test_every_trained_tensor_gets_a_gradient_and_no_other(method: str, form: str) -> None:
    made = stir(one(method, form)).train()
    batch = random_batch(made.backbone)
    assert batch.labels is not None
    torch.nn.functional.cross_entropy(made(batch)[0], batch.labels).backward()
    trained = made.trainable(0)
    for name, p in trained.items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() or cannot_matter(name), name
    ours = {id(p) for p in trained.values()}
    assert all(p.grad is None and not p.requires_grad for p in made.parameters() if id(p) not in ours)


@every_method
def test_merged_weights_say_what_the_adapter_says(method: str, form: str) -> None:
    made = stir(one(method, form)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made(batch)
    assert spread(logits) > 1e-3
    torch.testing.assert_close(merged_logits(made, 0, batch), logits, atol=1e-5, rtol=0)


@every_method
def test_a_state_put_back_gives_identical_logits(method: str, form: str) -> None:
    made, other = stir(one(method, form)).eval(), one(method, form, seed=1).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        assert not torch.equal(made(batch), other(batch))
        state = made.state(0)
        other.load_state(0, state)
        assert torch.equal(made(batch), other(batch))
        for p in made.trainable(0).values():
            p.zero_()
    assert any(tensor.any() for tensor in state.values())  # a copy, not a view
    assert torch.equal(other.state(0)[next(iter(state))], next(iter(state.values())))


@every_method
def test_saved_and_loaded_gives_identical_logits(method: str, form: str, tmp_path: Path) -> None:
    made, other = stir(one(method, form)).eval(), one(method, form, seed=1).eval()
    batch = random_batch(made.backbone)
    peft_format.save(tmp_path / "adapter", made, 0, "")
    peft_format.load(tmp_path / "adapter", other, 0)
    assert_close(other.state(0), made.state(0), atol=0)
    with torch.no_grad():
        assert torch.equal(made(batch), other(batch))


def test_the_probe_is_refused_where_there_is_no_head() -> None:
    with pytest.raises(UserError) as caught:
        one("head_only", "t5")
    assert str(caught.value).startswith("adapter.method=head_only: this backbone answers in words and has no head")
    assert "model.form=encoder" in str(caught.value)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("method", method_names())
def test_a_default_rate_that_is_none_is_refused(method: str, rate: str) -> None:
    with pytest.raises(UserError, match=r"^adapter\.default_lr="):
        adapter(method, f"default_lr={rate}")


def test_shared_machinery_is_no_method() -> None:
    assert {"full", "head_only", "lora"} <= set(method_names())
    for name in method_names():
        assert issubclass(method_class(name), Adapter)
        assert (conf_folder() / "adapter" / f"{name}.yaml").is_file()


def test_an_unknown_method_is_refused_with_the_one_meant() -> None:
    with pytest.raises(UserError, match=r"^adapter\.method=lroa: is not one of .*\. Did you mean lora\?$"):
        method_class("lroa")
    for name in ("base", "pack", "os", "../lora", "lora.LoRA", ""):
        with pytest.raises(UserError, match="is not one of"):
            method_class(name)


MODULE = '''
from __future__ import annotations

from dataclasses import dataclass

from lora_bench.adapters.lora import LoRA, LoRAUpdate


@dataclass(frozen=True, kw_only=True)
class Louder(LoRA):
    """LoRA, so many times as loud."""

    times: float

    def update(self, name, base, init, dropout):
        update = super().update(name, base, init, dropout)
        update.scaling *= self.times
        return update
'''


def test_a_new_method_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "louder.py").write_text(MODULE)
    (tmp_path / "conf/adapter").mkdir(parents=True)
    (tmp_path / "conf/adapter/louder.yaml").write_text("defaults: [lora, _self_]\nmethod: louder\ntimes: 3.0\n")
    monkeypatch.setattr(lora_bench.adapters, "__path__", [*lora_bench.adapters.__path__, str(tmp_path)])
    try:
        assert "louder" in method_names()
        cfg = composed(f"hydra.searchpath=[file://{tmp_path}/conf]", "adapter=louder", "adapter.alpha=4")
        louder = build(method_class("louder"), cfg.adapter, "adapter")
        quiet = adapter("lora", "alpha=12")
        made, same = (pack("bert", (settings, 0)) for settings in (louder, quiet))
        batch = random_batch(made.backbone)
        with torch.no_grad():
            torch.testing.assert_close(stir(made).eval()(batch), stir(same).eval()(batch))
        with pytest.raises(UserError, match=r"^adapter\.tmies: is not a known key\. Did you mean times\?"):
            build(method_class("louder"), composed("+adapter.tmies=2").adapter, "adapter")
    finally:
        sys.modules.pop("lora_bench.adapters.louder", None)
