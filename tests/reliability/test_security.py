"""Files, strings and keys from anywhere: nothing of them is run, nothing of them is let through."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_bench.backbones import tiny_tokenizers
from lora_bench.errors import Code, UserError
from tests.command_line import files_below, lora_bench, refused, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = toy_run("hydra.run.dir=run")
TENSORS = "adapter_model.safetensors"


class Bomb:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("exploded").touch, ())


@pytest.fixture
def finished(in_tmp: Path) -> Path:
    """A finished run's adapter."""
    assert lora_bench("train", *RUN).code == 0
    Path("pairs.tsv").write_text("question1\tquestion2\na\tb\n")
    return Path("run/adapter") / TENSORS


def predicted() -> UserError:
    """Return the error that refuses the run's adapter."""
    return refused("predict", "run=run", "input=pairs.tsv", "output=-")


@pytest.mark.reliability(46)
@pytest.mark.parametrize(
    ("name", "code", "blamed"),
    [
        ("pytorch_model.bin", Code.UNSUPPORTED, "model"),
        ("model.pt", Code.NOT_FOUND, "model"),
        ("model.safetensors", Code.DAMAGED, "model/model.safetensors"),
    ],
)
def test_46_a_pickled_checkpoint_is_never_opened(in_tmp: Path, name: str, code: Code, blamed: str) -> None:
    Path("model").mkdir()
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model", name).write_bytes(pickle.dumps(Bomb()))
    tiny_tokenizers.tokenizer("bert").save_pretrained("tokenizer")  # so that only the weights are wrong
    error = refused("train", *toy_run("model.path=model", "model.tokenizer=tokenizer", "hydra.run.dir=run"))
    assert (error.code, error.key, error.file) == (code, None, in_tmp / blamed)
    assert not Path("exploded").exists()


@pytest.mark.reliability(46)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_46_a_pickled_adapter_is_not_looked_at(finished: Path, name: str) -> None:
    finished.with_name(name).write_bytes(pickle.dumps(Bomb()))
    finished.unlink()
    error = predicted()
    assert (error.code, error.file) == (Code.DAMAGED, finished)
    finished.write_bytes(pickle.dumps(Bomb()))
    error = predicted()
    assert (error.code, error.file) == (Code.DAMAGED, finished)
    assert not Path("exploded").exists()


def huge_header(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def without(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor for name, tensor in tensors.items() if name != min(tensors)}, path)


def extra(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors | {"stranger": torch.ones(1)}, path)


def misshapen(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors | {min(tensors): torch.ones(3, 3)}, path)


def not_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors | {min(tensors): torch.full_like(tensors[min(tensors)], torch.nan)}, path)


@pytest.mark.reliability(46)
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (huge_header, "header"),
        (without, "{first} "),
        (extra, " stranger "),
        (misshapen, "{first} (3, 3) "),
        (not_finite, "{first} "),
    ],
)
def test_46_an_adapter_that_does_not_fit_is_refused_by_name(
    finished: Path, damage: Callable[[dict[str, torch.Tensor], Path], None], names: str
) -> None:
    tensors = load_file(finished)
    damage(tensors, finished)
    error = predicted()
    assert (error.code, error.file) == (Code.DAMAGED, finished)
    assert names.format(first=min(tensors)) in str(error)


@pytest.mark.reliability(46)
@pytest.mark.parametrize("damage", ["nan", "missing"])
def test_46_a_backbone_that_is_not_whole_is_refused_by_name(in_tmp: Path, damage: str) -> None:
    assert lora_bench("train", *toy_run("adapter=full", "hydra.run.dir=whole")).code == 0
    assert lora_bench("export", "run=whole", "format=merged", "output=model").code == 0
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("attention.self.query.weight"))
    if damage == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    error = refused("train", *toy_run("model.path=model", "hydra.run.dir=run"))
    assert (error.code, str(error.file)) == (Code.DAMAGED, str(in_tmp / "model"))
    assert name.removeprefix("bert.") in str(error)


@pytest.mark.reliability(46)
def test_46_code_beside_a_checkpoint_is_not_run(in_tmp: Path) -> None:
    Path("model").mkdir()
    code = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C", "AutoTokenizer": ["evil.C", None]}
    Path("model/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    Path("model/tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    Path("model/evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    for model in ("tiny_bert", "deberta"):
        error = refused("train", *toy_run(f"model={model}", "model.path=model", "hydra.run.dir=run"))
        assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "model.path", str(in_tmp / "model"))
    assert not Path("exploded").exists()


KEYS = ["sk-abcdefgh12345678", "hf_abcdefghijklmnopqrstuv", "ghp_abcdefgh12345678abcd", "AKIAIOSFODNN7EXAMPLE"]


def nowhere(key: str, *texts: str) -> None:
    """The key is in no file below this folder, in no file's name, and in none of the texts."""
    for name, content in files_below(Path.cwd()).items():
        assert key not in name
        assert key.encode() not in (content or b""), name
    assert not [text for text in texts if key in text]


@pytest.mark.reliability(47)
def test_47_keys_given_as_values_reach_no_file_and_no_screen(in_tmp: Path) -> None:
    given = [f"data.label_names=['{KEYS[0]}','{KEYS[1]}']", f"data.label_column={KEYS[2]}", f"data.task={KEYS[3]}"]
    answer = lora_bench("train", *RUN, *given)
    assert answer.code == 0, answer
    wrong = lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep"), *given, "adapter.rank=2,99999")
    assert wrong.code != 0
    sweep = lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep"), *given, "adapter.rank=2,4")
    tables = [lora_bench("compare", ".", "--format", form).out for form in ("table", "csv", "md", "latex", "json")]
    for key in KEYS:
        nowhere(key, *(text for override in (answer, wrong, sweep) for text in (override.out, override.err)), *tables)
    assert "***" in Path("run/run.json").read_text()
    assert "***" in Path("sweep/sweep.json").read_text()
    error = refused("train", "-m", "resume=sweep")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "resume", Path("sweep"))
    assert "${oc.env:NAME}" in str(error)


@pytest.mark.reliability(47)
def test_47_the_process_works_with_the_true_value(in_tmp: Path) -> None:
    key = KEYS[0]
    Path("pairs").mkdir()
    content = f"question1\tquestion2\t{key}\n" + "".join(f"a {i}\tb\t{i % 2}\n" for i in range(16))
    for split in ("train", "validation"):
        Path(f"pairs/{split}.tsv").write_text(content)
    arguments = toy_run("data=pairs", "data.path=pairs", f"data.label_column={key}", "hydra.run.dir=run")
    arguments = [override for override in arguments if "_rows" not in override]
    answer = lora_bench("train", *arguments, "data.selection_size=4")
    assert answer.code == 0, answer
    shutil.rmtree("pairs")
    nowhere(key, answer.out, answer.err)


@pytest.mark.reliability(47)
def test_47_keys_in_errors_and_tracebacks(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_bench import train

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("401: Incorrect API key: open.sesame.9, sent as Authorization: Bearer abcdefgh.ijkl")

    monkeypatch.setenv("LLM_API_KEY", "open.sesame.9")
    monkeypatch.setattr(train.PackTraining, "fit", failing)
    answer = lora_bench("train", *RUN)
    assert answer.code == 1
    assert "Incorrect API key: ***" in Path("run/run.log").read_text()
    nowhere("open.sesame.9", answer.out, answer.err, lora_bench("compare", "run").out)
    nowhere("abcdefgh.ijkl", answer.out, answer.err)
    error = refused("train", *toy_run("hydra.run.dir=other"), "llm.api_key=tell no one")
    assert (error.code, error.key) == (Code.FORBIDDEN, "llm")
    assert "llm.api_key_env" in str(error)
    assert "tell no one" not in str(error)


@pytest.mark.reliability(47)
def test_47_keys_in_names_of_folders(in_tmp: Path) -> None:
    error = refused("train", *toy_run(f"hydra.run.dir=outputs/{KEYS[0]}"))
    assert (error.code, error.key) == (Code.FORBIDDEN, "hydra.run.dir")
    arguments = toy_run("hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.override_dirname}")
    answer = lora_bench("train", "-m", *arguments, f"data.label_column={KEYS[0]}", "seed=0,1")
    assert answer.code == 2
    assert answer.error is not None
    assert (answer.error.code, answer.error.key) == (Code.FORBIDDEN, "hydra.run.dir")
    nowhere(KEYS[0], answer.out, answer.err)


HOSTILE = "<script>alert(1)</script>|**x**\x1b[31m=1+1"
FORMULA = "=HYPERLINK(1)"


@pytest.mark.reliability(48)
def test_48_hostile_strings_are_escaped_in_every_report(in_tmp: Path) -> None:
    for i, word in enumerate((HOSTILE, FORMULA)):
        assert lora_bench("train", *toy_run(f"hydra.run.dir=runs/{i}")).code == 0
        path = Path(f"runs/{i}/run.json")
        record = json.loads(path.read_text())
        record["config"]["data"]["source"] = word  # as someone else may have written it
        record["config"]["adapter"][word] = word
        path.write_text(json.dumps(record))
    record["status"], record["error"] = "failed", HOSTILE
    shutil.copytree("runs/1", "runs/\x1b[31mred")
    Path("runs/\x1b[31mred/run.json").write_text(json.dumps(record))
    answers = {
        form: lora_bench("compare", "runs", "--format", form) for form in ("table", "csv", "md", "latex", "json")
    }
    for answer in answers.values():
        assert answer.code == 0, answer
        assert "\x1b" not in answer.out + answer.err
    assert "<script>" not in answers["md"].out
    assert "**x**" not in answers["md"].out.replace("\\*", "")
    cells = [cell for line in csv.reader(io.StringIO(answers["csv"].out)) for cell in line]
    assert any(FORMULA in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
    assert json.loads(answers["json"].out)


@pytest.mark.reliability(48)
def test_48_nothing_of_the_data_or_of_a_name_drives_the_terminal(in_tmp: Path) -> None:
    answer = lora_bench("train", *toy_run("hydra.run.dir='\x1b[31mrun'"))
    assert answer.code == 0, answer
    assert "\x1b" not in answer.out + answer.err
    assert "/\\x1b[31mrun" in answer.out
    Path("pairs").mkdir()
    Path("pairs/train.tsv").write_text("question1\tquestion2\tlabel\na\tb\t1\na\tb\t\x1b]0;title\x07\n")
    arguments = ["data.label_names=[no,yes]"] + [
        override for override in toy_run("data=pairs", "data.path=pairs") if "_rows" not in override
    ]
    answer = lora_bench("train", *arguments)
    assert (answer.code, "\x1b" in answer.err, "\x07" in answer.err) == (2, False, False)
    assert answer.error is not None
    assert (answer.error.code, str(answer.error.file), answer.error.row) == (
        Code.INVALID_DATA,
        str(in_tmp / "pairs/train.tsv"),
        3,
    )
    assert "'\\x1b]0;title\\x07'" in answer.err
    answer = lora_bench("train", *toy_run("adapter='\x1b[2J'"))
    assert (answer.code, "\x1b" in answer.err) == (2, False)
    assert answer.error is not None
    assert (answer.error.code, answer.error.key, answer.error.value) == (Code.UNKNOWN_CHOICE, "adapter", "\x1b[2J")


@pytest.mark.reliability(48)
def test_48_offline_nothing_touches_the_network(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Any] = []

    def refusing(*arguments: Any, **_: Any) -> None:
        touched.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refusing)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refusing)
    assert lora_bench("train", *RUN).code == 0  # HF_HUB_OFFLINE is set for all tests
    for override, key, value, remedy in (
        ("model=bert", "model.hub_id", "google-bert/bert-base-uncased", "model.path=DIR"),
        ("model=roberta", "model.hub_id", "FacebookAI/roberta-base", "model.path=DIR"),
        ("data=qqp", "data.hub_id", "nyu-mll/glue", "data.path=DIR"),
    ):
        arguments = [text for text in toy_run(override) if not (override == "data=qqp" and "_rows" in text)]
        error = refused("train", *arguments)
        assert (error.code, error.key, error.value) == (Code.NOT_FOUND, key, value)
        assert remedy in str(error)
    assert touched == []


@pytest.mark.reliability(46)
def test_46_scores_of_a_good_adapter_are_those_of_its_training(finished: Path) -> None:
    """The run that is refused above when damaged predicts when it is undamaged."""
    answer = lora_bench("predict", "run=run", "input=pairs.tsv", "output=out.tsv")
    assert answer.code == 0
    (line,) = Path("out.tsv").read_text().splitlines()[1:]
    assert np.isfinite(float(line.split("\t")[-1]))
