"""What `export` writes says in peft and in transformers what the run says, for every method; or is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from rich.console import Console

from lora_bench import export
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files, importer
from lora_bench.adapters.peft.config import PeftConfig
from lora_bench.config.groups import choices
from lora_bench.data.toy import generate
from lora_bench.errors import Code
from lora_bench.records.job import Job
from lora_bench.run.finished_run import FinishedRun
from lora_bench.train import train
from tests import three_classes
from tests.adapters.peft_tools import CLASSES, CLOSE, bodies, in_peft, logits_of, on_folder
from tests.adapters.tools import OWN_METHODS, adapter, in_turn, stir, tables, trainer
from tests.backbones.tools import FORMS, held, random_batch, spread
from tests.command_line import files_below, lora_bench, refused, toy_run
from tests.helpers import SMALL_TOY, composed
from tests.training.tools import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# peft asks transformers for a property that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # of every AdaLoRA
]
NOT_IMPORTED = ("hira", "miss")
"""Methods that PEFT has, but whose adapters `eval peft=DIR` does not read."""
NOT_IN_PEFT = ("full", "head_only", "bitfit", "qlora", "loftq")
NOT_ON_T5 = {("t5", "head_only"), ("t5", "bitfit"), ("t5_encoder", "bitfit")}
METHODS = in_turn([(option, form) for option in OWN_METHODS for form in FORMS if (form, option) not in NOT_ON_T5])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bodies(tmp_path_factory.mktemp("bodies"))


def trained(form: str, option: str, folder: Path) -> Pack:
    """A pack of one that has looked at data where its method does, its tensors moved as training moves them."""
    made = Pack(on_folder(form, folder), [Member(adapter(option), 0)])
    prepare(made, trainer(), tables(made.backbone)[0])
    return stir(made, 0.1).eval()


@pytest.mark.parametrize(("option", "form"), METHODS)
@torch.no_grad()
def test_every_method_says_elsewhere_what_it_says_here(
    form: str, option: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = trained(form, option, folders[form])
    backbone, batch = made.backbone, random_batch(made.backbone)
    logits = made(batch)[0]
    assert spread(logits) > 1e-3

    if option not in NOT_IN_PEFT:
        files.save(tmp_path / "adapter", made, 0, str(folders[form]), for_peft=True)
        theirs = logits_of(in_peft(form, folders[form], tmp_path / "adapter"), backbone, batch)
        torch.testing.assert_close(theirs, logits, **CLOSE)
        if option not in NOT_IMPORTED:
            back = importer.attach(PeftConfig.read(tmp_path / "adapter"), on_folder(form, folders[form])).eval()
            torch.testing.assert_close(back(batch)[0], logits, **CLOSE)

    export.write_merged(tmp_path / "merged", made, 0, ["no", "yes"])
    plain = CLASSES[form].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(plain, backbone, batch), logits, **CLOSE)


def test_the_names_of_methods_that_peft_has_not() -> None:
    assert set(NOT_IN_PEFT) <= set(choices("adapter"))


# -- the command --

ROWS = list(zip(*generate(16, 0, "validation").texts, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Callable[..., Path]:
    """Finished runs on a local backbone, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(form: str, *overrides: str) -> Path:
        if (form, *overrides) not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            model = [f"model={form.partition('_')[0]}", f"model.path={folders[form]}", *FORMS[form][1:]]
            asked = composed(*SMALL_TOY, *model, "data.max_length=48", "trainer.max_steps=3", *overrides)
            chosen = dict.fromkeys(("model", "adapter", "data"), "chosen")
            train(Job(asked, folder, chosen, []), console=Console(file=io.StringIO()))
            made[(form, *overrides)] = folder
        return made[(form, *overrides)]

    return run


def probabilities(model: Any, folder: Path, form: str) -> Any:
    """P(label 1) of the toy pairs as a user of transformers computes it, with the tokenizer of the exported folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if form.startswith("t5"):
        texts = [f"qqp question1: {a} question2: {b}" for a, b in ROWS]
        batch = tokenizer(texts, padding=True, return_tensors="pt", truncation=True, max_length=48)
    else:
        first, second = [list(texts) for texts in zip(*ROWS, strict=True)]
        batch = tokenizer(first, second, padding=True, return_tensors="pt", truncation=True, max_length=48)
    with torch.no_grad():
        if form == "t5":
            words = [
                tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("not_duplicate", "duplicate")
            ]
            start = torch.full((len(ROWS), 1), model.config.decoder_start_token_id)
            logits = model(**batch, decoder_input_ids=start).logits[:, 0, words]
        else:
            logits = model(**batch).logits
        if form == "t5_encoder":
            kept = batch["attention_mask"][:, :, None]
            logits = (logits * kept).sum(1) / kept.sum(1)
    return logits.softmax(-1)[:, 1].numpy()


@pytest.mark.parametrize(
    ("form", "overrides"), [*((form, ()) for form in FORMS), ("bert", ("adapter=peft_loha", "optimizer.lr=0.05"))]
)
def test_both_formats_say_what_the_run_says(
    form: str, overrides: tuple[str, ...], runs: Callable[..., Path], folders: dict[str, Path], in_tmp: Path
) -> None:
    run = runs(form, *overrides)
    before = files_below(run)
    expected = FinishedRun.load(run).predict(ROWS)
    assert np.ptp(expected) > 1e-4

    answer = lora_bench("export", f"run={run}", "format=peft", "output=new/adapter")
    assert (answer.code, answer.err) == (0, "")
    assert "\nwritten: new/adapter\nload it: peft.PeftModel.from_pretrained(transformers.AutoModelFor" in answer.out
    assert f'("{folders[form]}"), "new/adapter")\n' in answer.out
    config = json.loads(Path("new/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders[form])
    theirs = in_peft(form, folders[form], Path("new/adapter"))
    np.testing.assert_allclose(probabilities(theirs, Path("new/adapter"), form), expected, atol=1e-5)

    answer = lora_bench("export", f"run={run}", "format=merged", "output=merged")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.endswith('.from_pretrained("merged")\n')
    assert {path.name for path in Path("merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    plain = CLASSES[form].from_pretrained("merged").eval()
    np.testing.assert_allclose(probabilities(plain, Path("merged"), form), expected, atol=1e-5)
    if form != "t5":
        assert plain.config.id2label == {0: "not_duplicate", 1: "duplicate"}
        assert plain.config.label2id == {"not_duplicate": 0, "duplicate": 1}
    assert getattr(plain.config, "problem_type", None) == (None if "t5" in form else "single_label_classification")
    assert files_below(run) == before
    assert sorted(path.name for path in in_tmp.iterdir()) == ["merged", "new"]


def test_a_run_in_bf16_is_merged_in_fp32(runs: Callable[..., Path], folders: dict[str, Path], in_tmp: Path) -> None:
    run = runs("bert", "trainer.precision=bf16")
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    merged, body = held(Path("merged/model.safetensors")), held(folders["bert"] / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    untouched = [name for name in body if "LayerNorm" in name or "embeddings" in name]
    assert len(untouched) > 5
    assert all(torch.equal(merged[f"bert.{name}"], body[name]) for name in untouched)
    in_fp32 = FinishedRun.load(run, dtype=torch.float32).predict(ROWS)
    plain = CLASSES["bert"].from_pretrained("merged").eval()
    np.testing.assert_allclose(probabilities(plain, Path("merged"), "bert"), in_fp32, atol=1e-5)


def test_a_merged_folder_is_a_backbone_like_any_other(runs: Callable[..., Path], in_tmp: Path) -> None:
    run = runs("bert", "adapter=full")
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    again = toy_run("model=bert", "model.path=merged", "hydra.run.dir=again", "adapter=lora", "optimizer.lr=1e-12")
    assert lora_bench("train", *again, "data.max_length=48").code == 0  # B stays at zero, the head as it was
    np.testing.assert_allclose(FinishedRun.load("again").predict(ROWS), FinishedRun.load(run).predict(ROWS), atol=1e-5)


def test_an_adapter_that_only_we_can_read_whole_goes_to_peft_without_the_rest(
    runs: Callable[..., Path], in_tmp: Path
) -> None:
    run = runs("bert", "adapter=lora_xs")
    assert lora_bench("export", f"run={run}", "format=peft", "output=adapter").code == 0
    names = held(Path("adapter/adapter_model.safetensors")).keys()
    assert not any(name.endswith("latent") for name in names)
    assert names < held(run / "adapter" / "adapter_model.safetensors").keys()


def stale_base(folder: Path, base: Path) -> Path:
    """A copy of a model folder whose config.json tells of another task."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    stale = {"architectures": ["BertForMaskedLM"], "finetuning_task": "sst2", "dtype": "float16"}
    stale |= {"problem_type": "multi_label_classification", "id2label": {"0": "negative", "1": "positive"}}
    stale |= {"label2id": {"negative": 0, "positive": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | stale))
    return folder


@pytest.mark.parametrize("form", ["bert", "roberta", "t5_encoder"])
def test_a_model_trained_whole_says_what_it_was_trained_on(
    form: str, runs: Callable[..., Path], folders: dict[str, Path], in_tmp: Path
) -> None:
    """`run/adapter` of full fine-tuning has the labels of the run, as `format=merged` has, and none of the base's."""
    base = stale_base(in_tmp / "base", folders[form])
    run = runs(form, "adapter=full", f"model.path={base}")
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    own, merged = (json.loads((folder / "config.json").read_text()) for folder in (run / "adapter", Path("merged")))
    assert own == merged
    assert own["id2label"] == {"0": "not_duplicate", "1": "duplicate"}
    assert own["label2id"] == {"not_duplicate": 0, "duplicate": 1}
    assert own["dtype"] == "float32"
    assert "finetuning_task" not in own
    assert own.get("problem_type") == (None if form == "t5_encoder" else "single_label_classification")
    plain = CLASSES[form].from_pretrained(run / "adapter").eval()
    assert own["architectures"] == [type(plain).__name__]
    expected = FinishedRun.load(run).predict(ROWS)
    np.testing.assert_allclose(probabilities(plain, run / "adapter", form), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_an_export_says_what_predict_does_besides(kind: str, runs: Callable[..., Path], in_tmp: Path) -> None:
    both = runs("bert", "trainer.score_both_orders=true")
    answer = lora_bench("export", f"run={both}", f"format={kind}", "output=both")
    assert answer.code == 0
    for text in (answer.out, Path("both/README.md").read_text(encoding="utf-8")):
        assert "trainer.score_both_orders" in text
        assert "(b, a)" in text
    assert "48 tokens" in Path("both/README.md").read_text(encoding="utf-8")
    answer = lora_bench("export", f"run={runs('bert')}", f"format={kind}", "output=one")
    assert "score_both_orders" not in answer.out + Path("one/README.md").read_text(encoding="utf-8")


# -- what is refused --


@pytest.mark.parametrize("option", NOT_IN_PEFT)
def test_what_peft_cannot_express_is_refused(option: str, runs: Callable[..., Path], in_tmp: Path) -> None:
    error = refused("export", f"run={runs('bert', f'adapter={option}')}", "format=peft", "output=adapter")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "format", "peft")
    assert "adapter=chosen" in str(error)
    assert "format=merged" in str(error)


def test_an_output_that_is_there_is_refused(runs: Callable[..., Path], in_tmp: Path) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere")
    for output in ("full", "file", "link", str(runs("bert"))):
        error = refused("export", f"run={runs('bert')}", "format=peft", f"output={output}")
        assert (error.code, error.key, str(error.value)) == (Code.EXISTS, "output", output)
    Path("empty").mkdir()
    assert lora_bench("export", f"run={runs('bert')}", "format=peft", "output=empty").code == 0
    assert Path("empty/adapter_config.json").is_file()


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_output_that_cannot_be_written_is_refused(
    form: str, runs: Callable[..., Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("mine")
    error = refused("export", f"run={runs('bert')}", f"format={form}", "output=file/adapter")
    assert (error.code, error.key, str(error.value)) == (Code.UNWRITABLE, "output", "file/adapter")

    def full_disc(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disc)
    error = refused("export", f"run={runs('bert')}", f"format={form}", "output=adapter")
    assert (error.code, error.key, str(error.value)) == (Code.UNWRITABLE, "output", "adapter")
    assert "No space left on device" in str(error)


def test_nothing_is_left_of_an_export_that_was_stopped(
    runs: Callable[..., Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(folder: Path, *_: object) -> None:
        (folder / "half.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_merged", stopped)
    assert lora_bench("export", f"run={runs('bert')}", "format=merged", "output=merged").code == 130
    assert not any(in_tmp.iterdir())


def test_what_is_missing_or_wrong_is_refused_by_its_key(runs: Callable[..., Path], in_tmp: Path) -> None:
    request = {"run": "x", "format": "peft", "output": "x"}
    for missing in request:
        error = refused("export", *(f"{key}={value}" for key, value in request.items() if key != missing))
        assert (error.code, error.key) == (Code.MISSING, missing)
    error = refused("export", "run=x", "format=gguf", "output=x")
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "format", "gguf")
    assert "peft, merged, onnx, torch" in str(error)
    error = refused("export", "run=nowhere", "format=peft", "output=x")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "run", "nowhere")


def test_an_unfinished_run_is_refused(runs: Callable[..., Path], in_tmp: Path) -> None:
    record = json.loads((runs("bert") / "run.json").read_text())
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({**record, "status": "diverged"}))
    error = refused("export", "run=run", "format=peft", "output=x")
    assert (error.code, error.key, error.value) == (Code.UNFINISHED, "run", Path("run"))
    assert "diverged" in str(error)


# -- three classes, and numbers --


@pytest.fixture(scope="module")
def of_task(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Callable[..., Path]:
    """Finished runs of three classes or of numbers on a local backbone, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(form: str, *overrides: str, numbers: bool = False) -> Path:
        key = (form, numbers, *overrides)
        if key not in made:
            model = [f"model={form.partition('_')[0]}", f"model.path={folders[form]}", *FORMS[form][1:]]
            folder = tmp_path_factory.mktemp("tasks")
            made[key] = three_classes.run_of(folder, *model, *overrides, numbers=numbers)
        return made[key]

    return run


TEXTS = three_classes.texts(9, 100)


def by_class(pipeline: Any) -> NDArray[np.float64]:
    """Return the probabilities of `TEXTS` by a pipeline, (N, C), in the order of the classes."""
    answers = pipeline([{"text": text} for text in TEXTS], top_k=None, truncation=True, max_length=24)
    scores = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    return np.array([[of_text[name] for name in three_classes.NAMES] for of_text in scores])


@pytest.mark.parametrize("adapter_choice", ["lora", "full"])
def test_a_pipeline_gives_the_classes_their_names(
    adapter_choice: str, of_task: Callable[..., Path], folders: dict[str, Path], in_tmp: Path
) -> None:
    run = of_task("bert", f"adapter={adapter_choice}")
    expected = FinishedRun.load(run).predict(TEXTS)
    assert expected.shape == (9, 3)
    assert np.ptp(expected) > 1e-3
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    merged = transformers.pipeline("text-classification", "merged", device="cpu")
    np.testing.assert_allclose(by_class(merged), expected, atol=1e-5)
    readme = Path("merged/README.md").read_text(encoding="utf-8")
    assert "{0: 'bird', 1: 'big cat', 2: 'fish'}" in readme
    assert "top_k=None" in readme
    if adapter_choice == "full":
        whole = transformers.pipeline("text-classification", str(run / "adapter"), device="cpu")
        np.testing.assert_allclose(by_class(whole), expected, atol=1e-5)
        return
    answer = lora_bench("export", f"run={run}", "format=peft", "output=adapter")
    assert f'("{folders["bert"]}", num_labels=3), "adapter")\n' in answer.out
    assert "num_labels=3" in Path("adapter/README.md").read_text(encoding="utf-8")
    labels = {"id2label": dict(enumerate(three_classes.NAMES)), "num_labels": 3}
    base = CLASSES["bert"].from_pretrained(folders["bert"], **labels)
    adapted = peft.PeftModel.from_pretrained(base, "adapter").eval()
    batch = transformers.AutoTokenizer.from_pretrained("adapter")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(adapted(**batch).logits.softmax(-1).numpy(), expected, atol=1e-5)


def test_a_pipeline_gives_the_number(of_task: Callable[..., Path], folders: dict[str, Path], in_tmp: Path) -> None:
    run = of_task("roberta", numbers=True)
    expected = FinishedRun.load(run).predict(TEXTS)
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    config = json.loads(Path("merged/config.json").read_text())
    assert config["problem_type"] == "regression"
    answers = transformers.pipeline("text-classification", "merged", device="cpu")(TEXTS)
    np.testing.assert_allclose([answer["score"] for answer in answers], expected, atol=1e-5)
    answer = lora_bench("export", f"run={run}", "format=peft", "output=adapter")
    assert "num_labels=1" in answer.out
    base = CLASSES["roberta"].from_pretrained(folders["roberta"], num_labels=1)
    adapted = peft.PeftModel.from_pretrained(base, "adapter").eval()
    batch = transformers.AutoTokenizer.from_pretrained("adapter")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(adapted(**batch).logits[:, 0].numpy(), expected, atol=1e-5)


def test_words_that_begin_alike_are_scored_whole(of_task: Callable[..., Path], in_tmp: Path) -> None:
    """Each word's probability is the product of its tokens', each among the tokens that continue one of the words."""
    words = ["what is", "what is the", "how"]
    run = of_task("t5", f"model.label_words=[{','.join(words)}]", "data.max_length=96")
    expected = FinishedRun.load(run).predict(TEXTS)
    assert lora_bench("export", f"run={run}", "format=merged", "output=merged").code == 0
    assert "continue one of the words" in Path("merged/README.md").read_text(encoding="utf-8")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained("merged"), CLASSES["t5"].from_pretrained("merged")
    texts = [f"classification text: {text}" for text in TEXTS]
    batch = tokenizer(texts, padding=True, return_tensors="pt", truncation=True, max_length=96)
    paths = [[*tokenizer(word, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for word in words]
    assert len({path[0] for path in paths}) < 3
    log_p = torch.zeros(len(TEXTS), 3)
    for label, path in enumerate(paths):
        for i, token in enumerate(path):
            children = sorted({other[i] for other in paths if other[:i] == path[:i]})
            read = torch.tensor([[model.config.decoder_start_token_id, *path[:i]]] * len(TEXTS))
            with torch.no_grad():
                logits = model.eval()(**batch, decoder_input_ids=read).logits[:, -1, children]
            log_p[:, label] += logits.log_softmax(-1)[:, children.index(token)]
    np.testing.assert_allclose(log_p.exp().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
