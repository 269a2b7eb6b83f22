"""Help explains commands, groups and keys from the sources, and fits into a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.config.groups import COMMANDS, choices
from lora_bench.config.key_index import read_index
from lora_bench.errors import Code
from tests.command_line import lora_bench, refused

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_on(*topic: str) -> str:
    answer = lora_bench("help", *topic)
    assert answer.code == 0, answer
    return answer.out


def test_train_help_explains_every_key_of_every_run_in_a_line() -> None:
    text = help_on("train")
    assert text == lora_bench("train", "--help").out
    for entry in read_index()["train"].keys:
        if entry.section == entry.group != "hydra":
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {entry.key}=")]
            assert entry.default is None or len(entry.default) > 14 or f"{entry.key}={entry.default} " in line
            assert len(line.split()) > 2, line


@pytest.mark.parametrize("topic", [[], ["train"], ["adapter"], ["data"], ["pack"], ["trainer.objective"], ["hydra"]])
def test_help_fits_into_eighty_columns(topic: list[str]) -> None:
    assert [line for line in help_on(*topic).splitlines() if len(line) > 82] == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "help"])
def test_help_of_a_command_is_its_help(command: str) -> None:
    assert help_on(command) == lora_bench(command, "--help").out


def test_help_of_a_group_has_its_choices_and_the_keys_that_they_add() -> None:
    text = help_on("adapter")
    assert all(f" {choice}" in text or f"={choice}" in text for choice in choices("adapter"))
    assert "Keys of adapter=adalora:" in text
    assert "  adapter.orthogonality=0.1" in text
    assert help_on("adapter=") == help_on("adapter.") == text


def test_help_of_a_key_has_type_default_values_and_meaning() -> None:
    first, *meaning, values = help_on("trainer.precision").splitlines()
    assert first == "trainer.precision (text, default auto)"
    assert any("bf16 where the device computes it fast" in line for line in meaning)
    assert values == "  Values: auto, fp32, bf16"
    assert (
        help_on("adapter.rank").count("adapter.rank (integer, default ") == 6
    )  # LoRA, AdaLoRA, LoRA-XS, VeRA, HiRA, MiSS


@pytest.mark.parametrize(
    ("topic", "code", "answer"),
    [
        (["adapter.rnk"], Code.UNKNOWN_CHOICE, "adapter.rank"),
        (["learning_rate"], Code.UNKNOWN_CHOICE, "optimizer.lr"),
        (["xyzzy"], Code.UNKNOWN_CHOICE, "lora-bench train --help"),
        (["train", "eval"], Code.CONFLICT, "lora-bench help train"),
    ],
)
def test_an_unknown_topic_is_refused(in_tmp: Path, topic: list[str], code: Code, answer: str) -> None:
    error = refused("help", *topic)
    assert (error.code, error.key) == (code, "help")
    assert answer in str(error)
