"""A finished or interrupted run whose backbone or tokenizer was moved or changed after training."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import transformers

import lora_bench
from lora_bench.backbones import tiny_tokenizers
from lora_bench.errors import Code
from tests.backbones.tools import enliven, save
from tests.command_line import Answer, refused, refuses, toy_run
from tests.command_line import lora_bench as run

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = [("how do i cook rice", "best way to cook rice"), ("a", "b")]
SIZES = {"vocab_size": 141, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model`, a tokenizer `tok`, rows `in.tsv` and a finished run `run`."""
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(**SIZES, intermediate_size=64)
    save(
        tmp_path / "model",
        enliven(transformers.BertForSequenceClassification(config)),
        tiny_tokenizers.tokenizer("bert"),
    )
    shutil.copytree("model", "tok", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (tmp_path / "in.tsv").write_text("question1\tquestion2\n" + "".join("\t".join(pair) + "\n" for pair in PAIRS))
    done = train("hydra.run.dir=run")
    assert done.code == 0, done
    return tmp_path


def train(*overrides: str) -> Answer:
    return run("train", *toy_run("model=bert", "model.path=model", "model.tokenizer=tok", *overrides))


def change(file: Path) -> None:
    """Other ids for two letters."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


COMMANDS = {
    "predict": ("predict", "run=run", "input=in.tsv", "output=out.tsv"),
    "eval": ("eval", "run=run", "data=toy", "data.train_rows=40", "data.validation_rows=16"),
    "export": ("export", "run=run", "format=merged", "output=exported"),
}


def test_a_moved_backbone_and_tokenizer_are_found_at_their_new_places(trained: Path) -> None:
    before = lora_bench.load("run").predict(PAIRS)
    (trained / "model").rename(trained / "moved")
    (trained / "tok").rename(trained / "moved_tok")
    for command in COMMANDS.values():
        error = refused(*command)
        assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "model.path", str(trained / "model"))
        assert "model.path=DIR" in str(error)
        answer = run(*command, "model.path=moved", "model.tokenizer=moved_tok")
        assert answer.code == 0, answer
    after = lora_bench.load("run", model_path="moved", tokenizer="moved_tok").predict(PAIRS)
    np.testing.assert_array_equal(after, before)
    warm = train("hydra.run.dir=warm", "model.path=moved", "model.tokenizer=moved_tok", "adapter.init_from=run")
    assert warm.code == 0, warm


def test_another_backbone_at_the_new_place_is_refused(trained: Path) -> None:
    config = transformers.BertConfig(**SIZES, intermediate_size=64)
    network = enliven(transformers.BertForSequenceClassification(config), seed=1)
    save(trained / "other", network, tiny_tokenizers.tokenizer("bert"))
    error = refused(*COMMANDS["predict"], "model.path=other")
    assert (error.code, error.key) == (Code.MISMATCH, "run")
    assert "backbone" in str(error)


def test_a_tokenizer_that_was_changed_is_refused_everywhere(trained: Path) -> None:
    record = json.loads((trained / "run" / "run.json").read_text())
    assert {"tokenizer_sha256", "tokenizer_probe_sha256"} <= record["environment"].keys()
    shutil.copytree("run", "stopped")
    record["status"] = "interrupted"
    (trained / "stopped" / "run.json").write_text(json.dumps(record))
    change(trained / "tok" / "tokenizer.json")
    for command in COMMANDS.values():
        error = refused(*command)
        assert (error.code, error.key, str(error.value)) == (Code.MISMATCH, "run", "run")
        assert "model.tokenizer=DIR" in str(error)
    with refuses(Code.MISMATCH, key="run") as caught:
        lora_bench.load("run")
    assert "model.tokenizer=DIR" in str(caught.value)
    for request, key, code in (
        (("adapter.init_from=run", "hydra.run.dir=warm"), "adapter.init_from", Code.MISMATCH),
        (("resume=stopped",), "resume", Code.NOT_RESUMABLE),
    ):
        answer = train(*request) if key != "resume" else run("train", *request)
        assert answer.code == 2, answer
        assert answer.error is not None
        assert (answer.error.code, answer.error.key) == (code, key)
        assert "model.tokenizer=DIR" in str(answer.error)
    assert run(*COMMANDS["predict"], "model.tokenizer=model").code == 0  # the former one lies there too


def test_an_interrupted_run_is_resumed_with_its_backbone_at_a_new_place(trained: Path) -> None:
    record = json.loads((trained / "run" / "run.json").read_text())
    (trained / "run" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    (trained / "model").rename(trained / "moved")
    error = refused("train", "resume=run")
    assert (error.code, error.key) == (Code.NOT_FOUND, "model.path")
    assert "model.path=DIR" in str(error)
    answer = run("train", "resume=run", "model.path=moved")
    assert answer.code == 0, answer
    assert json.loads((trained / "run" / "run.json").read_text())["status"] == "done"


def test_a_relative_tokenizer_is_recorded_absolute(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((trained / "run" / "run.json").read_text())
    assert record["config"]["model"]["tokenizer"] == str(trained / "tok")
    before = lora_bench.load("run").predict(PAIRS)
    elsewhere = trained / "elsewhere"
    shutil.copytree("tok", elsewhere / "tok")
    change(elsewhere / "tok" / "tokenizer.json")
    monkeypatch.chdir(elsewhere)
    np.testing.assert_array_equal(lora_bench.load(trained / "run").predict(PAIRS), before)


def test_a_record_that_does_not_know_its_tokenizer_is_loaded(trained: Path) -> None:
    record = json.loads((trained / "run" / "run.json").read_text())
    for key in ("tokenizer_sha256", "tokenizer_probe_sha256"):
        del record["environment"][key]
    (trained / "run" / "run.json").write_text(json.dumps(record))
    assert run(*COMMANDS["predict"]).code == 0
