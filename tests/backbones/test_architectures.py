"""Every architecture learns, is reloaded, predicts the same alone and in a batch, and is exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.evaluation.cost import FlopModel
from tests.backbones.architecture_checks import check, largest_cut_difference
from tests.backbones.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backbones.architectures import Architecture

NOT_CUT = ("Longformer",)


def test_there_are_25_architectures() -> None:
    assert len({architecture.name.partition(",")[0] for architecture in ARCHITECTURES}) >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_an_architecture_learns_is_reloaded_exported_and_cut(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlopModel, "measure", lambda step: FlopModel((1.0, 1.0, 0.0, 0.0)))  # it takes a third
    model = architecture.save(tmp_path / "model")
    lora = check(architecture, model, ["adapter=lora"], tmp_path / "lora", ["merged", "peft"], steps=2)
    assert lora.refused == ""
    assert lora.adapted != ""
    assert isinstance(lora.merged, float)
    assert isinstance(lora.peft, float)
    assert lora.reloaded == pytest.approx(0, abs=1e-6)
    assert [lora.merged, lora.peft] == pytest.approx([0, 0], abs=1e-5)
    recipe = ["experiment=enhanced", "adapter.calibration_batches=1"]
    enhanced = check(architecture, model, recipe, tmp_path / "enhanced", [], steps=2)
    assert enhanced.refused == ""
    assert enhanced.reloaded == pytest.approx(0, abs=1e-6)
    difference = largest_cut_difference(architecture, model)
    assert difference is None if architecture.name in NOT_CUT else difference == pytest.approx(0, abs=1e-5)
