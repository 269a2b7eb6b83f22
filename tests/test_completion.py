"""Shell completion: candidates for each word of a command line, the scripts of three shells, and what they load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_bench.completion import PATH_KEYS, SCRIPTS, complete
from lora_bench.config.groups import COMMANDS, choices
from lora_bench.config.key_index import read_index
from lora_bench.errors import Code
from tests.command_line import lora_bench, refused

ROOT = Path(__file__).parent.parent


def words(*typed: str) -> list[str]:
    return [candidate.word for candidate in complete(typed)]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["tr"], ["train"]),
        (["comp"], ["compare", "completion"]),
        (["train", "adap"], ["adapter=", "adapter."]),
        (["train", "adapter.ra"], ["adapter.rank="]),
        (["train", "optimizer.b"], ["optimizer.beta1=", "optimizer.beta2="]),
        (["train", "see"], ["seed="]),
        (["train", "adapter=dor"], ["adapter=dora"]),
        (["train", "-m", "adapter=lora,dor"], ["adapter=lora,dora"]),
        (["train", "metric=[specificity,coh"], ["metric=[specificity,cohen_kappa"]),
        (["train", "trainer.precision="], [f"trainer.precision={name}" for name in ("auto", "fp32", "bf16")]),
        (["train", "adapter.init=pi"], ["adapter.init=pissa"]),
        (["train", "trainer.main_metric=sp"], ["trainer.main_metric=spearman"]),
        (["train", "dry_run="], ["dry_run=true", "dry_run=false"]),
        (["train", "hydra/launcher="], ["hydra/launcher=slurm"]),
        (["train", "hydra/launcher=slurm", "hydra.launcher.part"], ["hydra.launcher.partition="]),
        (["train", "--cfg", "j"], ["job"]),
        (["train", "--mul"], ["--multirun"]),
        (["export", "format=o"], ["format=onnx"]),
        (["prompt", "prompt=few"], ["prompt=few_shot"]),
        (["compare", "--ba"], ["--baseline"]),
        (["clean", "to"], ["tokens"]),
        (["show", "la"], ["last"]),
        (["predict", "run=la"], ["run=last"]),
        (["search", "adapter=dor"], ["adapter=dora"]),
        (["completion", "z"], ["zsh"]),
        (["help", "adapter.ra"], ["adapter.rank"]),
        (["no_such_command", "x"], []),
        (["train", "adapter.rank="], []),
    ],
    ids=" ".join,
)
def test_candidates(typed: list[str], expected: list[str]) -> None:
    assert words(*typed) == expected


def test_the_first_word_is_a_command() -> None:
    assert words("") == [*COMMANDS, "--version", "--help"]
    assert words() == words("")


def test_every_group_and_choice_and_every_key_with_values_is_completed() -> None:
    for command, index in read_index().items():
        if not index.keys:
            continue
        assert {f"{group}=" for group in index.groups} <= set(words(command, ""))
        for group in index.groups:
            assert set(words(command, f"{group}=")) >= {f"{group}={choice}" for choice in choices(group)}
        for entry in index.keys:
            assert f"{entry.key}=" in words(command, entry.key)
            offered = words(command, f"{entry.key}=")
            assert {f"{entry.key}={value}" for value in entry.values} <= set(offered) or entry.key in PATH_KEYS


def test_folders_are_completed_for_paths(in_tmp: Path) -> None:
    for name in ("runs/one", "runs/two words", ".hidden"):
        Path(name).mkdir(parents=True)
    Path("runs/pairs.tsv").touch()
    assert words("eval", "run=ru") == ["run=runs/"]
    assert words("predict", "input=runs/") == ["input=runs/one/", "input=runs/pairs.tsv", "input=runs/two words/"]
    assert words("train", "resume=") == ["resume=last", "resume=runs/"]
    assert words("compare", "runs/o") == ["runs/one/"]
    assert words("train", "--config-dir", "r") == ["runs/"]
    assert words("eval", "run=nowhere/x") == []
    Path("mine/adapter").mkdir(parents=True)
    Path("mine/adapter/small.yaml").touch()
    assert words("train", "--config-dir", "mine", "adapter=sma") == ["adapter=small"]


def test_a_key_press_loads_little(in_tmp: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lora_bench", "__complete", "train", "adapter=lo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "adapter=lora\tLoRA" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"rich", "yaml", "hydra", "omegaconf", "torch", "importlib.metadata", "lora_bench.cli"}


@pytest.mark.parametrize(("arguments", "value"), [([], None), (["tcsh"], "tcsh"), (["bash", "zsh"], "bash zsh")])
def test_an_unknown_shell_is_refused(in_tmp: Path, arguments: list[str], value: str | None) -> None:
    error = refused("completion", *arguments)
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "completion", value)
    assert all(shell in str(error) for shell in SCRIPTS)


@pytest.fixture(scope="module")
def path_with_command(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH that has `lora-bench`, which runs this clone."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "lora-bench"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m lora_bench "$@"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "split", "expected"),
    [
        ("lora-bench tr", ["lora-bench", "tr"], "train"),
        ("lora-bench train ", ["lora-bench", "train", ""], "model= adapter="),
        ("lora-bench train adapter=", ["lora-bench", "train", "adapter", "="], "adalora bitfit"),
        ("lora-bench train adapter=dor", ["lora-bench", "train", "adapter", "=", "dor"], "dora"),
        ("lora-bench train adapter.ra", ["lora-bench", "train", "adapter.ra"], "adapter.rank="),
    ],
)
def test_bash_offers_what_follows_its_word_break(
    line: str, split: list[str], expected: str, path_with_command: str
) -> None:
    quoted = " ".join(f"'{word}'" for word in split)
    state = f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({quoted}) COMP_CWORD={len(split) - 1}"
    program = f'{lora_bench("completion", "bash").out}\n{state}\n_lora_bench\necho "${{COMPREPLY[@]}}"'
    environment = os.environ | {"PATH": path_with_command}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(expected), done
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    check = subprocess.run([shell, "-n"], input=SCRIPTS[shell], capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")
