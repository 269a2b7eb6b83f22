"""Wrong requests are answered before torch or transformers is imported, and records are untrusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lora_bench.errors import Code
from lora_bench.records.resume import resolve_folder
from tests.command_line import lora_bench, refused, refuses, toy_run

WRONG = [
    "train model=tiny_bert data=pairs data.path=nowhere",
    "train model=bert model.path=nowhere data=toy",
    "train model=bert model.package=nowhere data=toy",
    "train model=tiny_bert data=toy optimizer.lr=abc",
    "train model=tiny_bert data=toy adapter.init_from=nowhere",
    "train -m model=tiny_bert data=pairs data.path=nowhere seed=0,1",
    "train model=tiny_bert data=pairs data.path=. data.label_column=nothing",
    "train model=tiny_bert data=pairs data.path=. data.selection_size=100 dry_run=true",
    "train -m model=tiny_bert data=pairs data.path=. data.label_column=nothing seed=0,1",
    "train -m model=tiny_bert data=pairs data.path=. trainer.main_metric=macro_f1 seed=0,1",
    "train resume=nowhere",
    "eval run=nowhere data=toy",
    "eval data=toy",
    "eval peft=adapter data=pairs data.path=. data.label_column=nothing",
    "predict run=nowhere input=nothing.tsv",
    "export run=nowhere format=peft output=out",
    "prompt llm.model=x llm.base_url=http://localhost:1 data=pairs data.path=nowhere",
]
SCRIPT = """
import json, sys
from lora_bench.cli import main
for command in json.loads(sys.argv[1]):
    code = main(command.split())
    heavy = sorted({"torch", "transformers", "datasets", "torchmetrics"} & sys.modules.keys())
    print(json.dumps([command, code, heavy]))
"""


def test_a_wrong_request_imports_nothing_heavy(in_tmp: Path) -> None:
    for name in ("train.tsv", "validation.tsv"):
        Path(name).write_text("question1\tquestion2\tlabel\n" + "a\tb\t0\nc\td\t1\n" * 5)
    of_adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(of_adapter | {"base_model_name_or_path": "x"}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(WRONG)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    lines = [json.loads(line) for line in answer.stdout.splitlines() if not line.endswith(("checking", "loading"))]
    assert lines == [[command, 2, []] for command in WRONG]
    assert answer.stderr.count("\n") == len(WRONG), answer.stderr
    assert {path.name for path in in_tmp.iterdir()} == {"adapter", "train.tsv", "validation.tsv"}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("predict run=x input=y.tsv +calibration=true", "calibration"),
        ("predict run=x input=y.tsv +model.paht=z", "model.paht"),
        ("eval run=x data=toy +outptu=y", "outptu"),
        ("eval run=x data=toy +model.paht=z", "model.paht"),
        ("export run=x format=peft output=y +seed=1", "seed"),
        ("export run=x format=peft output=y ++model.paht=z", "model.paht"),
        ("push x me/name +licence=mit", "licence"),
    ],
)
def test_an_added_key_that_no_command_reads_is_refused(in_tmp: Path, command: str, key: str) -> None:
    error = refused(*command.split())
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, key)


# -- a run's record --


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert lora_bench("train", *toy_run(f"hydra.run.dir={folder}")).code == 0
    return folder


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGES_OF_CONFIG: list[tuple[str, Any, Code]] = [
    ("data.task", "${oc.env:PRIVATE_THING}", Code.FORBIDDEN),
    ("data.task", "${oc.decode:'${oc.env:PRIVATE_THING}'}", Code.FORBIDDEN),
    ("data.task", "x ${oc.env:PRIVATE_THING} y", Code.FORBIDDEN),
    ("data.label_names", ["no", "${oc.env:PRIVATE_THING}"], Code.FORBIDDEN),
    ("data.task", "${.task}", Code.INVALID_VALUE),
    ("data.task", "${", Code.DAMAGED),
    ("data.task", nested(200), Code.DAMAGED),
    ("seed", 10**400, Code.INVALID_VALUE),
    ("optimizer.lr", 10**400, Code.MISSING),
    ("trainer.batch_size", 10**400, Code.MISSING),
    ("model.package", "canary.weights", Code.FORBIDDEN),
    ("model", 3, Code.DAMAGED),
    ("adapter", None, Code.DAMAGED),
    ("adapter.method", "../canary", Code.UNKNOWN_CHOICE),
]
"""A key, its value, and the code with which a resumed run refuses it."""
DAMAGES = [(f"config.{key}", value) for key, value, _ in DAMAGES_OF_CONFIG] + [
    ("environment.precision", "load"),
    ("environment.precision", ["float32"]),
    ("environment", {}),
]


@pytest.mark.parametrize(
    ("command", "keys", "value", "code"),
    [("predict", *damage, Code.DAMAGED) for damage in DAMAGES]
    + [("resume", f"config.{key}", *rest) for key, *rest in DAMAGES_OF_CONFIG],
    ids=lambda value: str(value)[:30],
)
def test_a_runs_record_is_untrusted(
    in_tmp: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, keys: str, value: Any, code: Code
) -> None:
    monkeypatch.setenv("PRIVATE_THING", "not-for-records")
    monkeypatch.syspath_prepend(in_tmp)
    Path("canary").mkdir()
    Path("canary/__init__.py").write_text("raise SystemExit(99)")
    record = json.loads((run_folder / "run.json").read_text())
    node = record
    for key in keys.split(".")[:-1]:
        node = node[key]
    node[keys.split(".")[-1]] = value
    record["status"] = "done" if command == "predict" else "interrupted"
    Path("copy").mkdir()
    Path("copy/.lock").touch()
    for name in ("adapter", "metrics.jsonl"):
        Path("copy", name).symlink_to(run_folder / name)
    sys.set_int_max_str_digits(0)
    Path("copy/run.json").write_text(json.dumps(record))
    sys.set_int_max_str_digits(4300)
    Path("in.tsv").write_text("question1\tquestion2\na\tb\n")
    request = ("predict", "run=copy", "input=in.tsv") if command == "predict" else ("train", "resume=copy")
    error = refused(*request)
    if code == Code.DAMAGED:
        assert (error.code, error.file) == (code, Path("copy/run.json"))
    else:
        assert (error.code, error.key) == (code, keys.removeprefix("config."))
    assert "not-for-records" not in str(error)
    assert "canary" not in sys.modules


# -- resume=last --


def interrupted_run(folder: str, created: Any) -> Path:
    """Write the record of a run that was interrupted."""
    path = Path("outputs", folder)
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"schema": 1, "status": "interrupted", "created": created}))
    return path


FUTURE = (datetime.now(UTC) + timedelta(days=400)).date().isoformat() + "T00:00:00+00:00"


@pytest.mark.parametrize("created", [FUTURE, "9999-12-31T23:59:59+00:00", "zzz", "", None])
def test_the_last_run_is_none_of_the_future(in_tmp: Path, created: Any) -> None:
    interrupted_run("older", "2026-01-01T00:00:00.000+00:00")
    newest = interrupted_run("newest", "2026-01-02T00:00:00.000+00:00")
    other = interrupted_run("other", created)
    assert resolve_folder("last", Path("outputs")) == newest
    for folder in (newest, newest.with_name("older")):
        (folder / "run.json").unlink()
    with refuses(Code.NOT_FOUND, key="resume") as caught:
        resolve_folder("last", Path("outputs"))
    assert (caught.value.value, caught.value.file) == ("last", other)
    assert f"resume={other}" in str(caught.value)


def test_moments_are_compared_and_not_texts(in_tmp: Path) -> None:
    interrupted_run("a", "2026-01-02T00:30:00.000+02:00")
    newest = interrupted_run("b", "2026-01-01T23:00:00.000+00:00")
    assert resolve_folder("last", Path("outputs")) == newest


# -- hydra.job.chdir --


def test_relative_paths_mean_the_start_folder(in_tmp: Path) -> None:
    rows = "".join(f"how {i}\twhy {i}\t{i % 2}\n" for i in range(16))
    Path("data").mkdir()
    for split in ("train", "validation"):
        Path("data", f"{split}.tsv").write_text(f"question1\tquestion2\tlabel\n{rows}")
    overrides = [text for text in toy_run("data=pairs", "data.selection_size=4") if "_rows" not in text]
    there = "hydra.job.chdir=true"
    assert lora_bench("train", *overrides, "data.path=data", "hydra.run.dir=run", there).code == 0
    assert Path("run/run.json").is_file()
    started = ["data.path=data", "adapter.init_from=run", "hydra.run.dir=second"]
    assert lora_bench("train", *overrides, *started, there).code == 0
    Path("in.tsv").write_text("question1\tquestion2\na\tb\n")
    assert lora_bench("predict", "run=run", "input=in.tsv", "output=out.tsv", there).code == 0
    assert Path("out.tsv").is_file()
    assert Path.cwd() == in_tmp
