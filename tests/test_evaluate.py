"""`eval` scores a finished run as its own training did, and leaves the figures inside the run's folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lora_bench.config import build_data
from lora_bench.data import sources
from lora_bench.errors import UserError
from lora_bench.evaluate import run_eval
from lora_bench.train import train
from tests.helpers import SMALL_TOY, composed

TOY = [override for override in SMALL_TOY if override.startswith("data")]
QUICK = [*SMALL_TOY, "data.max_length=48", "trainer.max_steps=3", "optimizer.lr=0.02"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "toy"}
    train(composed(*QUICK), folder, choices=choices, overrides=[], console=Console(file=io.StringIO()))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def evaluated(run: Path, *overrides: str, choice: str = "toy") -> str:
    shown = io.StringIO()
    run_eval(composed(f"run={run}", *overrides, name="eval"), data_choice=choice, console=Console(file=shown, width=60))
    return shown.getvalue()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def pairs(folder: Path, split: str = "validation", label: str = "label") -> None:
    """The toy pairs of a split as a local file."""
    source = sources.load(build_data(composed(*SMALL_TOY).data))["validation"]
    rows = zip(*source.texts, map(str, source.labels.tolist()), strict=True)
    folder.mkdir(exist_ok=True)
    header = f"question1\tquestion2\t{label}\n"
    (folder / f"{split}.tsv").write_text(header + "".join("\t".join(row) + "\n" for row in rows))


def test_the_same_split_gives_the_same_figures_and_predictions(run: Path) -> None:
    record, own = read(run / "run.json"), (run / "run.json").read_bytes()
    shown = evaluated(run, *TOY)
    found = read(run / "evaluations" / "toy.json")
    assert found["metrics"] == {key: value for key, value in record["metrics"].items() if key.startswith("validation/")}
    before = pq.read_table(run / "predictions" / "validation.parquet")
    after = pq.read_table(run / "evaluations" / "toy" / "validation.parquet")
    assert after.equals(before)
    assert found["data"]["choice"] == found["data"]["source"] == "toy"
    assert found["data"]["fingerprint"] == {"validation": record["data"]["fingerprint"]["validation"]}
    assert found["data"]["rows"] == {"validation": 40}
    assert (run / "run.json").read_bytes() == own
    assert "validation" in shown
    assert f"{found['metrics']['validation/mcc']:.4f}" in shown


def test_the_written_path_is_shown_in_one_piece(run: Path) -> None:
    assert f"written: {run / 'evaluations' / 'toy.json'}\n" in evaluated(run, *TOY)  # wider than the screen


def test_local_files_are_called_after_their_folder_or_as_asked(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "paws")
    pairs(tmp_path / "paws", "test")
    pairs(tmp_path / "paws", "train")
    evaluated(run, f"data.path={tmp_path / 'paws'}", "data.max_length=48", choice="pairs")
    evaluated(run, f"data.path={tmp_path / 'paws'}", "name=mine", choice="pairs")
    found, mine = read(run / "evaluations" / "paws.json"), read(run / "evaluations" / "mine.json")
    assert found["metrics"] == mine["metrics"]
    assert {key.split("/")[0] for key in found["metrics"]} == {"validation", "test"}  # train is not scored
    assert found["metrics"]["test/mcc"] == found["metrics"]["validation/mcc"]
    assert found["metrics"]["test/nll"] == read(run / "run.json")["metrics"]["validation/nll"]
    assert found["data"]["path"] == str(tmp_path / "paws")
    assert {path.name for path in (run / "evaluations" / "paws").iterdir()} == {"validation.parquet", "test.parquet"}


def test_one_file_is_a_test_split(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path, "anything")
    evaluated(run, f"data.path={tmp_path / 'anything.tsv'}", choice="pairs")
    found = read(run / "evaluations" / "anything.json")
    assert found["metrics"]["test/auroc"] == read(run / "run.json")["metrics"]["validation/auroc"]
    scores = np.array(pq.read_table(run / "evaluations" / "anything" / "test.parquet").column("score"))
    np.testing.assert_array_equal(
        scores, np.array(pq.read_table(run / "predictions/validation.parquet").column("score"))
    )


def test_extra_metrics(run: Path) -> None:
    evaluated(run, *TOY, "metric=[specificity]")
    assert "validation/specificity" in read(run / "evaluations" / "toy.json")["metrics"]


def test_a_second_evaluation_of_a_name_replaces_the_first(run: Path) -> None:
    evaluated(run, *TOY)
    evaluated(run, "data=toy", "data.train_rows=20", "data.validation_rows=20")
    assert read(run / "evaluations" / "toy.json")["data"]["rows"] == {"validation": 20}
    assert pq.read_table(run / "evaluations" / "toy" / "validation.parquet").num_rows == 20


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["name=../x"], "name=../x: is not a plain name"),
        (["data.text_columns=[question1]"], "where the run was trained on 2"),
        (["+metric.mine={torchmetric: BinaryRecal, direction: up}"], "Did you mean BinaryRecall"),
    ],
)
def test_refusals_leave_the_run_as_it_was(run: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    pairs(tmp_path / "d")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=words):
        evaluated(run, f"data.path={tmp_path / 'd'}", *overrides, choice="pairs")
    assert sorted(run.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "run"]


def test_data_without_labels_to_score_is_refused(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "d", "train")
    with pytest.raises(UserError, match="no labelled validation or test split to score"):
        evaluated(run, f"data.path={tmp_path / 'd'}", choice="pairs")
    pairs(tmp_path / "e", "test", label="other")
    with pytest.raises(UserError, match="no labelled validation or test split to score"):
        evaluated(run, f"data.path={tmp_path / 'e'}", choice="pairs")


def test_an_unfinished_run_is_refused(run: Path) -> None:
    record = read(run / "run.json")
    (run / "run.json").write_text(json.dumps({**record, "status": "diverged"}))
    with pytest.raises(UserError, match="the run is diverged, not done"):
        evaluated(run, *TOY)
