"""What the README promises: a model, a data set, a metric and a method of one's own are a YAML each, in any folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.errors import Code
from lora_bench.records import run_folder
from tests.command_line import lora_bench, refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

PAIRS = [("how do I boil rice", "what is the way to boil rice", 1), ("what is a verb", "who painted this", 0)]
RUN = ["trainer.max_steps=1", "trainer.device=cpu", "trainer.precision=fp32", "hydra.run.dir=run"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def mine(in_tmp: Path, backbone: Callable[..., Any]) -> Path:
    """A folder of one's own configs, with the weights and pairs that they name."""
    bert = backbone("tiny_bert")
    bert.network.save_pretrained(in_tmp / "weights")
    bert.tokenizer.save_pretrained(in_tmp / "weights")
    write(in_tmp / "mine/model/mine.yaml", "defaults: [bert, _self_]\nhub_id: null\npath: weights\n")

    for split, copies in {"train": 12, "validation": 4}.items():
        rows = [f"{i}\t{label}\t{two}\t{one}" for i in range(copies) for one, two, label in PAIRS]
        write(in_tmp / "pairs" / f"{split}.tsv", "\n".join(["number\tsame\tright\tleft", *rows]) + "\n")
    data = "defaults: [pairs, _self_]\npath: pairs\ntext_columns: [left, right]\nlabel_column: same\n"
    write(in_tmp / "mine/data/mine.yaml", f"{data}label_names: [different, same]\nselection_size: 4\n")

    write(in_tmp / "mine/metric/mine.yaml", "jaccard: {torchmetric: BinaryJaccardIndex, direction: up}\n")
    write(in_tmp / "mine/adapter/mine.yaml", "defaults: [lora, _self_]\nrank: 3\ntarget_modules: qv\n")
    write(
        in_tmp / "mine/experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /adapter: mine\n"
        "  - override /data: mine\n  - override /metric: [mine]\nseed: 7\n",
    )
    return in_tmp / "mine"


def test_a_model_data_set_metric_and_method_are_a_yaml_each(mine: Path, in_tmp: Path) -> None:
    asked = ["model=mine", "data=mine", "metric=[mine]", "adapter=mine"]
    answer = lora_bench("train", "--config-dir", str(mine), *asked, *RUN)
    assert (answer.code, answer.err) == (0, ""), answer
    found = run_folder.read(in_tmp / "run")
    assert found["status"] == "done"
    assert found["choices"]["model"] == found["choices"]["data"] == found["choices"]["adapter"] == "mine"
    assert found["config"]["model"]["path"] == str(in_tmp / "weights")
    assert found["config"]["data"]["path"] == str(in_tmp / "pairs")
    assert found["data"]["rows"] == {"train": 20, "selection": 4, "validation": 8}
    assert {f"{split}/jaccard" for split in ("selection", "validation")} <= set(found["metrics"])
    assert all(0 <= found["metrics"][f"{split}/jaccard"] <= 1 for split in ("selection", "validation"))
    assert {name.rsplit(".", 1)[1]: rank for name, rank in found["targets"].items()} == {"query": 3, "value": 3}
    assert "jaccard" in answer.out


def test_a_preset_of_ones_own_names_them_all(mine: Path, in_tmp: Path) -> None:
    answer = lora_bench("train", *RUN, "experiment=mine", "--config-dir=mine")
    assert answer.code == 0, answer
    found = run_folder.read(in_tmp / "run")
    assert found["config"]["seed"] == 7
    assert found["choices"]["experiment"] == "mine"
    assert "validation/jaccard" in found["metrics"]


def test_they_are_swept_like_any_other(mine: Path, in_tmp: Path) -> None:
    sweep = ["-m", "--config-dir=mine", "model=mine,tiny_bert", "data=mine", "hydra.sweep.dir=sweep"]
    answer = lora_bench("train", *sweep, *RUN[:3])
    assert answer.code == 0, answer
    assert [run_folder.read(in_tmp / "sweep" / job)["choices"]["model"] for job in "01"] == ["mine", "tiny_bert"]


def test_the_finished_run_is_used_from_another_folder(
    mine: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lora_bench("train", "--config-dir=mine", "experiment=mine", *RUN).code == 0
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    answer = lora_bench("eval", "run=../run", "--config-dir=../mine", "data=mine", f"data.path={in_tmp / 'pairs'}")
    assert answer.code == 0, answer
    answer = lora_bench("predict", "run=../run", "input=../pairs/validation.tsv", "output=labels.tsv")
    assert answer.code == 0, answer
    assert len((in_tmp / "elsewhere" / "labels.tsv").read_text().splitlines()) == 9


def test_a_mistake_in_ones_own_yaml_names_the_key(mine: Path, in_tmp: Path) -> None:
    write(mine / "metric/wrong.yaml", "jaccard: {torchmetric: BinaryJacardIndex, direction: up}\n")
    error = refused("train", "--config-dir=mine", "model=mine", "data=mine", "metric=[wrong]")
    wrong = (Code.UNKNOWN_CHOICE, "metric.jaccard.torchmetric", "BinaryJacardIndex")
    assert (error.code, error.key, error.value) == wrong
    assert "Did you mean BinaryJaccardIndex?" in str(error)
    write(mine / "adapter/wrong.yaml", "defaults: [lora, _self_]\nrnk: 3\n")
    error = refused("train", "--config-dir=mine", "model=mine", "data=mine", "adapter=wrong")
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, "adapter.rnk")
    assert "Did you mean rank?" in str(error)
