"""A run that begins from another: with what tensors, what it makes of them, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from lora_bench.errors import Code
from tests.command_line import at_step, lora_bench, refused, signalled, toy_run

if TYPE_CHECKING:
    from torch import Tensor

BEGUN_WITH = ("trainer.max_steps=4", "data.train_rows=80", "optimizer.lr=1e-2")
ASKED = toy_run(*BEGUN_WITH)
STILL = ["optimizer.lr=1e-30", "trainer.max_steps=1"]
"""Training that changes nothing."""


def train(folder: Path | str, *overrides: str) -> Path:
    replaced = {override.partition("=")[0] for override in overrides}
    arguments = [override for override in ASKED if override.partition("=")[0] not in replaced]
    answer = lora_bench("train", *arguments, *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer
    return Path(folder)


def tensors(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder, "adapter/adapter_model.safetensors"))


def scores(folder: Path | str) -> list[float]:
    return pq.read_table(Path(folder, "predictions/validation.parquet"))["score"].to_pylist()  # type: ignore[no-any-return]


def record(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("source") / "run")


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "vera", "head_only", "full", "lora_one"])
def test_it_begins_where_the_other_ended(method: str, in_tmp: Path) -> None:
    train("first", f"adapter={method}")
    train("second", f"adapter={method}", "adapter.init_from=first", "seed=5", *STILL)
    assert scores("second") == pytest.approx(scores("first"), abs=1e-6)
    assert record("second")["targets"] == record("first")["targets"]
    assert record("second")["cost"]["prepare_seconds"] == 0  # a start that looks at data is not made in vain


def test_ranks_that_the_other_was_given_are_taken(in_tmp: Path) -> None:
    overrides = ["adapter=sensitivity", "adapter.rank=3"]
    train("first", *overrides)
    train("second", *overrides, "adapter.init_from=first", "data.generator_seed=3")
    assert len(set(record("first")["targets"].values())) > 1
    assert record("second")["targets"] == record("first")["targets"]


def test_a_head_for_other_labels_begins_anew(source: Path, in_tmp: Path) -> None:
    overrides = [f"adapter.init_from={source}", "data.label_names=[no,yes]", "seed=5", *STILL]
    answer = lora_bench(
        "train", *[argument for argument in ASKED if "lr" not in argument], *overrides, "hydra.run.dir=other"
    )
    assert answer.code == 0, answer
    assert "not_duplicate, duplicate" in answer.out
    train("fresh", "seed=5", *STILL)
    initialised, of_source, fresh = tensors("other"), tensors(source), tensors("fresh")
    for name, tensor in initialised.items():
        expected = fresh if "classifier" in name or "pooler" in name else of_source
        assert (tensor - expected[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("head", "fitted"),
    [("head.fit_batches=10", "classifier.weight"), ("head.pair_features=true", "matching.weight")],
)
def test_a_head_that_begins_anew_is_prepared_and_the_adapter_is_not(head: str, fitted: str, in_tmp: Path) -> None:
    source = train("first", head)
    train("second", head, "adapter.init_from=first", "data.label_names=[no,yes]", "seed=5", *STILL)
    train("fresh", "seed=5", head.replace("10", "0"), *STILL)
    initialised, of_source, fresh = tensors("second"), tensors(source), tensors("fresh")
    lora = [name for name in initialised if "lora" in name]
    assert lora
    assert all((initialised[name] - of_source[name]).abs().max() < 1e-6 for name in lora)
    name = f"base_model.model.{fitted}"
    assert min((initialised[name] - other[name]).abs().max() for other in (of_source, fresh)) > 1e-4
    assert record("second")["cost"]["prepare_flops"] > 0


def test_a_head_of_numbers_that_begins_anew_starts_at_their_mean(source: Path, in_tmp: Path) -> None:
    numbers = [7.0, 8.0, 9.0, 10.0] * 10
    rows = [{"question1": f"a {i}", "question2": f"b {i}", "label": number} for i, number in enumerate(numbers)]
    for split in ("train", "validation"):
        Path(f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["data=files", "data.path=.", "data.type=regression", "data.text_columns=[question1,question2]"]
    kept = [override for override in ASKED if not override.startswith("data") and "lr" not in override]
    started = [f"adapter.init_from={source}", "data.selection_size=8", "trainer.max_steps=1", "optimizer.lr=1e-30"]
    answer = lora_bench("train", *kept, *data, *started, "hydra.run.dir=run")
    assert answer.code == 0, answer
    assert float(tensors("run")["base_model.model.classifier.bias"]) == pytest.approx(8.5, abs=0.3)


def test_a_head_with_other_differences_begins_anew(in_tmp: Path) -> None:
    """The labels are the same, so the note does not name them."""
    features = ["head.pair_features=true", "trainer.max_steps=1"]
    train("first", *features, "data.relation=entailment")
    answer = lora_bench(
        "train", *ASKED, *features, "adapter.init_from=first", "head.differences=absolute", "hydra.run.dir=second"
    )
    assert answer.code == 0, answer
    assert "the head is not" in answer.out
    assert "signed differences" in answer.out
    assert "not_duplicate, duplicate." not in answer.out
    train("third", *features, "adapter.init_from=first", "head.differences=signed", *STILL[:1])
    assert (
        tensors("third")["base_model.model.matching.weight"] - tensors("first")["base_model.model.matching.weight"]
    ).abs().max() < 1e-6


def test_it_learns_on_and_can_be_gone_on_with_when_the_other_is_gone(
    source: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(shutil.copytree(source, "first"))
    train("whole", "adapter.init_from=first")
    assert scores("whole") != scores(first)
    assert record("whole")["config"]["adapter"]["init_from"] == str(first.absolute())  # whatever folder it is read from
    with monkeypatch.context() as patch:
        at_step(patch, 2, signalled(signal.SIGTERM))
        assert lora_bench("train", *ASKED, "adapter.init_from=first", "hydra.run.dir=run").code == 143
    shutil.rmtree(first)
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer
    assert scores("run") == scores("whole")


def test_members_of_an_ensemble_begin_from_those_of_another(in_tmp: Path) -> None:
    train("first", "ensemble.members=2")
    train("second", "ensemble.members=2", "adapter.init_from=first", "seed=9", *STILL)
    assert scores("second") == pytest.approx(scores("first"), abs=1e-6)


@pytest.mark.parametrize(
    ("override", "of_source"),
    [
        ("model=tiny_roberta", "backbone"),
        ("adapter=rslora", "adapter.scaling=standard"),
        ("adapter=vera", "adapter.method=lora"),
        ("adapter.rank=4", "adapter.rank=8"),
        ("adapter.target_modules=qv", "adapter.target_modules=all"),
        ("ensemble.members=2", "ensemble.members=None"),
    ],
)
def test_what_is_not_the_same_is_refused_with_the_source_s_value(
    override: str, of_source: str, source: Path, in_tmp: Path
) -> None:
    error = refused("train", *toy_run(*BEGUN_WITH, override), f"adapter.init_from={source}")
    assert (error.code, error.key, error.value) == (Code.MISMATCH, "adapter.init_from", str(source))
    assert of_source in str(error)


@pytest.mark.usefixtures("in_tmp")
def test_a_run_that_is_not_there_or_not_done_is_refused(source: Path) -> None:
    error = refused("train", *ASKED, "adapter.init_from=nowhere")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "adapter.init_from", "nowhere")
    unfinished = Path(shutil.copytree(source, "unfinished"))
    (unfinished / "run.json").write_text(json.dumps({**record(source), "status": "interrupted"}))
    error = refused("train", *ASKED, "adapter.init_from=unfinished")
    assert (error.code, error.key) == (Code.UNFINISHED, "adapter.init_from")
    assert "interrupted" in str(error)
