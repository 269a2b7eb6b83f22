"""The scripts beside the package: every one explains itself; those that make tables and backbones run in small."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import sys
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaModel

from lora_bench.analysis.summary import summarise
from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.families import build_model
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.data.toy import generate
from lora_bench.records.metrics_log import selection_curve
from tests.command_line import unchanged_process
from tests.helpers import composed

ROOT = Path(__file__).parent.parent
FOLDERS = ("scripts", "benchmarks", "experiments")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("[!_]*") if path.is_file())
MODULES = {
    "composition.py",
    "distillation.py",
    "key_index.py",
    "kept_sweep.py",
    "machine.py",
    "peft_trainer.py",
    "result_tables.py",
}
"""What scripts of the same folder import."""
PYTHON_SCRIPTS = [path for path in SCRIPTS if path.suffix == ".py" and path.name not in MODULES]
TEXTS = ["a", "b c", "is this a question?", "how long is a day on mars?", "what is the best way to learn", "why not"]


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """Run a script, named from the root, in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / name).parent))
    try:
        with unchanged_process(), patch.dict(os.environ):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_script_is_python_with_a_suffix_or_shell_without() -> None:
    for path in SCRIPTS:
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        if path.suffix == ".py":
            assert (first_line == "#!/usr/bin/env python3") == (path.name not in MODULES), path
        else:
            assert (path.suffix, first_line) == ("", "#!/usr/bin/env bash"), path
        assert os.access(path, os.X_OK) == first_line.startswith("#!"), path
    assert len(PYTHON_SCRIPTS) >= 14


@pytest.mark.parametrize("path", PYTHON_SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_shows_how_a_script_is_called(
    path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert script(monkeypatch, name, "--help") == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage: ")
    assert f"    {name} " in help_text or f"    {name}\n" in help_text or f" {name} " in help_text
    assert list(in_tmp.iterdir()) == []


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    """A random teacher, tokenizers of letters, and texts."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizers.tokenizer("bert")),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
    )
    BertModel(config).save_pretrained("teacher")
    tiny_tokenizers.tokenizer("bert").save_pretrained("teacher")
    tiny_tokenizers.tokenizer("roberta").save_pretrained("roberta")
    letters = tiny_tokenizers.tokenizer("t5")
    letters.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(4)]})
    letters.save_pretrained("t5")
    rows = [f"{text}\t{other}\t1\n" for text in TEXTS for other in TEXTS]
    Path("train.tsv").write_text("question1\tquestion2\tlabel\n" + "".join(rows), encoding="utf-8")
    Path("more.txt").write_text("who goes there?\n\nwhy not\n", encoding="utf-8")
    return [
        "backbones",
        "train.tsv",
        "more.txt",
        "--teacher=teacher",
        "--roberta-tokenizer=roberta",
        "--t5-tokenizer=t5",
    ]


def test_the_speed_benchmark_trains_and_scores(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own side; the one of PEFT and the Trainer needs real weights."""
    rows = [f"{text}\t{other}\t{int(text == other)}\n" for text in TEXTS for other in TEXTS]
    for split in ("train", "validation"):
        Path(f"{split}.tsv").write_text("question1\tquestion2\tlabel\n" + "".join(rows), encoding="utf-8")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    modules = [importlib.import_module(name) for name in ("peft_trainer", "speed", "machine", "composition")]
    reference, speed = modules[:2]
    overrides = ["model=tiny_bert", "data=pairs", "data.path=.", "data.selection_size=4", "trainer.batch_size=4"]
    monkeypatch.setattr(reference, "shared_overrides", lambda data, pairs: overrides)
    try:
        trained = speed.run_lora_bench(reference.Workload(), "", 0)
        assert trained["pairs_per_second"] > 0 < trained["gemm_share"]
        assert speed.run_lora_bench(reference.Workload(evaluation_only=True), "", 0)["pairs_per_second"] > 0
    finally:
        for module in modules:
            del sys.modules[module.__name__]


def test_backbones_are_made_from_a_teacher(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert script(monkeypatch, "experiments/mini_backbones.py", *arguments, "--steps=30", "--batch=4") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cosine with the teacher" in line]
    for line in lines:
        after, before = (float(part.split()[0]) for part in line.partition("texts: ")[2].split(", "))
        assert after > before
    assert len(lines) == 2
    monkeypatch.setenv("LORA_BENCH_BACKBONES", "backbones")
    for name, layers in (("roberta_mini", 2), ("t5_mini", 4)):
        model = build_model(composed(f"model={name}", "data=toy").model)
        backbone = load(model, load_tokenizer(model), task="qqp")
        assert len(backbone.layers) >= layers


KEPT = ("methods/*/run", "target/tiny_bert/*/*/run", "methods/*/evaluations/perturbed")


@pytest.mark.slow
def test_the_enhanced_methods_protocol_in_small(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out are `backbones` and `ablation`, which are sweeps as `methods` is, and `large`, as `target` is."""
    name, toy, records = "experiments/reproduce_enhanced.py", "--toy", "--records=records"
    message = str(script(monkeypatch, name, toy, "out", "large"))
    assert "stage methods" in message
    assert "experiment=enhanced" in message
    assert script(monkeypatch, name, toy, "out", "methods", "robust", "ranks", records) == 0
    assert script(monkeypatch, name, toy, "later", "target", records) == 0  # the learning rates are in the records
    folders = ("out/methods", "later/target/tiny_bert/lora", "out/ranks")
    assert [folder for folder in folders if not Path(folder, "table.md").exists()] == []

    def written() -> dict[Path, int]:
        """Return when each run's record was written."""
        return {path: path.stat().st_mtime_ns for out in ("out", "later") for path in Path(out).rglob("run.json")}

    before = written()
    assert {run["status"] for run in map(_read, before)} == {"done"}

    rates = [
        {json.dumps(run["choices"]): run["config"]["optimizer"]["lr"] for run in map(_read, Path().glob(pattern))}
        for pattern in ("out/methods/report/*/run.json", "later/target/*/*/*/run.json")
    ]
    assert [len(rate_of) for rate_of in rates] == [4, 4]
    assert len(list(Path("later/target").glob("*/*/*/run.json"))) == 5
    assert rates[1].items() <= rates[0].items()
    assert len(list(Path("out/methods/report").glob("*/evaluations/perturbed.json"))) == 3
    assert len(Path("out/ranks/one_rate.md").read_text().splitlines()) == 2 + 2 + 2
    kept = {pattern: len(list(Path("records").glob(f"{pattern}.json"))) for pattern in KEPT}
    assert kept == {"methods/*/run": 4, "target/tiny_bert/*/*/run": 5, "methods/*/evaluations/perturbed": 3}

    capsys.readouterr()
    options = ("data.selection_size=16", "--records=records/target", "--rounds=1")
    assert script(monkeypatch, "experiments/target_time.py", *options) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "tiny_bert |" in line]
    assert [row[1].split(",")[0] for row in rows] == ["full", "LoRA", "full", "enhanced", "enhanced"]
    assert all(float(row[3]) >= 0 for row in rows)

    assert script(monkeypatch, name, toy, "out", "robust") == 0
    assert script(monkeypatch, name, toy, "later", "target", records) == 0
    assert before == written()


def write_pairs(folder: Path, columns: str = "question1\tquestion2\tlabel") -> None:
    folder.mkdir(parents=True)
    for split, rows in (("train", 64), ("validation", 16)):
        made = generate(rows, 0, split)
        texts = made.texts[: columns.count("\t")]
        lines = [columns, *("\t".join(map(str, row)) for row in zip(*texts, made.labels, strict=True))]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def test_the_methods_of_peft_are_compared_and_kept_once(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, chosen = "experiments/peft_methods.py", ("ours", "vectors")
    write_pairs(Path("data"))
    toy = ["data.selection_size=16", "data.train_size=40", "hydra.sweeper.tune.data.train_size=16", "model=tiny_bert"]
    toy += ["trainer.max_steps=2", "optimizer.lr=1e-3,1e-2"]
    arguments = ["data", "out", *chosen, *toy, "--records=records", "--methods", "lora", "peft_ia3"]
    assert script(monkeypatch, name, *arguments) == 0
    records = sorted(Path("records").rglob("run.json"))
    assert [path.parts[1] for path in records] == ["lora"] * 3 + ["peft_ia3"] * 3
    assert {_read(path)["config"]["adapter"].get("peft_type") for path in records} == {None, "IA3"}
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("run.json")}
    capsys.readouterr()
    assert script(monkeypatch, name, *arguments, "--table") == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("run.json")}
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0][5:] == ["against lora", "p", "verdict"]
    verdicts = {row[0]: row[-1] for row in rows[2:]}
    assert verdicts["`lora`"] == "baseline"
    assert verdicts.keys() == {"`lora`", "`peft_ia3`"}


def test_methods_are_compared_on_a_task_once(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, methods = "experiments/tuned_suite.py", ["adapter=lora", "adapter=bitfit"]
    write_pairs(Path("data/cola"), "sentence\tlabel")
    toy = ["data.selection_size=16", "data.train_size=40", "hydra.sweeper.tune.data.train_size=16", "model=tiny_bert"]
    toy += ["trainer.max_steps=2", "trainer.precision=fp32", "optimizer.lr=1e-3,1e-2", "pack.size=16"]
    arguments = ["data", "out", "cola", *toy, "data.label_names=null", "--records=records", "--methods", *methods]
    assert script(monkeypatch, name, *arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("run.json")}
    assert len([path for path in before if path.parts[0] == "records"]) == 2 * 3
    capsys.readouterr()
    assert script(monkeypatch, name, *arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("run.json")}
    means, over_tasks, by_task = (
        [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in part.splitlines() if line[:2] == "| "]
        for part in capsys.readouterr().out.strip().split("\n\n")[-3:]
    )
    assert means[0] == ["task", *methods]
    first, other = (float(cell.split(" ± ")[0]) for cell in means[2][1:])
    assert over_tasks[2][0] == "adapter=bitfit"
    assert float(over_tasks[2][1]) == pytest.approx(first - other, abs=0.11)
    assert [row[:2] for row in by_task[2:]] == [["cola", method] for method in methods]
    assert by_task[3][4] == "not tested"  # two steps teach nothing


def test_the_readmes_table_has_recorded_values_within_intervals_of_the_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval of one run is as wide as the normal approximation says; the prompted model has one run."""
    assert script(monkeypatch, "experiments/paper_table.py") == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {
        tuple(line[:2]): [[float(x) for x in re.findall(r"-?[0-9.]+", cell)] for cell in line[2:5]] for line in lines
    }
    assert len(rows) == len(lines) >= 3
    recorded = [_read(path) for path in (ROOT / "experiments/records/decoders/text_to_text/lora").rglob("run.json")]
    for name, (value, low, high) in zip(("accuracy", "f1", "mcc"), rows["Gemma 3 270M", "LoRA"], strict=True):
        assert value == pytest.approx(fmean(run["metrics"][f"validation/{name}"] for run in recorded), abs=6e-4)
        assert low < value < high
    accuracy, low, high = rows["Gemma 3 270M", "prompt with 4 examples"][0]
    assert (high - low) / 2 == pytest.approx(1.96 * (accuracy * (1 - accuracy) / 300) ** 0.5, abs=0.004)


def test_the_table_of_the_target_has_the_costs_that_compare_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, "experiments/target_table.py") == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {(line[0].split(",")[0], line[1]): line[2:4] for line in lines}
    titles = {"full": "full", "enhanced": "enhanced", "recipe-full": "full, with the recipe"}
    records = ROOT / "experiments/records/enhanced/target"
    found = [folder for folder in records.glob("*/*") if folder.name in titles]
    assert len(found) >= 2
    for folder in found:
        curves = [selection_curve(path, "mcc") for path in (folder.parent / "full").glob("*/metrics.jsonl")]
        (row,) = summarise([folder], target=min(curve[-1][1] for curve in curves)).rows
        steps, teraflops = rows[folder.parent.name, titles[folder.name]]
        assert fmean(map(float, steps.split(", "))) == pytest.approx(row.stats["steps_to_target"].mean)
        assert float(teraflops) == pytest.approx(row.stats["flops_to_target"].mean / 1e12, abs=0.051)


def test_the_tables_of_the_backbones_have_every_method_and_rival(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, "experiments/backbone_table.py") == 0
    scores, tests, thresholds = (
        [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in part.splitlines()[2:]]
        for part in capsys.readouterr().out.split("\n\n")
    )
    kept = [path.name for path in (ROOT / "experiments/records/enhanced/backbones").iterdir()]
    assert (len(scores), len(tests), len(thresholds)) == (5 * len(kept), 4 * len(kept), 5 * len(kept))
    mcc = {(row[0], row[1]): float(row[5].split()[0]) for row in scores}
    for backbone, rival, difference, *_ in tests:
        assert float(difference.split()[0]) == pytest.approx(mcc[backbone, rival] - mcc[backbone, "enhanced"], abs=6e-4)
    mcc = {(row[0], row[1]): float(row[3].split()[0]) for row in thresholds}
    for backbone, rival, *_, difference, _ in (row for row in thresholds if row[1] != "enhanced"):
        assert float(difference.split()[0]) == pytest.approx(mcc[backbone, rival] - mcc[backbone, "enhanced"], abs=6e-4)


def test_a_search_is_compared_with_a_grid_once(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "experiments/search_against_grid.py"
    assert script(monkeypatch, name, "--toy", "out") == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].startswith("| 0 | rank ")
    assert "| 2 trials, " in table[0]
    assert len(list(Path("out/0").rglob("run.json"))) == 2 + 1 + 2 + 1
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("run.json")}
    assert script(monkeypatch, name, "--toy", "out") == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").rglob("run.json")}
    assert capsys.readouterr().out.splitlines()[-3:] == table


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_a_roberta_begins_as_its_teacher(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both read a text as the same tokens, they give the same vectors; half precision apart."""
    assert script(monkeypatch, "experiments/mini_backbones.py", *arguments, "--steps=0", "--only=roberta_mini") == 0
    teacher = BertModel.from_pretrained("teacher").eval()
    roberta = RobertaModel.from_pretrained(
        "backbones/roberta_mini", dtype=torch.float32, add_pooling_layer=False
    ).eval()
    for text in ("a", "7", "?"):
        theirs = AutoTokenizer.from_pretrained("teacher")(text, return_tensors="pt")
        tokens = AutoTokenizer.from_pretrained("backbones/roberta_mini")(text, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(
                roberta(**tokens).last_hidden_state, teacher(**theirs).last_hidden_state, rtol=0, atol=5e-3
            )
    assert not Path("backbones/t5_mini").exists()


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_masked_text_and_target_make_the_whole(length: int) -> None:
    mask_spans = runpy.run_path(str(ROOT / "experiments" / "distillation.py"))["mask_spans"]
    draw = torch.Generator().manual_seed(length)
    ids, marks = list(range(length)), [1000, 1001, 1002]
    masked, target = mask_spans(ids, marks, draw)
    spans: dict[int, list[int]] = {}
    for token in target:
        spans.setdefault(token, []) if token >= 1000 else spans[list(spans)[-1]].append(token)
    whole = [token for item in masked for token in (spans[item] if item >= 1000 else [item])]
    assert whole == ids
    assert 1 <= len(target) - len(spans) <= max(3, 0.3 * length)
