"""Every architecture learns, is reloaded, predicts the same alone and in a batch, and is exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.evaluation.cost import FlopModel
from lora_bench.training.dummy_step import StepFlops
from tests.backbones.architecture_checks import check, largest_cut_difference
from tests.backbones.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backbones.architectures import Architecture

NOT_CUT = ("Longformer",)
ENHANCED = ("DistilBERT", "BART", "T5, encoder", "mT5, text to text", "Gemma 3", "GPT-2, text to text")
"""Architectures that learn with the enhanced method too: one of each kind; `scripts/architectures.py` tries all."""
TRIED_ALWAYS = {*ENHANCED, *NOT_CUT, "DeBERTa-v2", "ModernBERT"} - {"T5, encoder"}
"""One of each kind, and those with a peculiarity; the others are cases of the matrix."""
QUANTISED = ("model.quantize=nf4", "model.quantize_embeddings=int8")


def test_there_are_25_architectures() -> None:
    assert len({architecture.name.partition(",")[0] for architecture in ARCHITECTURES}) >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=[] if a.name in TRIED_ALWAYS else pytest.mark.matrix) for a in ARCHITECTURES],
)
def test_an_architecture_learns_is_reloaded_exported_and_cut(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepFlops, "measure", lambda pack: FlopModel((1.0, 1.0, 0.0, 0.0)))  # it takes a third
    model = architecture.save(tmp_path / "model")
    lora = check(architecture, model, ["adapter=lora"], tmp_path / "lora", ["merged", "peft"], steps=2)
    assert lora.refused == ""
    assert lora.adapted != ""
    assert isinstance(lora.merged, float)
    assert isinstance(lora.peft, float)
    assert lora.reloaded == pytest.approx(0, abs=1e-6)
    assert [lora.merged, lora.peft] == pytest.approx([0, 0], abs=1e-5)
    if architecture.name in ENHANCED:
        recipe = ["experiment=enhanced", "adapter.calibration_batches=1"]
        enhanced = check(architecture, model, recipe, tmp_path / "enhanced", [], steps=2)
        assert enhanced.refused == ""
        assert enhanced.reloaded == pytest.approx(0, abs=1e-6)
    difference = largest_cut_difference(architecture, model)
    assert difference is None if architecture.name in NOT_CUT else difference == pytest.approx(0, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("BERT", ("experiment=enhanced", "trainer.score_both_orders=false", "head.pair_features=false")),
        pytest.param("BART", ("adapter=lora", "adapter.layers=decoder"), marks=pytest.mark.matrix),
        pytest.param(
            "T5 v1.1 (FLAN), text to text", ("adapter=qlora", "adapter.target_modules=qv"), marks=pytest.mark.matrix
        ),
        pytest.param("GPT-2", ("adapter=qlora", "adapter.target_modules=qv"), marks=pytest.mark.matrix),
        ("Gemma 3, text to text", ("adapter=lora", "adapter.target_modules=qv")),
    ],
)
def test_a_quantised_backbone_learns_is_reloaded_and_exported(
    name: str, method: tuple[str, ...], tmp_path: Path
) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.save(tmp_path / "model")
    result = check(architecture, model, [*method, *QUANTISED], tmp_path / "work", ["merged"])
    assert result.refused == ""
    assert isinstance(result.merged, float)
    assert [result.reloaded, result.merged] == pytest.approx([0, 0], abs=1e-5)
