"""Numbers that are none, too little memory, and the same seed twice."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from lora_bench import train as training
from lora_bench.adapters.pack.pack import Pack
from lora_bench.errors import Code, DivergedError
from lora_bench.evaluation.cost import FlopModel
from lora_bench.evaluation.metrics import score
from lora_bench.run import finished_run, recorder
from lora_bench.training import model_selection
from lora_bench.training.cuda_graphs import Backward
from tests.command_line import at_step, lora_bench, refused, signalled, toy_run

RUN = toy_run("hydra.run.dir=run")


def record(folder: str = "run") -> dict[str, Any]:
    return json.loads((Path(folder) / "run.json").read_text())  # type: ignore[no-any-return]


def spoilt(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Let the loss, the gradient or the scores of the first step be NaN."""
    backward = Backward.__call__

    def spoiling(self: Backward, *arguments: Any, **keywords: Any) -> dict[int, float]:
        losses = backward(self, *arguments, **keywords)
        if fault == "gradient":
            next(iter(self.pack.trainable(0).values())).grad.fill_(torch.inf)
        return dict.fromkeys(losses, torch.nan) if fault == "loss" else losses

    if fault == "scores":
        monkeypatch.setattr(model_selection, "predict", lambda pack, table, *rest: np.full((1, len(table)), np.nan))
    else:
        monkeypatch.setattr(Backward, "__call__", spoiling)


@pytest.mark.reliability(42)
@pytest.mark.parametrize(
    ("fault", "numbers"),
    [("loss", "loss nan"), ("gradient", "gradient norm inf"), ("scores", "22 of 22 scores")],
)
def test_42_what_is_not_finite_stops_the_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, fault: str, numbers: str
) -> None:
    spoilt(monkeypatch, fault)
    answer = lora_bench("train", *toy_run("hydra.run.dir=run", "data.selection_size=22"))
    assert answer.code == 1
    assert f": step 1: {numbers} " in answer.err
    assert "optimizer.lr" in answer.err
    assert "loss 0.0" not in answer.out
    run_record = record()
    assert (run_record["status"], run_record["metrics"]) == ("diverged", {})
    assert run_record["error"].startswith(f"step 1: {numbers} ")
    assert not Path("run/metrics.jsonl").exists()
    assert not Path("run/adapter").exists()


@pytest.mark.reliability(42)
def test_42_a_learning_rate_that_is_far_too_high(in_tmp: Path) -> None:
    answer = lora_bench("train", *toy_run("optimizer.lr=1e30", "trainer.max_steps=6", "hydra.run.dir=run"))
    assert answer.code == 1
    assert record()["status"] == "diverged"
    assert "diverged: run" in lora_bench("compare", "run").out


@pytest.mark.reliability(43)
def test_43_nan_scores_never_reach_metrics(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([0, 1, 1])
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(DivergedError, match=r"\b1 of 3\b"):
            score(np.array([0.1, bad, 0.9]), labels, {})
    assert lora_bench("train", *RUN).code == 0
    nan = lambda pack, table, *rest: np.full((1, len(table)), np.nan)  # noqa: E731
    monkeypatch.setattr(finished_run, "predict", nan)
    Path("pairs.tsv").write_text("question1\tquestion2\na\tb\n")
    for command in (["predict", "input=pairs.tsv", "output=out.tsv"], ["eval", "data=toy", "data.validation_rows=16"]):
        answer = lora_bench(command[0], "run=run", *command[1:])
        assert (answer.code, answer.err.count("lora-bench: ")) == (1, 1), answer
        assert answer.error is not None
        assert (answer.error.code, answer.error.file) == (Code.DAMAGED, Path("run"))
    assert not Path("out.tsv").exists()
    assert not Path("run/evaluations").exists()
    monkeypatch.setattr(recorder, "predict", nan)  # at the very end of a training
    answer = lora_bench("train", *toy_run("hydra.run.dir=other"))
    assert (answer.code, record("other")["status"], record("other")["metrics"]) == (1, "diverged", {}), answer


@pytest.mark.reliability(43)
@pytest.mark.parametrize("constant", [0.0, 0.3, 0.5, 1.0])
def test_43_a_constant_predictor_has_mcc_0(constant: float) -> None:
    labels = np.array([0, 1] * 5)
    values = score(np.full(10, constant), labels, {})
    assert values["mcc"] == 0
    assert all(value is None or np.isfinite(value) for value in values.values())


def limited(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Memory for so many pairs in a pass through the adapted layers; short at its end, when dropout has been drawn."""
    suffix = Pack.suffix

    def call(pack: Pack, hidden: Any, batch: Any, members: list[int]) -> Any:
        logits = suffix(pack, hidden, batch, members)
        if batch.pairs > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits

    monkeypatch.setattr(Pack, "suffix", call)
    monkeypatch.setattr(training.StepFlops, "measure", lambda pack: FlopModel((1.0, 1.0, 0.0, 0.0)))


@pytest.mark.reliability(44)
def test_44_out_of_memory_halves_portions_and_keeps_the_batch(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["trainer.batch_size=8", "trainer.max_steps=3", "trainer.eval_batch_size=16", "adapter.dropout=0.3"]
    assert lora_bench("train", *toy_run(*arguments, "trainer.micro_batch_size=4", "hydra.run.dir=asked")).code == 0
    with monkeypatch.context() as patch:
        limited(patch, 5)
        answer = lora_bench("train", *toy_run(*arguments, "hydra.run.dir=run"))
        Path("pairs.tsv").write_text("question1\tquestion2\n" + "a\tb\n" * 9)
        assert lora_bench("predict", "run=run", "input=pairs.tsv", "output=out.tsv").code == 0
        assert len(Path("out.tsv").read_text().splitlines()) == 10
    assert answer.code == 0, answer
    assert re.search(r"note: .*trainer\.micro_batch_size=4\b", answer.out)
    assert re.search(r"note: .*trainer\.eval_batch_size=4\b", answer.out)
    halved, whole = record(), record("asked")
    assert (halved["cost"]["micro_batch_size"], halved["cost"]["eval_batch_size"]) == (4, 4)
    assert (whole["cost"]["micro_batch_size"], whole["cost"]["eval_batch_size"]) == (4, 16)
    assert halved["config"]["trainer"]["batch_size"] == 8
    assert halved["cost"]["steps"] == whole["cost"]["steps"] == 3
    # The same updates of the same batches: the very adapter of a run that asked for portions of 4.
    one, other = (Path(folder, "adapter/adapter_model.safetensors").read_bytes() for folder in ("run", "asked"))
    assert one == other


@pytest.mark.reliability(44)
def test_44_a_checkpoint_remembers_the_smaller_portions(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 5)
    at_step(monkeypatch, 2, signalled(signal.SIGINT))
    arguments = toy_run(
        "trainer.batch_size=8", "trainer.max_steps=3", "trainer.checkpoint_every=1", "hydra.run.dir=run"
    )
    assert lora_bench("train", *arguments).code == 130
    (newest, _) = sorted(Path("run/checkpoints").iterdir(), reverse=True)
    assert json.loads((newest / "state.json").read_text())["room"] == {"training": 4}
    assert lora_bench("train", "resume=run").code == 0
    assert record()["cost"]["micro_batch_size"] == 4


@pytest.mark.reliability(44)
def test_44_not_even_one_pair_fits(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0)
    answer = lora_bench("train", *RUN)
    assert (answer.code, answer.err.count("\n")) == (1, 1), answer
    assert answer.error is not None
    assert answer.error.code == Code.OUT_OF_MEMORY
    assert "trainer.precision=bf16" in answer.err
    assert record()["status"] == "failed"


@pytest.mark.reliability(44)
def test_44_an_unsupported_precision(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused("train", *toy_run("trainer.precision=fp8"))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "trainer.precision", "fp8")
    assert "auto, fp32, bf16" in str(error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused("train", *toy_run("trainer.device=cuda"))
    assert (error.code, error.key, error.value) == (Code.NO_DEVICE, "trainer.device", "cuda")
    assert "trainer.device=auto" in str(error)


@pytest.mark.reliability(45)
def test_45_the_same_seed_twice(in_tmp: Path) -> None:
    for folder in ("one", "two"):
        arguments = ["adapter.dropout=0.1", "trainer.max_steps=4", "trainer.eval_every=2", f"hydra.run.dir={folder}"]
        assert lora_bench("train", *toy_run(*arguments)).code == 0
    logs = []
    for folder in ("one", "two"):
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 3
        logs.append([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    assert logs[0] == logs[1]
    assert record("one")["metrics"] == record("two")["metrics"]
    tables = [parquet.read_table(f"{folder}/predictions/validation.parquet") for folder in ("one", "two")]
    assert tables[0].equals(tables[1])
    one, other = (Path(folder, "adapter/adapter_model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == other
