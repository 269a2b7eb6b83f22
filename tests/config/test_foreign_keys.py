"""Settings of other training programs are refused with ours, which exist."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from lora_bench.config.foreign_keys import FOREIGN_KEYS, foreign_key_note
from lora_bench.config.groups import GROUPS, choices
from lora_bench.config.key_index import read_index
from lora_bench.errors import Code
from tests.command_line import refused

if TYPE_CHECKING:
    from pathlib import Path


def test_every_answer_names_keys_and_choices_that_exist() -> None:
    keys = {entry.key for entry in read_index()["train"].keys}
    for answer in FOREIGN_KEYS.values():
        assert set(re.findall(r"\b(?:[a-z]+\.)+[a-zA-Z_]+\b", answer)) - {"metrics.jsonl"} <= keys, answer
        for group, choice in re.findall(r"(?<![\w.])([a-z]+)=(\w+)", answer):
            assert group not in GROUPS or choice == "NAME" or choice in choices(group), answer
        assert answer.endswith(".")
        assert len(answer) < 250


def test_none_is_a_key_of_ours() -> None:
    keys = {entry.key.rpartition(".")[2] for entry in read_index()["train"].keys}
    assert not keys & FOREIGN_KEYS.keys()


@pytest.mark.parametrize("key", ["r", "adapter.r", "--lora-r", "+lora_r", "trainer.learning_rate"])
def test_the_name_counts_whatever_stands_before_it(key: str) -> None:
    assert foreign_key_note(key) == FOREIGN_KEYS[key.lstrip("-+").rpartition(".")[2].replace("-", "_")]


def test_other_names_have_no_answer() -> None:
    assert foreign_key_note("adapter.rnk") is None


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("gradient_accumulation_steps=4", "trainer.micro_batch_size"),
        ("trainer.per_device_train_batch_size=8", "trainer.batch_size"),
        ("num_train_epochs=3", "trainer.epochs"),
        ("adapter.lora_alpha=16", "adapter.alpha"),
        ("r=8", "adapter.rank"),
        ("fp16=true", "trainer.precision"),
        ("output_dir=out", "hydra.run.dir"),
    ],
)
def test_a_key_of_another_program_is_refused_with_ours(in_tmp: Path, typed: str, ours: str) -> None:
    error = refused("train", typed)
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, typed.partition("=")[0])
    assert ours in str(error)


def test_an_option_of_another_program_is_refused_with_ours(in_tmp: Path) -> None:
    error = refused("train", "--learning_rate", "1e-4")
    assert error.code == Code.INVALID_SYNTAX
    assert "optimizer.lr" in str(error)
