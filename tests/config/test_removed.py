"""Removed settings are refused with the reason; old runs with them load, and resume if they had no effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lora_bench as package
from lora_bench.analysis.summary import summarise
from lora_bench.config.removed import REMOVED_CHOICES, REMOVED_GROUPS, REMOVED_KEYS, removal_note, removed_settings
from lora_bench.errors import Code
from tests.command_line import lora_bench, refused, toy_run

PAIRS = [("a", "b"), ("c", "c")]


def give_old_settings(folder: str, status: str = "done", **settings: Any) -> None:
    """Rewrite a run's record as that of version 0.1, with the removed keys at their defaults or these values."""
    path = Path(folder, "run.json")
    record = json.loads(path.read_text())
    defaults = {key.removeprefix("trainer."): value for key, value in REMOVED_KEYS.items()}
    record["config"]["trainer"] |= defaults | settings
    record["choices"] |= dict.fromkeys(REMOVED_GROUPS, "default")
    path.write_text(json.dumps(record | {"status": status}))
    shutil.rmtree(Path(folder, ".hydra"))


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("sign", ["", "+"])
@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_refused_with_the_reason(key: str, sign: str) -> None:
    error = refused("train", *toy_run(f"{sign}{key}=0.1"))
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, key)
    assert error.remedy == removal_note(key)


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(("key", "choice"), REMOVED_CHOICES)
def test_a_removed_choice_is_refused_with_the_reason(key: str, choice: str) -> None:
    error = refused("train", *toy_run(f"{key}={choice}"))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, key, choice)
    assert error.remedy == removal_note(key, choice)


def test_removed_settings_are_those_that_changed_the_training() -> None:
    trainer = {"label_smoothing": 0.0, "margin": 0, "focal_gamma": 2.0, "objective": "cross_entropy", "epochs": 3}
    assert removed_settings({"trainer": trainer, "seed": 0}) == {"trainer.focal_gamma": 2.0}
    trainer |= {"focal_gamma": 0.0, "objective": "dropout_consistency"}
    assert removed_settings({"trainer": trainer}) == {"trainer.objective": "dropout_consistency"}


@pytest.mark.usefixtures("in_tmp")
def test_an_old_run_without_effective_removed_settings_loads_compares_and_resumes() -> None:
    for seed in (0, 1):
        assert lora_bench("train", *toy_run(f"seed={seed}", f"hydra.run.dir=runs/{seed}")).code == 0
    predictions = package.load("runs/0").predict(PAIRS)
    give_old_settings("runs/0")
    assert package.load("runs/0").predict(PAIRS).tolist() == predictions.tolist()
    (row,) = summarise([Path("runs")]).rows
    assert row.n == 2
    give_old_settings("runs/1", status="interrupted")  # without a checkpoint it is trained from the beginning
    assert lora_bench("train", "resume=runs/1").code == 0
    assert json.loads(Path("runs/1/run.json").read_text())["status"] == "done"


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("settings", [{"margin": 0.3}, {"objective": "dropout_consistency"}], ids=str)
def test_an_old_run_with_effective_removed_settings_loads_and_compares_but_does_not_resume(
    settings: dict[str, Any],
) -> None:
    for name in ("old", "new"):
        assert lora_bench("train", *toy_run(f"hydra.run.dir=runs/{name}")).code == 0
    predictions = package.load("runs/old").predict(PAIRS)
    give_old_settings("runs/old", **settings)
    assert package.load("runs/old").predict(PAIRS).tolist() == predictions.tolist()
    answer = lora_bench("train", *toy_run("adapter.init_from=runs/old", "hydra.run.dir=warm"))
    assert answer.code == 0, answer
    assert len(summarise([Path("runs")]).rows) == 2
    give_old_settings("runs/new", status="interrupted", **settings)
    error = refused("train", "resume=runs/new")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "resume", Path("runs/new"))
    (key,) = (f"trainer.{name}" for name in settings)
    assert key in str(error)


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("override", ["trainer.margin=0,0.3", "trainer.objective=cross_entropy,dropout_consistency"])
def test_an_old_sweep_over_removed_settings_does_not_resume(override: str) -> None:
    assert lora_bench("train", "-m", *toy_run("seed=0,1", "hydra.sweep.dir=sweep")).code == 0
    path = Path("sweep/sweep.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"overrides": [*record["overrides"], override]}))
    error = refused("train", "-m", "resume=sweep")
    assert (error.code, error.key) == (Code.NOT_RESUMABLE, "resume")
