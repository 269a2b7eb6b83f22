"""A finished run, restored from its folder, gives the scores it gave; what is not that run is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import lora_bench
from lora_bench.data.toy import generate
from lora_bench.errors import Code
from lora_bench.evaluation.calibration import apply_temperature
from lora_bench.predict import run_predict
from lora_bench.records.job import Job
from lora_bench.run.prediction_request import PredictionRequest
from lora_bench.train import train
from tests import three_classes
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, TINY, composed
from tests.three_classes import as_tsv, put

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_bench.backbones.base import Backbone

QUICK = [*SMALL_TOY, "data.max_length=48", "trainer.epochs=1", "optimizer.lr=0.02"]
PAIRS = list(zip(*generate(40, 0, "validation").texts, strict=True))
Run = Callable[..., Path]


def trained(folder: Path, *overrides: str) -> Path:
    console = Console(file=io.StringIO())
    train(Job(composed(*overrides), folder, {"model": "m", "adapter": "a", "data": "d"}, []), console=console)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs that are looked at and left alone, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = trained(tmp_path_factory.mktemp("runs") / "run", *QUICK, *overrides)
        return made[overrides]

    return run


def written(folder: Path, split: str = "validation") -> NDArray[np.float64]:
    return np.array(pq.read_table(folder / "predictions" / f"{split}.parquet").column("score"))


def ask(**keys: object) -> None:
    run_predict(PredictionRequest.read(composed(*(f"{key}={value}" for key, value in keys.items()), name="predict")))


VARIANTS = [
    *((f"model={family}",) for family in TINY),
    ("adapter=full",),
    ("adapter=head_only",),
    ("model=tiny_t5", "adapter=full"),
    ("model=tiny_t5", "model.form=encoder"),
    ("trainer.precision=bf16",),
    ("adapter.dropout=0.3", "adapter.target_modules=qv", "adapter.layers=top:1"),
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: ",".join(overrides))
def test_a_restored_run_gives_the_scores_it_gave(runs: Run, overrides: tuple[str, ...]) -> None:
    folder = runs(*overrides)
    run = lora_bench.load(folder)
    expected = written(folder)
    assert np.ptp(expected) > 1e-5  # it tells pairs apart, so equality says something
    assert np.array_equal(run.predict(PAIRS), expected)  # the same batches: to the last bit
    few = run.predict(PAIRS[3:6])
    np.testing.assert_allclose(few, expected[3:6], atol=3e-3 if "trainer.precision=bf16" in overrides else 1e-6)


def test_a_moved_run_still_predicts(runs: Run, tmp_path: Path) -> None:
    shutil.copytree(runs("model=tiny_bert"), tmp_path / "moved here")
    assert np.array_equal(
        lora_bench.load(str(tmp_path / "moved here")).predict(PAIRS), written(tmp_path / "moved here")
    )


def test_predicting_leaves_no_trace_in_the_cache(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lora_bench.load(runs("model=tiny_bert"))
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    run.predict([("secret", "text")])
    assert not (tmp_path / "cache").exists()


def test_calibrated_scores_keep_their_labels(runs: Run, tmp_path: Path) -> None:
    folder = runs("model=tiny_bert")
    temperature = json.loads((folder / "run.json").read_text())["selection"]["temperature"]
    (tmp_path / "in.tsv").write_text("question1\tquestion2\n" + "".join("\t".join(pair) + "\n" for pair in PAIRS))
    found = {}
    for name, choice in (("plain", "false"), ("calibrated", "true")):
        output = tmp_path / f"{name}.parquet"
        ask(run=folder, input=tmp_path / "in.tsv", output=output, calibrated=choice)
        found[name] = pq.read_table(output)
    plain, scaled = (np.array(found[name].column("score")) for name in ("plain", "calibrated"))
    np.testing.assert_allclose(np.log(scaled / (1 - scaled)), np.log(plain / (1 - plain)) / temperature, rtol=1e-6)
    assert found["plain"].column("label") == found["calibrated"].column("label")
    with refuses(Code.INVALID_VALUE, key="calibrated") as caught:
        ask(run=folder, input=tmp_path / "in.tsv", output=tmp_path / "x.tsv", calibrated="maybe")
    assert caught.value.value == "maybe"


def test_labels_are_cut_at_the_threshold_that_is_asked_for(runs: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs("model=tiny_bert"), tmp_path / "run"))
    found = json.loads((folder / "run.json").read_text())
    scores = written(folder)
    found["selection"]["threshold"] = own = float(np.sort(scores)[1])
    (folder / "run.json").write_text(json.dumps(found))
    (tmp_path / "in.tsv").write_text("question1\tquestion2\n" + "".join("\t".join(pair) + "\n" for pair in PAIRS))

    def labels(choice: object) -> list[int]:
        ask(run=folder, input=tmp_path / "in.tsv", output=tmp_path / "out.parquet", threshold=choice)
        return pq.read_table(tmp_path / "out.parquet").column("label").to_pylist()

    assert labels(0.5) == (scores >= 0.5).astype(int).tolist()
    assert labels("selection") == (scores >= own).astype(int).tolist() == [s >= own for s in scores]
    assert labels(1) == [0] * len(scores)
    for wrong in ("2", "best", "True"):
        with refuses(Code.INVALID_VALUE, key="threshold") as caught:
            labels(wrong)
        assert str(caught.value.value) == wrong
    del found["selection"]["threshold"], found["selection"]["temperature"]
    (folder / "run.json").write_text(json.dumps(found))
    with refuses(Code.UNSUPPORTED, key="threshold") as caught:
        labels("selection")
    assert caught.value.value == "selection"


def test_odd_texts_are_texts(runs: Run) -> None:
    run = lora_bench.load(runs("model=tiny_bert"))
    scores = run.predict([("", ""), ("東京 🦊", "NA"), ("x" * 5000, "y" * 5000), ["a", "list"]])
    assert scores.shape == (4,)
    assert ((scores > 0) & (scores < 1)).all()
    assert run.predict([]).shape == (0,)


def test_the_wrong_number_of_texts_is_refused(runs: Run) -> None:
    run = lora_bench.load(runs("model=tiny_bert"))
    for pairs, row in (([("a", "b"), "alone"], "row 1"), ([("a", "b", "c")], "row 0")):
        with refuses(Code.INVALID_DATA) as caught:
            run.predict(pairs)
        assert row in str(caught.value)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on single sentences."""
    folder = tmp_path_factory.mktemp("single")
    rows = [f"{'good' if i % 2 else 'bad'} film number {i}\t{i % 2}" for i in range(40)]
    for split, some in (("train", rows), ("validation", rows[:10])):
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *some]) + "\n")
    columns = ["data.text_columns=[sentence]", "trainer.precision=fp32", "trainer.max_steps=2"]
    return trained(folder / "run", "data=pairs", f"data.path={folder}", *columns)


def test_single_sentences(single: Path) -> None:
    run = lora_bench.load(single)
    texts = [f"{'good' if i % 2 else 'bad'} film number {i}" for i in range(10)]
    assert np.array_equal(run.predict(texts), written(single))
    assert np.array_equal(run.predict([(text,) for text in texts]), written(single))
    with refuses(Code.INVALID_DATA) as caught:
        run.predict([("a", "b")])
    assert "row 0" in str(caught.value)


@pytest.mark.parametrize("status", ["running", "failed", "diverged", "interrupted"])
def test_an_unfinished_run_is_refused(runs: Run, tmp_path: Path, status: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("model=tiny_bert"), folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": status}))
    with refuses(Code.UNFINISHED, key="run") as caught:
        lora_bench.load(folder)
    assert caught.value.value == folder
    assert status in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with refuses(Code.NOT_FOUND) as caught:
        lora_bench.load(tmp_path)
    assert caught.value.file == tmp_path / "run.json"


def test_another_backbone_is_refused(backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    made, place = backbone(), tmp_path / "backbone"
    made.network.save_pretrained(place)
    made.tokenizer.save_pretrained(place)
    options = [*QUICK, "model=bert", f"model.path={place}", "trainer.max_steps=2"]
    folder = trained(tmp_path / "run", *options)
    assert np.array_equal(lora_bench.load(folder).predict(PAIRS), written(folder))
    tensors = load_file(place / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    tensors[name][0, 0] += 1e-6
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with refuses(Code.MISMATCH, key="run") as caught:
        lora_bench.load(folder)
    assert caught.value.value == folder
    assert "backbone" in str(caught.value)


def damage_absent(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, path)


def damage_missing(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def damage_shape(path: Path) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1].clone()}, path)


@pytest.mark.parametrize("damage", [damage_absent, damage_cut, damage_nan, damage_missing, damage_shape])
def test_damaged_weights_are_refused_by_name(runs: Run, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(runs("model=tiny_bert"), tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    damage(path)
    with refuses(Code.DAMAGED) as caught:
        lora_bench.load(tmp_path / "run")
    assert caught.value.file == path


def test_a_flipped_bit_in_the_weights_is_refused(runs: Run, tmp_path: Path) -> None:
    """Every number stays finite and every shape right: only the digest in the record tells."""
    folder = tmp_path / "run"
    shutil.copytree(runs("model=tiny_bert"), folder)
    path = folder / "adapter/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with refuses(Code.DAMAGED) as caught:
        lora_bench.load(folder)
    assert caught.value.file == path


def got(path: Path) -> list[dict[str, Any]]:
    """The rows of an output file, as its format has them."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    import csv

    dialect: dict[str, Any] = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    rows = list(csv.DictReader(io.StringIO(text), **dialect))
    return [{**row, "label": int(row["label"]), "score": float(row["score"])} for row in rows]


ROWS = [{"question1": a, "question2": b} for a, b in PAIRS]


@pytest.mark.parametrize("output", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("given", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_format_in_and_out(runs: Run, tmp_path: Path, given: str, output: str) -> None:
    folder = runs("model=tiny_bert")
    source, target = put(tmp_path / f"new{given}", ROWS), tmp_path / f"labelled{output}"
    ask(run=folder, input=source, output=target)
    answers = got(target)
    expected = written(folder)
    assert [answer["score"] for answer in answers] == expected.tolist()
    assert [answer["label"] for answer in answers] == (expected >= 0.5).astype(int).tolist()
    assert [(a["question1"], a["question2"]) for a in answers] == PAIRS
    assert list(answers[0]) == ["question1", "question2", "label", "label_name", "score"]


def test_standard_input_to_standard_output(
    runs: Run, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = runs("model=tiny_bert")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(as_tsv(ROWS))))
    ask(run=folder, input="-")
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[0] == "question1\tquestion2\tlabel\tlabel_name\tscore"
    assert [float(line.split("\t")[4]) for line in lines[1:]] == written(folder).tolist()


def test_other_column_names_and_more_columns(runs: Run, tmp_path: Path) -> None:
    folder = runs("model=tiny_bert")
    rows = [{"id": str(i), "b": b, "a": a} for i, (a, b) in enumerate(PAIRS)]
    ask(run=folder, input=put(tmp_path / "new.tsv", rows), output=tmp_path / "out.jsonl", text_columns="[a,b]")
    answers = got(tmp_path / "out.jsonl")
    assert [answer["score"] for answer in answers] == written(folder).tolist()
    assert list(answers[0]) == ["id", "b", "a", "label", "label_name", "score"]


def test_tabs_and_line_breaks_do_not_break_a_tsv(runs: Run, tmp_path: Path) -> None:
    rows = [{"question1": "a\tb", "question2": 'c\nd\r\ne "f"'}, {"question1": "=1+1", "question2": "é 東"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask(run=runs("model=tiny_bert"), input=tmp_path / "in.jsonl", output=tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert len(lines) == 3
    assert all(line.count("\t") == 4 for line in lines)
    ask(run=runs("model=tiny_bert"), input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")
    kept = [{key: row[key] for key in ("question1", "question2")} for row in got(tmp_path / "out.jsonl")]
    assert kept == rows


@pytest.mark.parametrize("output", ["labelled.xlsx", "labelled", "tsv"])
def test_an_output_of_unknown_kind_is_refused_first(in_tmp: Path, output: str) -> None:
    with refuses(Code.UNKNOWN_CHOICE, key="output") as caught:
        ask(run="nowhere", input="nothing.tsv", output=output)
    assert caught.value.value == output
    assert all(choice in str(caught.value) for choice in (".tsv", ".csv", ".jsonl", ".parquet"))


def test_an_output_that_cannot_be_written_is_refused(runs: Run, tmp_path: Path) -> None:
    source = put(tmp_path / "new.tsv", ROWS[:2])
    output = str(tmp_path / "absent" / "out.tsv")
    with refuses(Code.UNWRITABLE, key="output") as caught:
        ask(run=runs("model=tiny_bert"), input=source, output=output)
    assert caught.value.value == output


def test_an_input_without_the_columns_is_refused(runs: Run, tmp_path: Path) -> None:
    source = put(tmp_path / "new.tsv", [{"q1": "a", "question2": "b"}])
    with refuses(Code.INVALID_DATA) as caught:
        ask(run=runs("model=tiny_bert"), input=source, output=tmp_path / "out.tsv")
    assert caught.value.file == str(source)
    assert "question1" in caught.value.reason
    assert not (tmp_path / "out.tsv").exists()


def test_as_many_columns_as_the_run_was_trained_on(runs: Run, tmp_path: Path) -> None:
    source = put(tmp_path / "new.tsv", ROWS[:2])
    with refuses(Code.MISMATCH, key="text_columns") as caught:
        ask(run=runs("model=tiny_bert"), input=source, output=tmp_path / "out.tsv", text_columns="[question1]")
    assert caught.value.value == ["question1"]


GOLD = [{"id": str(i), "label": "1", "question1": a, "question2": b} for i, (a, b) in enumerate(PAIRS[:3])]


@pytest.mark.parametrize("kind", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_gold_labels_keep_their_name(runs: Run, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, source = runs("model=tiny_bert"), put(tmp_path / f"gold{kind}", GOLD)
    ask(run=folder, input=source, output=tmp_path / "out.jsonl")
    answers = got(tmp_path / "out.jsonl")
    assert list(answers[0]) == ["id", "label", "question1", "question2", "predicted_label", "label_name", "score"]
    assert [{key: row[key] for key in GOLD[0]} for row in answers] == GOLD
    assert [row["predicted_label"] for row in answers] == (written(folder)[:3] >= 0.5).astype(int).tolist()
    assert "label as predicted_label" in capsys.readouterr().err


def test_a_second_run_labels_the_output_of_the_first(runs: Run, tmp_path: Path) -> None:
    folder = runs("model=tiny_bert")
    ask(run=folder, input=put(tmp_path / "in.tsv", ROWS[:3]), output=tmp_path / "a.csv")
    ask(run=folder, input=tmp_path / "a.csv", output=tmp_path / "b.csv")
    ask(run=folder, input=tmp_path / "b.csv", output=tmp_path / "c.jsonl")
    answer = got(tmp_path / "c.jsonl")[0]
    names = [
        f"{prefix}{name}{number}"
        for prefix, number in (("", ""), ("predicted_", ""), ("predicted_", "_2"))
        for name in ("label", "label_name", "score")
    ]
    assert list(answer) == ["question1", "question2", *names]
    assert answer["score"] == answer["predicted_score"] == repr(answer["predicted_score_2"])


def test_columns_of_single_texts_are_kept(single: Path, tmp_path: Path) -> None:
    source = put(tmp_path / "in.tsv", [{"sentence": "good film", "note": "a", "score": "5"}])
    ask(run=single, input=source, output=tmp_path / "out.jsonl")
    (answer,) = got(tmp_path / "out.jsonl")
    assert list(answer) == ["sentence", "note", "score", "label", "predicted_score"]
    assert (answer["sentence"], answer["note"], answer["score"]) == ("good film", "a", "5")


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("the model is loaded")


@pytest.mark.parametrize("output", ["in.tsv", "./in.tsv", "link.tsv", "hard.tsv", "../here/in.tsv"])
def test_the_input_is_never_the_output(runs: Run, in_tmp: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_bench.predict.FinishedRun, "load", no_model)
    Path("here").mkdir()
    monkeypatch.chdir(in_tmp / "here")
    content = put(Path("in.tsv"), ROWS[:2]).read_bytes()
    Path("link.tsv").symlink_to("in.tsv")
    Path("hard.tsv").hardlink_to("in.tsv")
    with refuses(Code.EXISTS, key="output") as caught:
        ask(run=runs("model=tiny_bert"), input="in.tsv", output=output)
    assert caught.value.value == output
    assert Path("in.tsv").read_bytes() == content


def test_wrong_requests_are_refused_before_the_model_is_loaded(
    runs: Run, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_bench.predict.FinishedRun, "load", no_model)
    put(Path("in.tsv"), ROWS[:2])
    Path("folder.tsv").mkdir()
    wrong: list[tuple[dict[str, Any], Code, str | None, object]] = [
        ({"output": "absent/out.tsv"}, Code.UNWRITABLE, "output", "absent/out.tsv"),
        ({"output": "folder.tsv"}, Code.UNWRITABLE, "output", "folder.tsv"),
        ({"output": "in.tsv/out.tsv"}, Code.UNWRITABLE, "output", "in.tsv/out.tsv"),
        ({"input": "absent.tsv"}, Code.NOT_FOUND, None, "absent.tsv"),
        ({"input": "/dev/zero"}, Code.NOT_A_FILE, None, "/dev/zero"),
        ({"text_columns": "question1"}, Code.MISMATCH, "text_columns", ["question1"]),
        ({"text_columns": "[question1,absent]"}, Code.INVALID_DATA, None, "in.tsv"),
        ({"device": "gpu"}, Code.UNKNOWN_CHOICE, "device", "gpu"),
        ({"run": "5"}, Code.NOT_FOUND, "run", "5"),
    ]
    for keys, code, key, value_or_file in wrong:
        with refuses(code, key=key) as caught:
            ask(**{"run": runs("model=tiny_bert"), "input": "in.tsv", "output": "out.tsv"} | keys)
        assert value_or_file == (caught.value.value if key else caught.value.file)
    assert not Path("out.tsv").exists()


def test_streams_in_and_out(runs: Run, in_tmp: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    put(Path("in.tsv"), ROWS[:2])
    ask(run=runs("model=tiny_bert"), input="in.tsv", output="/dev/stdout")
    assert capfdbinary.readouterr().out.startswith(b"question1\tquestion2\tlabel\tlabel_name\tscore\n")
    ask(run=runs("model=tiny_bert"), input="in.tsv", output=os.devnull)
    assert Path(os.devnull).is_char_device()


def test_a_rank_that_no_tensor_has_room_for_is_refused(runs: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs("model=tiny_bert"), tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    record["targets"][next(iter(record["targets"]))] = 10**6
    (folder / "run.json").write_text(json.dumps(record))
    with refuses(Code.DAMAGED) as caught:
        lora_bench.load(folder)
    assert caught.value.file == folder / "adapter/adapter_model.safetensors"
    assert str(10**6) in str(caught.value)


# -- three classes, and numbers --


@pytest.fixture(scope="module")
def of_number_members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_classes.run_of(tmp_path_factory.mktemp("members"), "ensemble.members=2", numbers=True)


def probabilities_of(folder: Path) -> NDArray[np.float64]:
    table = pq.read_table(folder / "predictions" / "validation.parquet")
    return np.array(table.column("probabilities").to_pylist())


def sentences(path: Path, rows: list[str]) -> Path:
    return put(path, [{"text": text} for text in rows])


def test_three_classes_have_names_and_probabilities(of_classes: Path, tmp_path: Path) -> None:
    expected, names = probabilities_of(of_classes), three_classes.NAMES
    run = lora_bench.load(of_classes)
    assert run.label_names == names
    texts = three_classes.texts(12, 100)
    assert np.array_equal(run.predict(texts), expected)
    assert run.predict([]).shape == (0, 3)
    source, temperature = sentences(tmp_path / "in.tsv", texts), json.loads((of_classes / "run.json").read_text())
    temperature = temperature["selection"]["temperature"]
    ask(run=of_classes, input=source, output=tmp_path / "plain.parquet")
    rows = got(tmp_path / "plain.parquet")
    assert list(rows[0]) == ["text", "label", "label_name", "score"]
    assert [row["label"] for row in rows] == expected.argmax(1).tolist()
    assert [row["label_name"] for row in rows] == [names[row["label"]] for row in rows]
    assert [row["score"] for row in rows] == expected.max(1).tolist()
    more = {"probabilities": "true", "uncertainty": "true", "calibrated": "true"}
    ask(run=of_classes, input=source, output=tmp_path / "more.parquet", **more)
    rows = got(tmp_path / "more.parquet")
    columns = ["p_bird", "p_big_cat", "p_fish"]
    assert list(rows[0]) == ["text", "label", "label_name", "score", *columns, "calibrated"]
    scaled = np.array([[row[column] for column in columns] for row in rows])
    np.testing.assert_allclose(scaled, apply_temperature(expected, temperature))
    np.testing.assert_allclose(scaled.sum(1), 1)
    assert [row["score"] for row in rows] == [row["calibrated"] for row in rows] == scaled.max(1).tolist()


@pytest.mark.parametrize("choice", ["selection", "0.5"])
def test_three_classes_have_no_threshold(of_classes: Path, tmp_path: Path, choice: str) -> None:
    with refuses(Code.UNSUPPORTED, key="threshold"):
        ask(run=of_classes, input=sentences(tmp_path / "in.tsv", ["a"]), output=tmp_path / "o.tsv", threshold=choice)


def test_a_regression_predicts_numbers(of_numbers: Path, of_number_members: Path, tmp_path: Path) -> None:
    texts = three_classes.texts(12, 100)
    for folder, more in ((of_numbers, {}), (of_number_members, {"uncertainty": "true"})):
        run = lora_bench.load(folder)
        assert run.label_names is None
        assert np.array_equal(run.predict(texts), written(folder))
        assert run.predict([]).shape == (0,)
        ask(run=folder, input=sentences(tmp_path / "in.tsv", texts), output=tmp_path / "out.parquet", **more)
        rows = got(tmp_path / "out.parquet")
        assert list(rows[0]) == ["text", "prediction", *(["spread"] if more else [])]
        assert [row["prediction"] for row in rows] == written(folder).tolist()
    choices = {"threshold": "0", "calibrated": "true", "probabilities": "true", "uncertainty": "true"}
    for key, value in choices.items():
        with refuses(Code.UNSUPPORTED, key=key):
            ask(run=of_numbers, input=tmp_path / "in.tsv", output=tmp_path / "o.tsv", **{key: value})


def test_two_classes_in_words_have_names(tmp_path: Path, runs: Run) -> None:
    folder = Path(shutil.copytree(runs("model=tiny_bert"), tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    record["data"]["label_names"] = ["no\tor", "no or"]
    (folder / "run.json").write_text(json.dumps(record))
    source = put(tmp_path / "in.tsv", ROWS[:3])
    ask(run=folder, input=source, output=tmp_path / "out.jsonl", probabilities="true")
    rows = got(tmp_path / "out.jsonl")
    assert list(rows[0]) == ["question1", "question2", "label", "label_name", "score", "p_no_or", "p_no_or_2"]
    assert [row["label_name"] for row in rows] == [record["data"]["label_names"][row["label"]] for row in rows]
    assert [row["p_no_or"] for row in rows] == [1 - row["score"] for row in rows]
    ask(run=folder, input=source, output=tmp_path / "out.tsv")
    assert all(line.count("\t") == 4 for line in (tmp_path / "out.tsv").read_text().splitlines())
    for wrong in ("yes", ["no"], ["no", "no"], ["no", ""], ["no", 1]):
        record["data"]["label_names"] = wrong
        (folder / "run.json").write_text(json.dumps(record))
        with refuses(Code.DAMAGED) as caught:
            lora_bench.load(folder)
        assert caught.value.file == folder / "run.json"
