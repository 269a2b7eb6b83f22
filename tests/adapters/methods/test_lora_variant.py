"""A LoRA variant with a trained gate, one file outside the package, keeps all that LoRA can do."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lora_bench.adapters.methods
from lora_bench.adapters.methods import method_class
from lora_bench.adapters.pack.batched_lora import BatchedLoRA
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.member_modules import AdaptedLinear
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files, importer
from lora_bench.adapters.peft.config import PeftConfig
from tests.adapters.peft_tools import CLOSE, in_peft, logits_of, on_folder
from tests.adapters.tools import adapter, assert_close, doubled, merged_logits, pack, stir, tables, train
from tests.adapters.tools import trainer as settings_for
from tests.backbones.tools import FORMS, make, random_batch, save, spread
from tests.command_line import lora_bench as run_command
from tests.command_line import toy_run
from tests.training.tools import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_bench.adapters.methods.lora import LoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

MODULE = '''
"""LoRA with a trained gate for each rank: h = W x + s · B diag(g) A x, with g at 1 in the beginning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.methods.lora import LoRA


class GatedLowRank(LowRank):
    def __init__(self, base, *arguments, **options):
        super().__init__(base, *arguments, **options)
        self.gate = nn.Parameter(torch.ones(self.rank, device=base.weight.device))

    def trained_factors(self):
        return self.lora_A, self.lora_B * self.gate


@dataclass(frozen=True, kw_only=True)
class GatedLoRA(LoRA):
    """Settings of gated LoRA: those of LoRA."""

    layer_class = GatedLowRank
'''


@pytest.fixture(autouse=True)
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`adapter.method=gated_lora`, from a file in a temporary folder."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/gated_lora.py").write_text(MODULE)
    paths = [*lora_bench.adapters.methods.__path__, str(tmp_path / "methods")]
    monkeypatch.setattr(lora_bench.adapters.methods, "__path__", paths)
    yield
    sys.modules.pop("lora_bench.adapters.methods.gated_lora", None)


def gated(*overrides: str) -> LoRA:
    """`adapter=gated_lora` with these overrides of LoRA's settings."""
    cls: Any = method_class("gated_lora")
    return cls(**vars(adapter("lora", *overrides)) | {"method": "gated_lora"})  # type: ignore[no-any-return]


ALLOCATED = ["allocation=['.*query=4','.*key=0']", "rank=2"]
SETTINGS = {
    "plain": ["rank=4", "dropout=0.2"],
    "dora with an allocation": ["magnitude=true", *ALLOCATED],
    "sensitivity": ["magnitude=true", "allocation=sensitivity", "rank=3"],
    "pissa": ["init=pissa", "rank=4"],
    "eva": ["init=eva", "rank=4"],
    "lora_ga": ["init=lora_ga", "init_gamma=16", "magnitude=true", "rank=4"],
    "frozen A": ["freeze_A=true", "rank=4"],
    "quantised": ["quantize=nf4", "rank=4"],
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def prepared(form: str, name: str) -> Pack:
    made = pack(form, (gated(*SETTINGS[name]), 0))
    prepare(made, settings_for(), tables(made.backbone)[0])
    return made


@pytest.mark.parametrize("batched", [False, True])
@every_setting
def test_a_pack_of_two_learns_what_each_learns_alone(name: str, batched: bool) -> None:
    settings = gated(*SETTINGS[name])
    chosen = settings_for(3, micro_batch_size=1000)
    together = Pack(make(*FORMS["bert"]), [Member(settings, seed) for seed in (0, 1)], batched=batched)
    _, ends = train(doubled(together), settings=chosen)
    for seed, end in enumerate(ends):
        _, (alone,) = train(doubled(pack("bert", (settings, seed))), settings=chosen)
        assert_close(end, alone, atol=1e-4)
        gates = [tensor for key, tensor in end.items() if key.endswith(".gate")]
        assert len(gates) == len(together.updates[seed])
        assert any((gate - 1).abs().max() > 1e-3 for gate in gates)


def test_members_of_one_rank_are_computed_in_one_product_and_no_others() -> None:
    members = [gated("rank=4"), gated("rank=4"), gated("rank=2"), adapter("lora", "rank=4"), adapter("lora", "rank=2")]
    made = Pack(make(*FORMS["bert"]), [Member(settings, seed) for seed, settings in enumerate(members)], batched=True)
    stir(made).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        together = made(batch)
        for k in range(len(members)):
            with made.only([k]):
                torch.testing.assert_close(together[k], made(batch)[0], atol=1e-5, rtol=0)
        made(batch)
    groups = next(module.groups for module in made.network.modules() if isinstance(module, AdaptedLinear))
    (joined,) = (joined for members, joined in groups.items() if len(members) == 5)
    batches = {tuple(sorted(group)): isinstance(batched, BatchedLoRA) for group, batched in joined}
    assert batches == {(0, 1): True, (2,): False, (3, 4): True}


@pytest.mark.parametrize("form", ["bert", "t5"])
@every_setting
def test_it_is_saved_loaded_and_merged(name: str, form: str, tmp_path: Path) -> None:
    if form == "t5" and "allocation" in name:
        return  # its expressions name BERT's linears
    made = stir(prepared(form, name)).eval()
    batch = random_batch(made.backbone)
    files.save(tmp_path / "adapter", made, 0, "")
    (member,) = made.members
    other = Pack(make(*FORMS[form]), [replace(member, seed=1, saved_ranks=made.ranks(0))]).eval()
    files.load(tmp_path / "adapter", other, 0)
    assert_close(other.state(0), made.state(0), atol=0)
    with torch.no_grad():
        logits = made(batch)
        assert torch.equal(other(batch), logits)
    assert spread(logits[0]) > 1e-3
    torch.testing.assert_close(merged_logits(made, 0, batch), logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["plain", "dora with an allocation", "pissa"])
@torch.no_grad()
def test_peft_reads_it(name: str, tmp_path: Path) -> None:
    base = save(tmp_path, make("tiny_bert").network, make("tiny_bert").tokenizer)
    made = Pack(on_folder("bert", base), [Member(gated(*SETTINGS[name]), 0)])
    stir(made, 0.1).eval()
    batch = random_batch(made.backbone)
    logits = made(batch)[0]
    files.save(tmp_path / "adapter", made, 0, str(base), for_peft=True)
    theirs = logits_of(in_peft("bert", base, tmp_path / "adapter"), made.backbone, batch)
    torch.testing.assert_close(theirs, logits, **CLOSE)
    back = importer.attach(PeftConfig.read(tmp_path / "adapter"), on_folder("bert", base)).eval()
    torch.testing.assert_close(back(batch)[0], logits, **CLOSE)


def test_its_learning_rates_are_those_of_lora() -> None:
    made = pack("bert", (gated("lr_ratio=4"), 0))
    groups = gated("lr_ratio=4").param_groups(made.adapter_parameters(0), 1e-3, 0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    chosen = {key.rpartition(".")[2]: rates[id(p)] for key, p in made.adapter_parameters(0).items()}
    assert chosen == {"lora_A": (1e-3, 0.1), "lora_B": (4e-3, 0.1), "gate": (1e-3, 0.0)}


def test_a_run_with_it_trains_predicts_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/adapter").mkdir(parents=True)
    (tmp_path / "conf/adapter/gated_lora.yaml").write_text("defaults: [lora, _self_]\nmethod: gated_lora\n")
    options = ["--config-dir", "conf", "adapter=gated_lora", "adapter.magnitude=true", "hydra.run.dir=run"]
    answer = run_command("train", *toy_run("trainer.max_steps=3"), *options)
    assert answer.code == 0, answer.err
    for arguments in (
        ["eval", "run=run", "data=toy", "data.validation_rows=16"],
        ["export", "run=run", "format=merged", "output=merged"],
        ["export", "run=run", "format=peft", "output=peft"],
    ):
        answer = run_command(*arguments)
        assert answer.code == 0, answer.err
