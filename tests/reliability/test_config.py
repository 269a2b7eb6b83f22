"""Wrong configs are refused by key and value, and nothing that a config names is ever run."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_bench.config.groups import conf_folder
from lora_bench.errors import Code
from tests.command_line import lora_bench, refused, toy_run

TARGET = "{_target_: os.mkdir, path: EVIL}"
LOGGING = "{version: 1, handlers: {x: {class: os.mkdir, path: EVIL}}, root: {handlers: [x]}}"


@pytest.mark.reliability(1)
def test_01_a_rank_that_is_no_number(in_tmp: Path) -> None:
    error = refused("train", *toy_run("adapter.rank=abc"))
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "adapter.rank", "abc")


@pytest.mark.reliability(2)
@pytest.mark.parametrize(
    ("rank", "code", "value"),
    [
        ("0", Code.INVALID_VALUE, 0),
        ("-3", Code.INVALID_VALUE, -3),
        ("2.5", Code.INVALID_VALUE, 2.5),
        ("null", Code.MISSING, None),
    ],
)
def test_02_a_rank_that_cannot_be(in_tmp: Path, rank: str, code: Code, value: object) -> None:
    error = refused("train", *toy_run(f"adapter.rank={rank}"))
    assert (error.code, error.key, error.value) == (code, "adapter.rank", value)


@pytest.mark.reliability(3)
@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa"])
def test_03_a_rank_above_the_layers_smallest_side(in_tmp: Path, adapter: str) -> None:
    error = refused("train", *toy_run(f"adapter={adapter}", "adapter.rank=33"))
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "adapter.rank", 33)
    assert "32" in str(error)


@pytest.mark.reliability(4)
@pytest.mark.parametrize("key", ["optimizer.lr", "adapter.dropout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-0.1"])
def test_04_numbers_that_are_not_finite_or_out_of_range(in_tmp: Path, key: str, value: str) -> None:
    error = refused("train", *toy_run(f"{key}={value}"))
    assert (error.code, error.key) == (Code.INVALID_VALUE, key)
    assert error.value == float(value) or (math.isnan(float(value)) and math.isnan(error.value))


@pytest.mark.reliability(4)
@pytest.mark.parametrize("value", ["1", "1.5"])
def test_04_all_dropped(in_tmp: Path, value: str) -> None:
    error = refused("train", *toy_run(f"adapter.dropout={value}"))
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "adapter.dropout", float(value))


@pytest.mark.reliability(5)
@pytest.mark.parametrize(("typed", "meant"), [("adapter.rnak=8", "adapter.rank"), ("optimiser.lr=1", "optimizer.lr")])
def test_05_the_nearest_known_key_is_suggested(in_tmp: Path, typed: str, meant: str) -> None:
    error = refused("train", *toy_run(typed))
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, typed.partition("=")[0])
    assert f" {meant}?" in str(error)


@pytest.mark.reliability(6)
def test_06_the_choices_of_a_group_are_listed(in_tmp: Path) -> None:
    error = refused("train", *toy_run("adapter=lroa"))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "adapter", "lroa")
    assert " lora? " in str(error)
    assert {"adalora", "bitfit", "dora", "vera"} <= set(re.findall(r"\w+", str(error)))
    error = refused("train", *toy_run("optimizer=zzz"))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "optimizer", "zzz")
    assert "adamw" in str(error)


@pytest.mark.reliability(7)
@pytest.mark.parametrize("again", ["adapter.rank=4", "++adapter.rank=4"])
def test_07_the_same_key_twice_is_said(in_tmp: Path, again: str) -> None:
    answer = lora_bench("train", "--cfg", "job", *toy_run("adapter.rank=2"), again)
    assert answer.code == 0
    assert answer.err.startswith("note: adapter.rank=2 ")
    assert answer.err.count("\n") == 1
    assert "rank: 4" in answer.out
    assert lora_bench("train", "--cfg", "job", *toy_run("adapter.rank=4"), "adapter.rank=4").err == ""


@pytest.mark.reliability(8)
def test_08_target_modules_that_are_not_there(in_tmp: Path) -> None:
    error = refused("train", *toy_run("adapter.target_modules=.*qurey"))
    assert (error.code, error.key, error.value) == (Code.NO_MATCH, "adapter.target_modules", ".*qurey")
    assert "bert.encoder.layer.*.attention.self.query" in str(error)


@pytest.mark.reliability(8)
def test_08_an_alternative_that_matches_nothing_is_said(in_tmp: Path) -> None:
    answer = lora_bench("train", *toy_run("adapter.target_modules='.*(qurey|value)'"))
    assert answer.code == 0, answer
    assert re.search(r"note: adapter\.target_modules: .*'qurey'", answer.out)
    assert "'value'" not in answer.out


@pytest.mark.reliability(9)
@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.callbacks.x={TARGET}",
        "hydra/callbacks=x",
        f"hydra.job_logging={LOGGING}",
        f"hydra.hydra_logging={LOGGING}",
        "hydra.launcher._target_=os.mkdir",
        "hydra.searchpath=[pkg://os]",
        "adapter._target_=os.mkdir",
        f"+data.x={TARGET}",
    ],
)
def test_09_code_named_in_an_override_is_not_run(in_tmp: Path, override: str) -> None:
    error = refused("train", *toy_run(override.replace("EVIL", str(in_tmp / "evil"))))
    assert error.code == Code.FORBIDDEN
    assert override.partition("=")[0].lstrip("+") in str(error)
    assert not (in_tmp / "evil").exists()


@pytest.mark.reliability(9)
@pytest.mark.parametrize(
    ("group", "text", "code", "key"),
    [
        (
            "experiment",
            f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}",
            Code.FORBIDDEN,
            "hydra.callbacks",
        ),
        ("experiment", f"# @package _global_\nhydra: {{job_logging: {LOGGING}}}", Code.FORBIDDEN, "hydra.job_logging"),
        ("+hydra/callbacks", f"# @package hydra.callbacks\nx: {TARGET}", Code.FORBIDDEN, "hydra/callbacks"),
        ("hydra/launcher", "_target_: os.mkdir\npath: EVIL", Code.FORBIDDEN, "hydra.launcher"),
        ("data", "defaults: [toy]\n_target_: os.mkdir\npath: EVIL", Code.UNKNOWN_KEY, "data._target_"),
    ],
    ids=["callbacks", "logging", "callbacks as a group", "launcher", "target"],
)
def test_09_code_named_in_a_users_yaml_is_not_run(in_tmp: Path, group: str, text: str, code: Code, key: str) -> None:
    path = in_tmp / "mine" / group.lstrip("+") / "bad.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("EVIL", str(in_tmp / "evil")))
    error = refused("train", "--config-dir=mine", *toy_run(f"{group}=bad"))
    assert error.code == code
    assert key in str(error)
    assert not (in_tmp / "evil").exists()


@pytest.mark.reliability(10)
@pytest.mark.parametrize(
    ("name", "text", "code", "row"),
    [
        ("bad.yaml", "defaults: [lora]\nrank: [1\n", Code.INVALID_SYNTAX, 3),
        ("bad.yaml", "defaults: [lora]\nrank:\t8\n\talpha: 1\n", Code.INVALID_SYNTAX, 2),
        ("bad.yml", "defaults: [lora]\n", Code.UNKNOWN_CHOICE, None),
    ],
    ids=["invalid", "tab", "yml"],
)
def test_10_a_yaml_that_cannot_be_read_is_told_with_file_and_line(
    in_tmp: Path, name: str, text: str, code: Code, row: int | None
) -> None:
    path = in_tmp / "mine" / "adapter" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    error = refused("train", "--config-dir=mine", *toy_run("adapter=bad"))
    assert (error.code, Path(str(error.file)).absolute(), error.row) == (code, path, row)


@pytest.mark.reliability(11)
def test_11_any_folder_and_the_layout_of_a_wheel_will_do(in_tmp: Path) -> None:
    """A wheel has conf/ inside the package; that one is built whole is the business of test_wheel.py."""
    installed, elsewhere = in_tmp / "installed", in_tmp / "elsewhere"
    shutil.copytree(conf_folder().parent / "lora_bench", installed / "lora_bench")
    shutil.copytree(conf_folder(), installed / "lora_bench" / "conf")
    elsewhere.mkdir()
    command = [sys.executable, "-m", "lora_bench", "train", "--cfg", "job", *toy_run("adapter=dora")]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    assert "method: lora" in done.stdout
    assert not any(elsewhere.iterdir())
