"""The record of a finished run is used as it is or refused by name, whatever it holds; and without torch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_bench.errors import Code, UserError
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.run.settings import Experiment
from tests.command_line import refuses
from tests.helpers import composed
from tests.reliability.test_fuzz import positions

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: Any = OmegaConf.to_container(composed("data=toy", "ensemble.members=2"), resolve=True)
RECORD: dict[str, Any] = {
    "schema": 1,
    "status": "done",
    "choices": {"model": "tiny_bert", "adapter": "lora", "data": "toy"},
    "config": CONFIG,
    "selection": {"temperature": 2, "threshold": 0.4, "members": [{"temperature": 1.5}, {"temperature": 3.0}]},
    "targets": {"a.query": 8, "a.key": [4, 8]},
    "environment": {"precision": "float32", "backbone_sha256": "0" * 64},
    "data": {"fingerprint": {}},
}


def read(folder: Path, record: Any) -> FinishedRecord:
    for i in range(2):
        (folder / "adapter" / f"member_{i}").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    return FinishedRecord.read(folder)


def changed(path: str, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    *above, last = path.split("/")
    node: Any = record
    for name in above:
        node = node[int(name) if isinstance(node, list) else name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return record


def test_what_a_whole_record_says(tmp_path: Path) -> None:
    finished = read(tmp_path, RECORD)
    assert (finished.members, finished.precision, finished.text_columns) == (2, "float32", ["question1", "question2"])
    assert finished.calibration is not None
    assert (finished.calibration.temperature, finished.calibration.threshold) == (2.0, 0.4)
    assert [calibration.temperature for calibration in finished.member_calibrations] == [1.5, 3.0]
    assert Experiment.of_finished(finished).ensemble.members == 2
    older = read(tmp_path, changed("selection", {"step": 3}))
    assert (older.calibration, older.member_calibrations) == (None, [])


ODD = [
    ("choices/adapter", ["lora"]),
    ("config/adapter", ...),
    ("config/adapter", None),
    ("config/data", "toy"),
    ("config/metric", []),
    ("config/tasks", ["a"]),
    ("config/tracking", 1),
    ("config/ensemble/members", 3),
    ("config/ensemble/members", 10**12),
    ("config/ensemble/members", "2"),
    ("config/data/text_columns", None),
    ("config/data/text_columns", "question1"),
    ("config/data/text_columns", ["a", "b", "c"]),
    ("config/data/text_columns", [1, 2]),
    ("config/data/task", "${oc.env:HOME}"),
    ("config/data/${x}", 1),
    ("targets/a.query", "8"),
    ("targets/a.query", -1),
    ("targets/a.query", True),
    ("targets/a.query", 10**15),
    ("targets/a.key", [4]),
    ("targets/a.key", [4, None]),
    ("environment/precision", "nn"),
    ("environment/precision", ["float32"]),
    ("environment/precision", ...),
    ("environment/backbone_sha256", ...),
    ("environment/backbone_sha256", 5),
    ("selection/temperature", 0),
    ("selection/temperature", -1.0),
    ("selection/temperature", "2"),
    ("selection/temperature", True),
    ("selection/temperature", 1e300),
    ("selection/temperature", [2.0]),
    ("selection/threshold", "half"),
    ("selection/threshold", 7),
    ("selection/threshold", None),
    ("selection/members", [{"temperature": 1.5}]),
    ("selection/members", {"0": {}}),
    ("selection/members", [1, 2]),
    ("selection/members/1/temperature", 0),
]


@pytest.mark.parametrize(("path", "value"), ODD)
def test_an_odd_record_is_refused_by_name(tmp_path: Path, path: str, value: Any) -> None:
    with refuses(Code.DAMAGED) as caught:
        read(tmp_path, changed(path, value))
    assert caught.value.file == tmp_path / "run.json"
    name = path.split("/")[-1 if "selection" not in path else 1]
    assert name.removesuffix("/members") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("path", "value"), [("config/data/max_length", -3), ("config/adapter/rank", "x")])
def test_settings_that_are_out_of_range_are_refused_by_record_and_key(tmp_path: Path, path: str, value: Any) -> None:
    with refuses(Code.DAMAGED) as caught:
        Experiment.of_finished(read(tmp_path, changed(path, value)))
    assert caught.value.file == tmp_path / "run.json"
    assert path.removeprefix("config/").replace("/", ".") in str(caught.value)


def test_changed_records_are_used_or_refused(tmp_path: Path) -> None:
    strange = st.sampled_from([None, 0, -1, 1.5, True, 10**30, 1e308, "x", "", [], {}, [{}], {"a": {"b": [1]}}])
    number = len(list(positions(RECORD)))

    @given(st.integers(0, number - 1), st.booleans(), strange)
    @settings(
        max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def check(which: int, removed: bool, value: Any) -> None:
        record = copy.deepcopy(RECORD)
        node, key = list(positions(record))[which]
        if removed:
            del node[key]
        else:
            node[key] = value
        try:
            Experiment.of_finished(read(tmp_path, record))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017

    check()


def test_a_wrong_request_is_refused_without_torch() -> None:
    code = "import lora_bench.run.prediction_request, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.strip() == "[]"
