"""`eval` scores a finished run as its own training did, and an adapter as peft does; figures go where they belong."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
import torch
import transformers
from rich.console import Console

from lora_bench.config.build import build_data
from lora_bench.data import sources
from lora_bench.errors import Code, UserError
from lora_bench.evaluate import run_eval
from lora_bench.records.job import Job
from lora_bench.run.evaluation_request import EvaluationRequest
from lora_bench.train import train
from tests import messages, three_classes
from tests.adapters.peft_tools import TASKS, bodies, in_peft, made_by_peft
from tests.command_line import files_below, lora_bench, refused, refuses, toy_run
from tests.helpers import SMALL_TOY, composed

BESIDES = ("calibrated", "unseen", "typo", "order", "entity", "perturbed")
TOY = [override for override in SMALL_TOY if override.startswith("data")]
# peft asks transformers for a property that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
QUICK = [*SMALL_TOY, "data.max_length=48", "trainer.max_steps=3", "optimizer.lr=0.02"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "toy"}
    train(Job(composed(*QUICK), folder, choices, []), console=Console(file=io.StringIO()))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def evaluated(run: Path, *overrides: str, choice: str = "toy") -> str:
    shown = io.StringIO()
    request = EvaluationRequest.read(composed(f"run={run}", *overrides, name="eval"), choice)
    run_eval(request, console=Console(file=shown, width=60))
    return shown.getvalue()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def pairs(folder: Path, split: str = "validation", label: str = "label") -> None:
    """The toy pairs of a split as a local file."""
    source = sources.load(build_data(composed(*SMALL_TOY).data))[1]["validation"]
    rows = zip(*source.texts, map(str, source.labels.tolist()), strict=True)
    folder.mkdir(exist_ok=True)
    header = f"question1\tquestion2\t{label}\n"
    (folder / f"{split}.tsv").write_text(header + "".join("\t".join(row) + "\n" for row in rows))


def test_the_same_split_gives_the_same_figures_and_predictions(run: Path) -> None:
    record, own = read(run / "run.json"), (run / "run.json").read_bytes()
    shown = evaluated(run, *TOY)
    found = read(run / "evaluations" / "toy.json")
    assert found["metrics"] == {key: value for key, value in record["metrics"].items() if key.startswith("validation/")}
    before = pq.read_table(run / "predictions" / "validation.parquet")
    after = pq.read_table(run / "evaluations" / "toy" / "validation.parquet")
    assert after.equals(before)
    assert found["data"]["choice"] == found["data"]["source"] == "toy"
    assert found["data"]["fingerprint"] == {"validation": record["data"]["fingerprint"]["validation"]}
    assert found["data"]["rows"] == {"validation": 40}
    assert (run / "run.json").read_bytes() == own
    assert "validation" in shown
    assert f"{found['metrics']['validation/mcc']:.4f}" in shown


def test_the_written_path_is_shown_in_one_piece(run: Path) -> None:
    assert f"written: {run / 'evaluations' / 'toy.json'}\n" in evaluated(run, *TOY)  # wider than the screen


def test_local_files_are_called_after_their_folder_or_as_asked(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "paws")
    pairs(tmp_path / "paws", "test")
    pairs(tmp_path / "paws", "train")
    evaluated(run, f"data.path={tmp_path / 'paws'}", "data.max_length=48", choice="pairs")
    evaluated(run, f"data.path={tmp_path / 'paws'}", "name=mine", choice="pairs")
    found, mine = read(run / "evaluations" / "paws.json"), read(run / "evaluations" / "mine.json")
    assert found["metrics"] == mine["metrics"]
    assert {key.split("/")[0] for key in found["metrics"]} == {"validation", "test"}  # train is not scored
    assert found["metrics"]["test/mcc"] == found["metrics"]["validation/mcc"]
    assert found["metrics"]["test/nll"] == read(run / "run.json")["metrics"]["validation/nll"]
    assert found["data"]["path"] == str(tmp_path / "paws")
    assert {path.name for path in (run / "evaluations" / "paws").iterdir()} == {"validation.parquet", "test.parquet"}


def test_an_evaluation_of_other_data_is_not_replaced(run: Path, tmp_path: Path) -> None:
    for folder, split in (("a", "validation"), ("b", "test")):
        (tmp_path / folder).mkdir()
        pairs(tmp_path / folder / "paws", split)
    evaluated(run, f"data.path={tmp_path / 'a' / 'paws'}", choice="pairs")
    before = files_below(run)
    with refuses(Code.EXISTS, key="name") as caught:
        evaluated(run, f"data.path={tmp_path / 'b' / 'paws'}", choice="pairs")
    assert (caught.value.value, files_below(run)) == ("paws", before)
    evaluated(run, f"data.path={tmp_path / 'b' / 'paws'}", "name=other", choice="pairs")
    evaluated(run, f"data.path={tmp_path / 'a' / 'paws'}", choice="pairs")
    assert files_below(run).items() > before.items()


def test_one_file_is_a_test_split(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path, "anything")
    evaluated(run, f"data.path={tmp_path / 'anything.tsv'}", choice="pairs")
    found = read(run / "evaluations" / "anything.json")
    assert found["metrics"]["test/auroc"] == read(run / "run.json")["metrics"]["validation/auroc"]
    scores = np.array(pq.read_table(run / "evaluations" / "anything" / "test.parquet").column("score"))
    np.testing.assert_array_equal(
        scores, np.array(pq.read_table(run / "predictions/validation.parquet").column("score"))
    )


def test_perturbed_and_unseen_figures_stand_beside_the_clean_ones(run: Path) -> None:
    evaluated(run, *TOY)
    clean = read(run / "evaluations" / "toy.json")
    predictions = (run / "evaluations" / "toy" / "validation.parquet").read_bytes()
    shown = evaluated(run, *TOY, "data.perturb=[typo,order,entity]", "data.perturb_seeds=2", "data.unseen=true")
    found = read(run / "evaluations" / "toy.json")
    assert {key: found["metrics"][key] for key in clean["metrics"]} == clean["metrics"]
    assert (run / "evaluations" / "toy" / "validation.parquet").read_bytes() == predictions
    places = {key.rpartition("/")[0] for key in found["metrics"]}
    assert places == {"validation", *(f"validation/{x}" for x in BESIDES)}
    assert found["data"]["perturb"] == {"transforms": ["typo", "order", "entity"], "seeds": 2, "intensity": 0.2}
    assert found["data"]["unseen"]["validation"] == 40  # the generator never shows a question twice
    assert found["metrics"]["validation/unseen/mcc"] == found["metrics"]["validation/mcc"]
    assert found["metrics"]["validation/order/changed"] == 1
    consistency = found["metrics"]["validation/perturbed/order_consistency"]
    assert consistency == pytest.approx(1 - found["metrics"]["validation/order/flip_rate"])
    for words in ("perturbed ", "entity ", "drop", "validation/unseen", "typo: 40 of 40 rows perturbed"):
        assert words in shown
    again = evaluated(run, *TOY, "data.perturb=[typo,order,entity]", "data.perturb_seeds=2", "data.unseen=true")
    assert again == shown
    assert read(run / "evaluations" / "toy.json") == found


def test_what_a_run_has_seen_is_not_told_from_data_that_changed_since(tmp_path: Path) -> None:
    pairs(tmp_path / "d", "train")
    pairs(tmp_path / "d", "validation")
    own = ["data=pairs", f"data.path={tmp_path / 'd'}", "data.selection_size=10", "trainer.max_steps=1"]
    quiet = Console(file=io.StringIO())
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "pairs"}
    train(Job(composed(*own), tmp_path / "run", choices, []), console=quiet)
    request = [f"data.path={tmp_path / 'd'}", "data.unseen=true"]
    evaluated(tmp_path / "run", *request, choice="pairs")
    before = files_below(tmp_path / "run")
    with (tmp_path / "d" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("one more?\tand another?\t0\n")
    with refuses(Code.MISMATCH, key="data.unseen") as caught:
        evaluated(tmp_path / "run", *request, choice="pairs")
    assert "train split" in str(caught.value)
    assert files_below(tmp_path / "run") == before


def test_extra_metrics(run: Path) -> None:
    evaluated(run, *TOY, "metric=[specificity]")
    assert "validation/specificity" in read(run / "evaluations" / "toy.json")["metrics"]


def test_a_second_evaluation_of_a_name_replaces_the_first(run: Path) -> None:
    evaluated(run, *TOY)
    evaluated(run, "data=toy", "data.train_rows=20", "data.validation_rows=20")
    assert read(run / "evaluations" / "toy.json")["data"]["rows"] == {"validation": 20}
    assert pq.read_table(run / "evaluations" / "toy" / "validation.parquet").num_rows == 20


@pytest.mark.parametrize(
    ("overrides", "code", "key", "value", "datum"),
    [
        (["name=../x"], Code.INVALID_VALUE, "name", "../x", ""),
        (["data.perturb=[typo,numbr]"], Code.UNKNOWN_CHOICE, "data.perturb", "numbr", "number"),
        (["data.perturb=number", "data.relation=entailment"], Code.UNSUPPORTED, "data.perturb", "number", "entailment"),
        (["data.augment=typo"], Code.CONFLICT, "data.augment", "typo", ""),
        (["data.text_columns=[question1]"], Code.MISMATCH, "data.text_columns", ["question1"], "2"),
        (
            ["+metric.mine={torchmetric: BinaryRecal, direction: up}"],
            Code.UNKNOWN_CHOICE,
            "metric.mine.torchmetric",
            "BinaryRecal",
            "BinaryRecall",
        ),
    ],
)
def test_refusals_leave_the_run_as_it_was(
    run: Path, tmp_path: Path, overrides: list[str], code: Code, key: str, value: object, datum: str
) -> None:
    pairs(tmp_path / "d")
    before = sorted(run.rglob("*"))
    with refuses(code, key=key) as caught:
        evaluated(run, f"data.path={tmp_path / 'd'}", *overrides, choice="pairs")
    assert caught.value.value == value
    assert datum in str(caught.value)
    assert sorted(run.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "run"]


def test_data_without_labels_to_score_is_refused(run: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "d", "train")
    pairs(tmp_path / "e", "test", label="other")
    for name in ("d", "e"):
        with refuses(Code.EMPTY, key="data"):
            evaluated(run, f"data.path={tmp_path / name}", choice="pairs")


def test_an_unfinished_run_is_refused(run: Path) -> None:
    record = read(run / "run.json")
    (run / "run.json").write_text(json.dumps({**record, "status": "diverged"}))
    with refuses(Code.UNFINISHED, key="run") as caught:
        evaluated(run, *TOY)
    assert "diverged" in str(caught.value)


# -- an adapter made by PEFT --


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones by form, and below `adapters` what peft saved for each: the backbone's folder is in its config."""
    root = tmp_path_factory.mktemp("peft")
    found = bodies(root)
    for form in ("bert", "t5", "t5_encoder"):
        targets = ["query", "value"] if form == "bert" else ["q", "v"]
        config = peft.LoraConfig(task_type=TASKS[form], target_modules=targets, r=4, lora_alpha=32)
        made_by_peft(form, found[form], root / "adapters" / form, config)
    return {**found, "adapters": root / "adapters"}


def evaluated_peft(adapter: Path, *overrides: str) -> Any:
    """What `eval peft=` wrote; the adapter's own folder stays as it was."""
    before = files_below(adapter)
    shown = io.StringIO()
    asked = composed(f"peft={adapter}", *TOY, "output=figures", *overrides, name="eval")
    run_eval(EvaluationRequest.read(asked, "toy"), console=Console(file=shown))
    assert f"written: {Path('figures', 'evaluations', 'toy.json')}\n" in shown.getvalue()
    assert files_below(adapter) == before
    return read(Path("figures/evaluations/toy.json"))


@torch.no_grad()
def test_an_adapter_of_peft_gets_the_figures_of_its_own_scores(made: dict[str, Path], in_tmp: Path) -> None:
    adapter = made["adapters"] / "bert"
    found = evaluated_peft(adapter)
    split = sources.load(build_data(composed(*SMALL_TOY).data))[1]["validation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made["bert"])
    batch = tokenizer(*(list(texts) for texts in split.texts), padding=True, return_tensors="pt")
    logits = in_peft("bert", made["bert"], adapter)(**batch).logits
    expected = logits.softmax(-1)[:, 1].numpy()
    assert np.ptp(expected) > 1e-3
    written = pq.read_table("figures/evaluations/toy/validation.parquet")
    np.testing.assert_allclose(np.array(written.column("score")), expected, atol=1e-5)
    assert written.column("label").to_pylist() == split.labels.tolist()
    labels = expected >= 0.5
    assert found["metrics"]["validation/accuracy"] == pytest.approx((labels == split.labels).mean())
    assert found["metrics"]["validation/mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(split.labels, labels))
    assert found["metrics"]["validation/auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(split.labels, expected))
    assert found["peft"] == {"folder": str(adapter), "peft_type": "LORA", "backbone": str(made["bert"])}
    assert found["data"]["rows"] == {"validation": 40}


def test_the_adapter_of_a_run_gets_the_figures_of_the_run(made: dict[str, Path], in_tmp: Path) -> None:
    for form, model in (("bert", ()), ("t5", ("model=t5",)), ("t5_encoder", ("model=t5", "model.form=encoder"))):
        place = f"model.path={made[form]}"
        chosen = dict.fromkeys(("model", "adapter", "data"), "chosen")
        asked = composed(*QUICK, *(model or ("model=bert",)), place, "data.max_length=128", "adapter=pissa")
        train(Job(asked, Path(form), chosen, []), console=Console(file=io.StringIO()))
        own = read(Path(form, "run.json"))["metrics"]
        found = evaluated_peft(Path(form, "adapter"), *model, *([place] if model else []))["metrics"]
        assert found == pytest.approx({key: own[key] for key in found}, abs=1e-5)


def test_a_backbone_that_has_moved_is_named(made: dict[str, Path], in_tmp: Path) -> None:
    expected = evaluated_peft(made["adapters"] / "bert")
    shutil.copytree(made["bert"], "moved")
    shutil.copytree(made["adapters"] / "bert", "adapter")
    config = read(Path("adapter/adapter_config.json"))
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    with refuses(Code.NOT_FOUND, key="model.hub_id") as caught:
        evaluated_peft(Path("adapter"))
    assert caught.value.value == "gone/away"
    assert "model.path=DIR" in str(caught.value)
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with refuses(Code.UNSUPPORTED, key="base_model_name_or_path") as caught:
        evaluated_peft(Path("adapter"))
    assert "model.path=DIR" in str(caught.value)
    for named in (["model.path=moved"], ["model=bert", "model.path=moved"]):
        assert evaluated_peft(Path("adapter"), *named)["metrics"] == expected["metrics"]


def test_an_adapter_of_t5_needs_its_template_and_form(made: dict[str, Path], in_tmp: Path) -> None:
    adapter, model = made["adapters"] / "t5", ("model=t5", f"model.path={made['t5']}")
    with refuses(Code.UNSUPPORTED, key="peft") as caught:
        evaluated_peft(adapter)
    assert caught.value.value == adapter
    assert "model=t5" in str(caught.value)
    with refuses(Code.UNSUPPORTED, key="task_type") as caught:
        evaluated_peft(adapter, *model, "model.form=encoder")
    assert caught.value.value == "SEQ_2_SEQ_LM"
    assert "TOKEN_CLS" in str(caught.value)
    one = evaluated_peft(adapter, *model)["metrics"]
    other = evaluated_peft(adapter, *model, "model.template='{fields}'")["metrics"]
    assert one["validation/nll"] != other["validation/nll"]


def test_the_figures_of_an_adapter_have_a_folder_of_their_own(made: dict[str, Path], in_tmp: Path) -> None:
    adapter = made["adapters"] / "bert"
    for _ in range(2):
        assert lora_bench("eval", f"peft={adapter}", *TOY).code == 0
    assert len(list(Path("outputs/peft").glob("bert-*/evaluations/toy.json"))) == 2
    evaluated_peft(adapter)
    evaluated_peft(adapter, "data.validation_rows=20")  # takes the place of the first
    assert read(Path("figures/evaluations/toy.json"))["data"]["rows"] == {"validation": 20}


def test_a_wrong_request_for_an_adapter_leaves_nothing(made: dict[str, Path], run: Path, in_tmp: Path) -> None:
    adapter = made["adapters"] / "bert"
    of_peft, of_run, below_a_file = f"peft={adapter}", f"run={run}", f"{run}/run.json/file/figures"
    requests: list[tuple[list[str], Code, str, object]] = [
        ([of_peft, of_run], Code.CONFLICT, "eval", None),
        ([of_peft, "name=../x"], Code.INVALID_VALUE, "name", "../x"),
        ([of_peft, f"output={adapter}/figures"], Code.EXISTS, "output", f"{adapter}/figures"),
        ([of_peft, f"output={adapter}"], Code.EXISTS, "output", str(adapter)),
        ([of_run, "model=bert"], Code.CONFLICT, "model", "bert"),
        ([of_run, "model.path=other"], Code.NOT_FOUND, "model.path", "other"),
        ([of_peft, "data.unseen=true"], Code.UNSUPPORTED, "data.unseen", True),
        ([of_run, "output=x"], Code.CONFLICT, "output", "x"),
        ([of_peft, f"output={below_a_file}"], Code.UNWRITABLE, "output", Path(below_a_file)),
    ]
    before = files_below(made["adapters"])
    for overrides, *expected in requests:
        error = refused("eval", *TOY, *overrides)
        assert [error.code, error.key, error.value] == expected
    error = refused("eval", *TOY, of_peft, "data.max_length=600")
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "data.max_length", 600)
    assert "514" in str(error)
    error = refused("eval", *TOY, "peft=nowhere")
    assert (error.code, error.file) == (Code.NOT_FOUND, Path("nowhere/adapter_config.json"))
    assert files_below(made["adapters"]) == before


def test_an_adapter_that_is_none_of_peft_is_refused_by_its_type(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("adapter=head_only", "hydra.run.dir=run")).code == 0
    error = refused("eval", "peft=run/adapter", *TOY)
    assert (error.code, error.key) == (Code.UNSUPPORTED, "peft_type")
    assert error.file == Path("run/adapter/adapter_config.json")
    assert "LORA, ADALORA, VERA" in str(error)


# -- three classes, and numbers --


TEXT = "data.text_columns=[text]"


def labelled_file(path: Path, labels: list[object]) -> str:
    """Write the validation texts of three classes with other labels, and return the override that names the file."""
    rows = zip(three_classes.texts(12, 100), labels, strict=True)
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return f"data.path={path}"


def test_three_classes_by_name_and_by_number(of_classes: Path, tmp_path: Path) -> None:
    record = read(of_classes / "run.json")
    expected = {key.partition("/")[2]: value for key, value in record["metrics"].items() if "validation" in key}
    truth = [(i + 100) % 3 for i in range(12)]
    words, digits = [three_classes.NAMES[y] for y in truth], list(truth)
    others = [("avian", "feline", "piscine")[y] for y in truth]
    by_order = "data.label_names=[avian,feline,piscine]"
    for labels, more, note in (
        (words, [], ""),
        (digits, [], "the label numbers 0 to 2 count as the run's bird, big cat, fish"),
        (others, [by_order], "the classes avian, feline, piscine count as the run's bird, big cat, fish"),
        (words, ["data.label_names=[fish,bird,big cat]"], ""),
    ):
        given = labelled_file(tmp_path / "other.tsv", labels)
        shown = evaluated(of_classes, given, TEXT, "data.max_length=24", *more, choice="files")
        result = read(of_classes / "evaluations" / "other.json")
        assert {key.partition("/")[2]: value for key, value in result["metrics"].items()} == expected
        assert result["per_class"] == {"test": record["per_class"]["validation"]}
        assert note in " ".join(shown.split())
        assert ("count as" in shown) == bool(note)
    evaluated(of_classes, labelled_file(tmp_path / "some.tsv", words[:1] * 12), TEXT, choice="files")
    assert read(of_classes / "evaluations" / "some.json")["data"]["label_counts"] == {"test": [0, 12, 0]}


@pytest.mark.parametrize(
    ("labels", "more", "code"),
    [
        (["dog"] * 12, [], Code.INVALID_DATA),
        ([3] * 12, [], Code.INVALID_DATA),
        (["a", "b"] * 6, ["data.label_names=[a,b]"], Code.MISMATCH),
        ([0.5, 1.5] * 6, ["data.label_threshold=1"], Code.MISMATCH),
        ([0.5, 1.5] * 6, ["data.type=regression"], Code.MISMATCH),
    ],
)
def test_other_classes_are_refused(
    of_classes: Path, tmp_path: Path, labels: list[object], more: list[str], code: Code
) -> None:
    given = labelled_file(tmp_path / "other.tsv", labels)
    with pytest.raises(UserError) as caught:
        evaluated(of_classes, given, TEXT, *more, choice="files")
    assert caught.value.code == code, str(caught.value)
    messages.check("eval", str(caught.value))


def test_a_regression_is_evaluated_on_numbers(of_numbers: Path, tmp_path: Path) -> None:
    numbers: list[object] = [i % 3 - 0.5 * (i % 2) for i in range(12)]
    given = labelled_file(tmp_path / "other.tsv", numbers)
    shown = evaluated(of_numbers, given, TEXT, "data.max_length=24", choice="files")
    result, record = read(of_numbers / "evaluations" / "other.json"), read(of_numbers / "run.json")
    assert result["metrics"]["test/mse"] == record["metrics"]["validation/mse"]
    assert "spearman" in shown
    with refuses(Code.INVALID_DATA):
        evaluated(of_numbers, labelled_file(tmp_path / "words.tsv", ["a"] * 12), TEXT, choice="files")


def test_unseen_rows_of_inferred_classes(tmp_path: Path) -> None:
    folder = three_classes.run_of(tmp_path, "data.label_names=null")
    shown = evaluated(folder, f"data.path={tmp_path / 'data'}", TEXT, "data.unseen=true", choice="files")
    assert "unseen" in shown
    assert read(folder / "evaluations" / "data.json")["metrics"]["validation/unseen/accuracy"] is not None


def test_numbers_keep_their_meaning_when_the_positive_label_is_the_first(tmp_path: Path) -> None:
    data = ["data.label_names=[no,yes]", "data.positive_label=no"]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(24)))
    settings = ["data=files", f"data.path={tmp_path}", TEXT, *data, *three_classes.QUICK]
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "files"}
    train(Job(composed(*settings), tmp_path / "run", choices, []), console=Console(file=io.StringIO()))
    evaluated(tmp_path / "run", f"data.path={tmp_path / 'validation.tsv'}", TEXT, "data.max_length=24", choice="files")
    record, result = read(tmp_path / "run/run.json"), read(tmp_path / "run/evaluations/validation.json")
    assert record["data"]["label_names"] == ["yes", "no"]
    assert result["metrics"]["test/nll"] == record["metrics"]["validation/nll"]
    evaluated(tmp_path / "run", f"data.path={tmp_path}", TEXT, "data.unseen=true", choice="files")
