"""Wrong configs are refused by key, value and remedy, and nothing that a config names is ever run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lora_bench.cli import conf_folder
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from pathlib import Path

TARGET = "{_target_: os.mkdir, path: EVIL}"
LOGGING = "{version: 1, handlers: {x: {class: os.mkdir, path: EVIL}}, root: {handlers: [x]}}"


@pytest.mark.reliability(1)
def test_01_a_rank_that_is_no_number(in_tmp: Path) -> None:
    assert refused("train", *toy_run("adapter.rank=abc")) == "lora-bench: adapter.rank=abc: is not a whole number.\n"


@pytest.mark.reliability(2)
@pytest.mark.parametrize("rank", ["0", "-3", "2.5", "null"])
def test_02_a_rank_that_cannot_be(in_tmp: Path, rank: str) -> None:
    named = "adapter.rank: must have a value" if rank == "null" else f"adapter.rank={rank}: "
    assert named in refused("train", *toy_run(f"adapter.rank={rank}"))


@pytest.mark.reliability(3)
@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa"])
def test_03_a_rank_above_the_layers_smallest_side(in_tmp: Path, adapter: str) -> None:
    told = refused("train", *toy_run(f"adapter={adapter}", "adapter.rank=33"))
    assert "adapter.rank=33: is above 32" in told


@pytest.mark.reliability(4)
@pytest.mark.parametrize("key", ["optimizer.lr", "adapter.dropout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-0.1"])
def test_04_numbers_that_are_not_finite_or_out_of_range(in_tmp: Path, key: str, value: str) -> None:
    assert f"{key}={'inf' if value == '1e400' else value}: must be" in refused("train", *toy_run(f"{key}={value}"))


@pytest.mark.reliability(4)
@pytest.mark.parametrize("value", ["1", "1.5"])
def test_04_all_dropped(in_tmp: Path, value: str) -> None:
    assert f"adapter.dropout={float(value)}: must be" in refused("train", *toy_run(f"adapter.dropout={value}"))


@pytest.mark.reliability(5)
@pytest.mark.parametrize(("typed", "meant"), [("adapter.rnak=8", "adapter.rank"), ("optimiser.lr=1", "optimizer.lr")])
def test_05_the_nearest_known_key_is_suggested(in_tmp: Path, typed: str, meant: str) -> None:
    assert f"is not a known key. Did you mean {meant}?" in refused("train", *toy_run(typed))


@pytest.mark.reliability(6)
def test_06_the_choices_of_a_group_are_listed(in_tmp: Path) -> None:
    told = refused("train", *toy_run("adapter=lroa"))
    assert "adapter=lroa: is not one of its choices. Did you mean lora? Choices: adalora, bitfit, dora" in told
    assert "Known: adamw." in refused("train", *toy_run("optimizer=zzz"))


@pytest.mark.reliability(7)
@pytest.mark.parametrize("again", ["adapter.rank=4", "++adapter.rank=4"])
def test_07_the_same_key_twice_is_said(in_tmp: Path, again: str) -> None:
    answer = lora_bench("train", "--cfg", "job", *toy_run("adapter.rank=2"), again)
    assert answer.code == 0
    assert answer.err == "note: adapter.rank=2 is given again with another value, which counts\n"
    assert "rank: 4" in answer.out
    assert lora_bench("train", "--cfg", "job", *toy_run("adapter.rank=4"), "adapter.rank=4").err == ""


@pytest.mark.reliability(8)
def test_08_target_modules_that_are_not_there(in_tmp: Path) -> None:
    told = refused("train", *toy_run("adapter.target_modules=.*qurey"))
    assert "adapter.target_modules=.*qurey: matches no linear of the backbone. Names there are:" in told
    assert "query" in told


@pytest.mark.reliability(8)
def test_08_an_alternative_that_matches_nothing_is_said(in_tmp: Path) -> None:
    answer = lora_bench("train", *toy_run("adapter.target_modules='.*(qurey|value)'"))
    assert answer.code == 0, answer
    assert "adapter.target_modules: no linear matches 'qurey'." in answer.out
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
    refused("train", *toy_run(override.replace("EVIL", str(in_tmp / "evil"))))
    assert not (in_tmp / "evil").exists()


@pytest.mark.reliability(9)
@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("experiment", f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}"),
        ("experiment", f"# @package _global_\nhydra: {{job_logging: {LOGGING}}}"),
        ("+hydra/callbacks", f"# @package hydra.callbacks\nx: {TARGET}"),
        ("hydra/launcher", "_target_: os.mkdir\npath: EVIL"),
        ("data", "defaults: [toy]\n_target_: os.mkdir\npath: EVIL"),
    ],
    ids=["callbacks", "logging", "callbacks as a group", "launcher", "target"],
)
def test_09_code_named_in_a_users_yaml_is_not_run(in_tmp: Path, group: str, text: str) -> None:
    path = in_tmp / "mine" / group.lstrip("+") / "bad.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("EVIL", str(in_tmp / "evil")))
    refused("train", "--config-dir=mine", *toy_run(f"{group}=bad"))
    assert not (in_tmp / "evil").exists()


@pytest.mark.reliability(10)
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("bad.yaml", "defaults: [lora]\nrank: [1\n", "bad.yaml, row 3: is not valid YAML"),
        ("bad.yaml", "defaults: [lora]\nrank:\t8\n\talpha: 1\n", "bad.yaml, row 2: is not valid YAML: found character"),
        ("bad.yml", "defaults: [lora]\n", "bad.yml: ends in .yml, which is not read. Rename it"),
    ],
    ids=["invalid", "tab", "yml"],
)
def test_10_a_yaml_that_cannot_be_read_is_told_with_file_and_line(
    in_tmp: Path, name: str, text: str, said: str
) -> None:
    (in_tmp / "mine" / "adapter").mkdir(parents=True)
    (in_tmp / "mine" / "adapter" / name).write_text(text)
    assert f"mine/adapter/{said}" in refused("train", "--config-dir=mine", *toy_run("adapter=bad"))


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
