"""Runs that train on perturbed pairs, and runs that are scored on them at their end: what their records say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lora_bench.errors import Code
from lora_bench.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE
from tests.command_line import lora_bench, refused, toy_run

QUICK = toy_run("data.train_rows=60", "trainer.max_steps=6", "trainer.batch_size=8", "optimizer.lr=0.02")


def trained(folder: str, *overrides: str) -> dict[str, Any]:
    answer = lora_bench("train", *QUICK, *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer.err
    content: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return content


def scores(folder: str) -> list[float]:
    column: list[float] = pq.read_table(f"{folder}/predictions/validation.parquet").column("score").to_pylist()
    return column


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust") / "plain"
    trained(str(folder))
    return folder


@pytest.fixture
def plain_run(plain_folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((plain_folder / "run.json").read_text())
    return content


def test_perturbed_pairs_train_another_adapter_and_the_same_again(plain_run: dict[str, Any], in_tmp: Path) -> None:
    plain, augmented, again = plain_run, trained("a", "data.augment=all"), trained("b", "data.augment=all")
    assert scores("a") == scores("b")
    assert augmented["metrics"] == again["metrics"]
    assert augmented["metrics"] != plain["metrics"]
    # The reported split, and what it is compared on, are the same.
    assert augmented["data"] == plain["data"]
    assert augmented["config"]["data"]["augment"] == "all"


def test_an_interrupted_run_goes_on_with_the_pairs_of_its_epochs(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("data.augment=[typo,order]", "trainer.max_steps=16", "trainer.checkpoint_every=3")
    trained("whole", *overrides)
    from lora_bench.training import member_run

    kept, steps = member_run.clip_gradients, []

    def clip(*args: Any) -> float:
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return kept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(member_run, "clip_gradients", clip)
        assert lora_bench("train", *QUICK, *overrides, "hydra.run.dir=cut").code == 130
    answer = lora_bench("train", "resume=cut")
    assert answer.code == 0, answer.err
    assert scores("cut") == scores("whole")


def test_both_consistencies_take_perturbed_pairs(in_tmp: Path) -> None:
    overrides = ("data.augment=[character]", "trainer.max_steps=2")
    metrics = [
        trained(objective, f"trainer.objective={objective}", *overrides)["metrics"]
        for objective in ("order_consistency", "perturb_consistency")
    ]
    assert metrics[0] != metrics[1]


def test_a_run_is_scored_perturbed_as_a_later_evaluation_scores_it(plain_folder: Path, in_tmp: Path) -> None:
    overrides = ("data.perturb=[typo,order,number]", "data.perturb_seeds=2", "data.unseen=true")
    shutil.copytree(plain_folder, "plain")
    plain, perturbed = json.loads(Path("plain/run.json").read_text()), trained("run", *overrides)
    assert {key: perturbed["metrics"][key] for key in plain["metrics"]} == plain["metrics"]
    assert perturbed["data"]["perturb"]["transforms"] == ["typo", "order", "number"]
    assert perturbed["data"]["unseen"] == {"validation": 16}
    data = [override for override in QUICK if override.startswith("data")]
    answer = lora_bench("eval", "run=plain", *data, *overrides)
    assert answer.code == 0, answer.err
    later = json.loads(Path("plain/evaluations/toy.json").read_text())
    validation_metrics = {key: value for key, value in perturbed["metrics"].items() if key.startswith("validation/")}
    assert later["metrics"] == pytest.approx(validation_metrics)
    assert "validation/perturbed/f1_drop" in validation_metrics
    table = lora_bench("compare", "plain", "run", "--format", "csv").out
    assert "perturbed/f1_drop" in table
    assert "typo" not in table.splitlines()[0]


def test_each_member_of_a_pack_is_perturbed_by_itself(in_tmp: Path) -> None:
    overrides = ("data.augment=[typo]", "data.perturb=[typo,order]", "data.perturb_seeds=1")
    answer = lora_bench("train", "-m", *QUICK, *overrides, "seed=0,1", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer.err
    alone = trained("alone", *overrides, "seed=1")
    records = {path.parent: json.loads(path.read_text()) for path in Path("sweep").rglob("run.json")}
    ((folder, packed),) = [(folder, record) for folder, record in records.items() if record["config"]["seed"] == 1]
    assert packed["cost"]["pack_size"] == 2
    assert scores(str(folder)) == pytest.approx(scores("alone"), abs=1e-4)
    assert packed["metrics"]["validation/typo/flip_rate"] == alone["metrics"]["validation/typo/flip_rate"]


def test_the_temperature_is_that_of_the_selection_split(plain_run: dict[str, Any]) -> None:
    temperature = plain_run["selection"]["temperature"]
    assert MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
    for name in ("nll", "ece", "brier"):
        assert plain_run["metrics"][f"validation/calibrated/{name}"] is not None
    assert "selection/calibrated/nll" not in plain_run["metrics"]  # it was chosen there


@pytest.mark.parametrize(
    ("overrides", "expected", "named"),
    [
        (["data.augment=tipo"], (Code.UNKNOWN_CHOICE, "data.augment", "tipo"), "Did you mean typo?"),
        (
            ["data.perturb=[number]", "data.relation=entailment"],
            (Code.UNSUPPORTED, "data.perturb", "number"),
            "entailment",
        ),
        (
            ["trainer.objective=perturb_consistency"],
            (Code.CONFLICT, "trainer.objective", "perturb_consistency"),
            "data.augment",
        ),
        (["data.augment_share=2"], (Code.INVALID_VALUE, "data.augment_share", 2.0), ""),
    ],
)
def test_wrong_requests_are_refused(
    in_tmp: Path, overrides: list[str], expected: tuple[Code, str, object], named: str
) -> None:
    error = refused("train", *QUICK, *overrides)
    assert (error.code, error.key, error.value) == expected
    assert named in str(error)
