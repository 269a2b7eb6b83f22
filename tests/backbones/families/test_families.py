"""Model families: their names, what they serve, and that a new one is one file and one YAML."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import lora_bench.backbones.families
from lora_bench.backbones.families import build_model, family_class, family_names, family_of_type
from lora_bench.backbones.family import Family
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.errors import Code
from tests.backbones.tools import random_batch
from tests.command_line import refuses
from tests.helpers import composed

if TYPE_CHECKING:
    from pathlib import Path


def test_every_family_is_a_dataclass_of_settings() -> None:
    assert {"auto", "bert", "t5"} <= set(family_names())
    assert all(issubclass(family_class(name), Family) for name in family_names())


def test_every_model_type_has_a_family() -> None:
    expected = {
        "bert": "bert", "roberta": "bert", "camembert": "bert", "t5": "t5", "mt5": "t5", "deberta-v2": "auto",
        "gpt2": "auto",
    }  # fmt: skip
    assert {name: family_of_type(name) for name in expected} == expected
    assert family_of_type(None) == "auto"
    assert family_class("bert").serves("roberta")
    assert not family_class("bert").serves("t5")
    assert family_class("auto").serves("anything")


def test_an_unknown_family_is_refused_with_the_one_meant() -> None:
    for name in ("brt", "base", "os", "../bert", "bert.BertFamily", ""):
        with refuses(Code.UNKNOWN_CHOICE, key="model.family") as caught:
            family_class(name)
        assert caught.value.value == name
        assert name != "brt" or "bert?" in str(caught.value)


def test_settings_are_checked_without_torch() -> None:
    """Mistakes in a configuration are reported before torch is imported, which takes seconds."""
    code = (
        "import sys; from lora_bench.backbones.families import family_class, family_names; "
        "from lora_bench.run import preflight; "
        "[family_class(name) for name in family_names()]; print(*{'torch', 'transformers'} & sys.modules.keys())"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == ""


MODULE = '''
from dataclasses import dataclass

from lora_bench.backbones.bert import Bert
from lora_bench.backbones.family import Family
from lora_bench.errors import require_number


class Louder(Bert):
    """BERT with logits that are multiplied."""

    factor = 1.0

    def classify(self, encoded, batch):
        return self.factor * super().classify(encoded, batch)


@dataclass(frozen=True, kw_only=True)
class LouderFamily(Family):
    """BERT with logits that are multiplied by a factor."""

    model_types = ("bert",)

    factor: float

    def __post_init__(self):
        super().__post_init__()
        require_number("factor", self.factor, 1)

    def make_backbone(self, network, tokenizer, new_parameters, task):
        backbone = Louder(network, tokenizer, new_parameters)
        backbone.factor = self.factor
        return backbone
'''


def test_a_new_family_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "louder.py").write_text(MODULE)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/louder.yaml").write_text("defaults: [tiny_bert, _self_]\nfamily: louder\nfactor: 3.0\n")
    package = lora_bench.backbones.families
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    search = f"hydra.searchpath=[file://{tmp_path}/conf]"
    try:
        assert "louder" in family_names()
        assert family_of_type("bert") == "bert"
        louder, quiet = (
            load(settings, load_tokenizer(settings), task="qqp")
            for settings in (build_model(composed(search, f"model={name}").model) for name in ("louder", "tiny_bert"))
        )
        batch = random_batch(quiet)
        hidden = quiet.prefix(batch, 1)
        ratios = louder.suffix(hidden, batch, 1) / quiet.suffix(hidden, batch, 1)
        assert ratios.tolist() == [[pytest.approx(3, rel=1e-3)] * 2] * len(batch.labels)
        with refuses(Code.INVALID_VALUE, key="model.factor"):
            build_model(composed(search, "model=louder", "model.factor=0").model)
        roberta = build_model(composed(search, "model=louder", "model.random.model_type=roberta").model)
        with refuses(Code.UNSUPPORTED, key="model.family"):
            load(roberta, load_tokenizer(roberta), task="qqp")
    finally:
        sys.modules.pop("lora_bench.backbones.families.louder", None)
