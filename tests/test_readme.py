"""The README keeps its word: its commands compose, its method trains, its YAMLs work, and CI runs its test command."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lora_bench.adapters.methods
from lora_bench.config.groups import COMMANDS, conf_folder
from lora_bench.records import run_folder
from tests.command_line import lora_bench as run
from tests.command_line import toy_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMAND_LINES = [
    line.partition(" #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for part in block.splitlines()
    for line in part.split("&&")
    if line.strip().startswith("lora-bench")
]


def named_blocks() -> dict[str, str]:
    """Code blocks whose first line says which file they are."""
    return {found.group(1): block for _, block in BLOCKS if (found := re.match(r"# (\S+\.(?:py|yaml))\n", block))}


def test_all_commands_are_seen() -> None:
    assert len(COMMAND_LINES) >= 9
    assert {shlex.split(line)[1] for line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if shlex.split(line)[1] == "train"])
def test_train_commands_compose(line: str, in_tmp: Path) -> None:
    if "--config-dir DIR" in line:
        for name, block in named_blocks().items():
            if name.startswith("DIR/"):
                path = in_tmp / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block, encoding="utf-8")
    arguments = [a for a in shlex.split(line)[2:] if a != "-m" and "," not in a and "range" not in a]
    answer = run("train", "--cfg", "job", *arguments)
    assert answer.code == 0, answer.err


def test_the_method_of_the_readme_trains(tmp_path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = named_blocks()
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "bias.py").write_text(blocks["lora_bench/adapters/methods/bias.py"], encoding="utf-8")
    (tmp_path / "conf" / "adapter").mkdir(parents=True)
    (tmp_path / "conf" / "adapter" / "bias.yaml").write_text(blocks["conf/adapter/bias.yaml"], encoding="utf-8")
    places = [*lora_bench.adapters.methods.__path__, str(tmp_path / "methods")]
    monkeypatch.setattr(lora_bench.adapters.methods, "__path__", places)
    try:
        arguments = toy_run("adapter=bias", "trainer.max_steps=3", "hydra.run.dir=run")
        answer = run("train", "--config-dir", str(tmp_path / "conf"), *arguments)
    finally:
        sys.modules.pop("lora_bench.adapters.methods.bias", None)
    assert answer.code == 0, answer.err
    found = run_folder.read(in_tmp / "run")
    assert found["params"]["adapter"] == 2 * (4 * 32 + 64 + 32)  # a bias for each output of two layers' linears
    assert set(found["targets"].values()) == {0}


def test_the_yamls_of_the_readme_are_used(in_tmp: Path, backbone: Callable[..., Any]) -> None:
    made = backbone("tiny_bert")
    made.network.save_pretrained("MODEL")
    made.tokenizer.save_pretrained("MODEL")
    Path("PAIRS").mkdir()
    rows = [f"left text {i}\tright text {i % 7}\t{i % 2}" for i in range(40)]
    for split in ("train", "validation"):
        Path(f"PAIRS/{split}.tsv").write_text("\n".join(["left\tright\tsame", *rows]) + "\n", encoding="utf-8")
    for name, block in named_blocks().items():
        if name.startswith("DIR/"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(block, encoding="utf-8")
    asked = "train --config-dir DIR model=mine data=mine metric=[mine]"
    assert f"lora-bench {asked}" in COMMAND_LINES
    answer = run(*asked.split(), "trainer.max_steps=1", "trainer.precision=fp32", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    assert "validation/jaccard" in run_folder.read(in_tmp / "run")["metrics"]


def test_keys_of_the_readme_exist() -> None:
    known = run("train", "--cfg", "job", "model=tiny_bert", "data=pairs", "data.path=x").out
    settings = README.replace(methods_table(), "")
    for results in ("| figure | is |", "| column | is |"):  # what comes out is no key
        for start in re.findall(rf"^{re.escape(results)}.*?(?=\n\n)", README, re.MULTILINE | re.DOTALL):
            settings = settings.replace(start, "")
    for key in re.findall(r"^\| (`.+?) \|", settings, re.MULTILINE):
        for name in re.findall(r"`([A-Za-z_.]+)=?\S*?`", key):
            assert f"{name.rsplit('.', 1)[-1]}:" in known, name


def options(group: str) -> set[str]:
    return {path.stem for path in (conf_folder() / group).glob("*.yaml") if path.stem[0] != "_"}


def test_choices_of_the_readme_exist() -> None:
    for group, row in re.findall(r"^\| `(model|data)=` \| (.+?) \|$", README, re.MULTILINE):
        named = set(re.findall(r"`([a-z_]+)`", row))
        assert named
        assert named <= options(group)


def methods_table() -> str:
    (table,) = re.findall(r"^\| `adapter=` \| what it is \|\n(?:\|.*\n)+", README, re.MULTILINE)
    return str(table)


def test_every_method_is_in_the_readme() -> None:
    named = re.findall(r"`([a-z_]+)`", "".join(row.split(" | ")[0] for row in methods_table().splitlines()[2:]))
    assert sorted(named) == sorted(options("adapter"))


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = 'pip install -e ".[dev]" && pytest -n logical'
    assert f"```bash\n{command}\n```" in README
    assert f"{command} " in (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-2:] == ["scripts/lint", "scripts/test"]
