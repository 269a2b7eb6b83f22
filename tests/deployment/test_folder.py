"""An export for deployment gives the scores of `predict` without lora-bench, and refuses what it cannot export."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from rich.console import Console

from lora_bench.data.toy import generate
from lora_bench.deployment import folder as deployment
from lora_bench.deployment import score
from lora_bench.errors import Code
from lora_bench.records.job import Job
from lora_bench.run import preflight
from lora_bench.run.finished_run import FinishedRun
from lora_bench.train import train
from tests import three_classes
from tests.backbones.test_decoders import config_of
from tests.backbones.tools import END, byte_tokenizer, enliven, save, tiny_distilbert
from tests.command_line import lora_bench, refused
from tests.helpers import SMALL_TOY, composed

PAIRS = list(zip(*generate(14, 0, "validation").texts, strict=True))
ONE_LAYER = "model.random.num_hidden_layers=1"
LONG_PAIR = ("a " * 90, "b")
TEXTS = [(text,) for text in three_classes.texts(14, 100)]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")


def toy_run(folder: Path, *overrides: str) -> Path:
    """Train a tiny run on pairs of the toy data and return its folder."""
    request = composed(*SMALL_TOY, "trainer.device=cpu", "data.max_length=16", "trainer.max_steps=3", *overrides)
    choices = dict.fromkeys(("model", "adapter", "data"), "chosen")
    train(Job(request, folder / "run", choices, []), console=Console(quiet=True))
    return folder / "run"


def load_script(folder: Path) -> Any:
    """Import the exported score.py under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"score_of_{folder.name}", folder / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Exported:
    """A run, its export, and the scores of `predict` for some rows."""

    folder: Path
    output: str
    rows: list[tuple[str, ...]]
    expected: Any


def export(run: Path, export_format: str, rows: list[tuple[str, ...]], *overrides: str) -> Exported:
    """Export a run into the folder beside it that has the name of the format."""
    folder = run.with_name(export_format)
    answer = lora_bench("export", f"run={run}", f"format={export_format}", f"output={folder}", *overrides)
    assert (answer.code, answer.err) == (0, "")
    return Exported(folder, answer.out, rows, FinishedRun.load(run, device="cpu").predict(rows))


def check_scores(exported: Exported) -> Any:
    """Assert that the script's scores are those of `predict`, at several lengths and batch sizes; return its labels."""
    assert np.ptp(exported.expected) > 1e-3
    script = (exported.folder / "score.py").read_text(encoding="utf-8")
    assert "import lora_bench" not in script
    assert "from lora_bench" not in script
    model = load_script(exported.folder).Model()
    for batch_size in (1, 5, 32):
        predictions = model.predict(exported.rows, batch_size)
        np.testing.assert_allclose(predictions["scores"], exported.expected, atol=1e-4)
    for path in exported.folder.iterdir():
        assert str(Path(deployment.__file__).parents[2]).encode() not in path.read_bytes()
    return predictions.get("labels")


@needs_onnx
def test_the_enhanced_method_as_an_onnx_graph(tmp_path: Path) -> None:
    """Pair features, both orders, truncation of one text, and the selection split's threshold are in the folder."""
    settings = ["model=tiny_bert", ONE_LAYER, "data.truncation=first", "data.max_length=80"]
    run = toy_run(tmp_path, "experiment=enhanced", *settings)
    assert FinishedRun.load(run).pack.pair_features
    exported = export(run, "onnx", [*PAIRS, LONG_PAIR, LONG_PAIR[::-1], ("a [SEP] b", "")], "threshold=selection")
    labels = check_scores(exported)
    threshold = json.loads((run / "run.json").read_text())["selection"]["threshold"]
    assert labels.tolist() == (exported.expected >= threshold).astype(int).tolist()
    settings = json.loads((exported.folder / "scoring.json").read_text())
    assert (settings["label_names"], settings["threshold"]) == (["not_duplicate", "duplicate"], threshold)
    import onnx

    graph = onnx.load(exported.folder / "graph.onnx").graph
    axes = {tuple(axis.dim_param for axis in value.type.tensor_type.shape.dim) for value in graph.input}
    assert axes == {("batch", "length")}
    assert not [tensor.name for tensor in graph.initializer if "lora" in tensor.name]


def test_t5_text_to_text_with_pair_features(tmp_path: Path) -> None:
    """Its template is truncated with the texts."""
    settings = ["data.label_names=[not_duplicate,duplicate]", "data.max_length=40", "head.pair_features=true"]
    settings += ["model.random.num_layers=1", "model.random.num_decoder_layers=1"]
    exported = export(toy_run(tmp_path, "model=tiny_t5", *settings), "torch", [*PAIRS, LONG_PAIR])
    assert check_scores(exported).tolist() == (exported.expected >= 0.5).astype(int).tolist()
    assert "qqp question1: " in json.loads((exported.folder / "scoring.json").read_text())["template"]


def test_a_decoder_in_words_with_pair_features(tmp_path: Path) -> None:
    """Whole words are scored, the rows of a fused linear are adapted, and truncation keeps the template.

    The template has a special token; in the texts it is none.
    """
    tokenizer = byte_tokenizer(eos_token=END)
    config = config_of("gpt2", tokenizer)
    config.n_layer = 1
    save(tmp_path / "model", enliven(transformers.AutoModelForCausalLM.from_config(config)), tokenizer)
    settings = ["model=gpt2", "model.form=text_to_text", f"model.path={tmp_path / 'model'}", "head.pair_features=true"]
    settings.append(f'model.template="{{fields}}{END}answer:"')
    settings += ["adapter.target_modules=qv", "data.truncation=first", "data.max_length=90", "optimizer.lr=0.02"]
    run = toy_run(tmp_path, *settings)
    backbone = FinishedRun.load(run).pack.backbone
    assert not backbone.words[0].is_single_step
    check_scores(export(run, "torch", [*PAIRS, LONG_PAIR, (f"a{END}", END)]))


@pytest.mark.matrix
def test_texts_longer_than_a_decoders_sliding_window(tmp_path: Path) -> None:
    """Whole words are computed one after another, as their tree would need a mask of its own."""
    tokenizer = byte_tokenizer(eos_token=END)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), sliding_window=24, num_key_value_heads=1, eos_token_id=0, bos_token_id=0, **sizes
    )
    save(tmp_path / "model", enliven(transformers.MistralForCausalLM(config)), tokenizer)
    settings = ["model=mistral", "model.form=text_to_text", f"model.path={tmp_path / 'model'}", "data.max_length=90"]
    run = toy_run(tmp_path, *settings, "head.pair_features=false")
    assert not FinishedRun.load(run).pack.backbone.words[0].is_single_step
    check_scores(export(run, "torch", [*PAIRS[:3], LONG_PAIR, ("a", "b")]))


def test_numbers_of_both_orders_of_a_generic_encoder_with_pair_features(tmp_path: Path) -> None:
    """The layer below the cut is computed too."""
    model = tiny_distilbert(tmp_path / "model")
    lines = ["question1\tquestion2\tlabel", *(f"{one}\t{other}\t{len(one) / 50}" for one, other in PAIRS)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    settings = [f"data.path={tmp_path}", "data.text_columns=[question1,question2]", "trainer.score_both_orders=true"]
    settings += ["model=distilbert", f"model.path={model}", "head.pair_features=true", "adapter.layers=top:1"]
    exported = export(three_classes.run_of(tmp_path, *settings, numbers=True), "torch", [*PAIRS, LONG_PAIR])
    assert check_scores(exported) is None
    assert "reversed_text_ids" in json.loads((exported.folder / "scoring.json").read_text())["inputs"]


def test_an_ensemble_of_three_classes_on_quantised_weights(tmp_path: Path) -> None:
    run = three_classes.run_of(tmp_path, "model=tiny_bert", ONE_LAYER, "adapter=qlora", "ensemble.members=2")
    exported = export(run, "torch", TEXTS)
    assert check_scores(exported).tolist() == exported.expected.argmax(1).tolist()
    assert "dequantised" in exported.output
    readme = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "dequantised" in readme
    assert "{0: 'bird', 1: 'big cat', 2: 'fish'}" in readme
    error = refused("export", f"run={run}", "format=torch", "output=x", "threshold=0.4")
    assert (error.code, error.key) == (Code.UNSUPPORTED, "threshold")


# -- what is refused --


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("plain"), "model=tiny_bert", "trainer.max_steps=1")


def test_onnx_without_its_packages(plain_run: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    error = refused("export", f"run={plain_run}", "format=onnx", "output=x")
    assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "format", "onnx")
    assert "pip install 'lora-bench[onnx]'" in str(error)


def test_a_threshold_of_a_plain_model(plain_run: Path, in_tmp: Path) -> None:
    error = refused("export", f"run={plain_run}", "format=merged", "output=x", "threshold=0.4")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "threshold", 0.4)


def test_a_model_that_cannot_be_traced(plain_run: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed. Next steps: …") from ValueError("no kernel for aten::unknown\nmore lines")

    monkeypatch.setattr(deployment, "trace", fail)
    error = refused("export", f"run={plain_run}", "format=torch", "output=x")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "format", "torch")
    assert "BertForSequenceClassification" in str(error)
    assert "format=merged" in str(error)


def test_a_graph_with_other_scores(plain_run: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch gives where a model branches on its input: only the branch of the example is in the graph."""
    monkeypatch.setattr(deployment, "_write_graph", lambda *_: None)
    monkeypatch.setattr(score.Model, "predict", lambda model, rows: {"scores": np.ones(len(rows))})
    error = refused("export", f"run={plain_run}", "format=torch", "output=x")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "format", "torch")
    assert not any(in_tmp.iterdir())
