"""A run, end to end: what its folder holds, that the numbers in it agree, how it ends when something goes wrong."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from lora_bench import train as story
from lora_bench.config.build import build_data
from lora_bench.data import sources
from lora_bench.errors import Code, DivergedError, UserError
from lora_bench.evaluation.metrics import score
from lora_bench.records.job import Job
from lora_bench.records.run_folder import LAYOUT
from lora_bench.run import inputs, recorder
from lora_bench.training import model_selection
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, TINY, composed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack

CALIBRATED = ("ece", "nll", "brier")
CUT = ("accuracy", "f1", "mcc")
NAMES = ("accuracy", "f1", "mcc", "precision", "recall", "auroc", "ece", "nll", "brier")
QUICK = [*SMALL_TOY, "data.max_length=48", "trainer.epochs=2"]


@dataclass(frozen=True)
class Trained:
    """A run's folder, and what was shown on the screen."""

    folder: Path
    output: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def predictions(self, split: str) -> dict[str, NDArray[Any]]:
        table = pq.read_table(self.folder / "predictions" / f"{split}.parquet")
        return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def trained(folder: Path, *overrides: str, title: str = "", screen: io.StringIO | None = None) -> Trained:
    output = screen or io.StringIO()
    chosen = dict(o.split("=", 1) for o in overrides if o.split("=")[0] in ("model", "adapter", "data"))
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "toy", **chosen}
    console = Console(file=output, width=200)
    job = Job(composed(*overrides), folder, choices, list(overrides), title=title)
    (error,) = story.train_pack([job], console=console)
    if error:
        raise error
    return Trained(folder, output.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Runs that are looked at and left alone, each made once: `runs("model=tiny_t5")`."""
    runs: dict[tuple[str, ...], Trained] = {}

    def run(*overrides: str) -> Trained:
        if overrides not in runs:
            runs[overrides] = trained(tmp_path_factory.mktemp("runs") / "run", *QUICK, *overrides)
        return runs[overrides]

    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


ALWAYS = {
    *("run.json", "metrics.jsonl", "predictions/validation.parquet"),
    *(".hydra/config.yaml", ".hydra/overrides.yaml", ".lock"),
}
ADAPTER = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}


@pytest.mark.parametrize("family", TINY)
def test_the_folder_is_what_the_design_says(runs: Callable[..., Trained], family: str) -> None:
    run = runs(f"model={family}")
    record = run.record
    assert files(run.folder) == ALWAYS | ADAPTER
    assert list(record) == list(LAYOUT)
    assert (record["status"], record["error"], record["schema"]) == ("done", None, 1)
    assert record["created"] < record["finished"]
    assert record["choices"] == {"model": family, "adapter": "lora", "data": "toy"}
    assert record["overrides"] == [*QUICK, f"model={family}"]
    assert record["selection"]["metric"] == "mcc"
    named = {f"{split}/{name}" for split in ("selection", "validation") for name in NAMES}
    assert set(record["metrics"]) == named | {f"validation/calibrated/{name}" for name in (*CALIBRATED, *CUT)}

    params = record["params"]
    assert set(params) == {"adapter", "head", "trainable", "total"}
    assert params["trainable"] == params["adapter"] + params["head"] < params["total"]
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == params["trainable"]
    assert (params["head"] == 0) == (family == "tiny_t5")

    cost = record["cost"]
    assert set(cost) == {
        *(
            "train_seconds",
            "train_flops",
            "prepare_seconds",
            "prepare_flops",
            "prefix_fill_seconds",
            "prefix_fill_flops",
        ),
        *("train_tokens", "train_padding_tokens"),
        *("peak_memory_bytes", "pairs_per_second", "steps", "pack_size", "micro_batch_size", "eval_batch_size"),
    }
    assert (cost["steps"], cost["pack_size"]) == (8, 1)
    assert cost["pairs_per_second"] == pytest.approx(2 * 108 / (cost["train_seconds"] - cost["prepare_seconds"]))
    assert cost["train_flops"] > 1e7
    assert 0 <= cost["train_padding_tokens"] < cost["train_tokens"] / 2
    assert cost["peak_memory_bytes"] > 1e7

    assert record["data"]["source"] == "toy"
    assert record["data"]["rows"] == {"train": 108, "selection": 12, "validation": 40}
    assert set(record["data"]["truncated"]) == set(record["data"]["fingerprint"]) == set(record["data"]["rows"])
    assert record["data"]["truncated"]["train"] > 0
    assert len(set(record["data"]["fingerprint"].values())) == 3

    environment = record["environment"]
    assert re.fullmatch("[0-9a-f]{64}", environment["backbone_sha256"])
    assert environment["precision"] == "float32"
    assert environment["threads"] == torch.get_num_threads()
    assert {"commit", "dirty", "versions", "device"} <= set(environment)
    assert environment["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("family", TINY)
def test_the_written_predictions_give_the_written_metrics(runs: Callable[..., Trained], family: str) -> None:
    run = runs(f"model={family}")
    predictions = run.predictions("validation")
    assert list(predictions) == ["id", "label", "score"]
    source = sources.load(build_data(composed(*QUICK).data))[1]["validation"]
    assert predictions["id"].tolist() == source.ids.tolist()  # every row, by its number in the source
    assert predictions["label"].tolist() == source.labels.tolist()
    values = score(predictions["score"], predictions["label"], {})
    assert {f"validation/{name}": value for name, value in values.items()} == {
        key: value
        for key, value in run.record["metrics"].items()
        if key.startswith("validation/") and "/cal" not in key
    }
    logits = np.log(predictions["score"] / (1 - predictions["score"])) / run.record["selection"]["temperature"]
    calibrated = score(1 / (1 + np.exp(-logits)), predictions["label"], {})
    for name in CALIBRATED:
        assert run.record["metrics"][f"validation/calibrated/{name}"] == pytest.approx(calibrated[name], abs=1e-6)
    said = (predictions["score"] >= run.record["selection"]["threshold"]).astype(np.float64)
    at_threshold = score(said, predictions["label"], {})
    for name in CUT:
        assert run.record["metrics"][f"validation/calibrated/{name}"] == pytest.approx(at_threshold[name], abs=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_there_is_a_line_per_evaluation(runs: Callable[..., Trained], family: str) -> None:
    run = runs(f"model={family}")
    assert [(line["split"], line["step"], line["epoch"]) for line in run.lines[:-1]] == [
        ("selection", 4, 1.0),
        ("selection", 8, 2.0),
    ]
    best = max(run.lines[:-1], key=lambda line: line["metrics"]["mcc"])
    last = run.lines[-1]
    assert (last["split"], last["step"], last["epoch"]) == ("validation", best["step"], best["epoch"])
    chosen = {key: value for key, value in run.record["selection"].items() if key not in ("temperature", "threshold")}
    assert chosen == {"metric": "mcc", "step": best["step"], "epoch": best["epoch"]}
    for line in (best, last):
        for name, value in line["metrics"].items():
            assert run.record["metrics"][f"{line['split']}/{name}"] == value


def test_the_screen_tells_the_story(runs: Callable[..., Trained]) -> None:
    run = runs("model=tiny_bert")
    assert "lora on tiny_bert: 12 adapted linears" in run.output
    assert "toy: train 108, selection 12, validation 40; float32 on cpu" in run.output
    assert "data.max_length=48" in run.output
    assert f"record: {run.folder}" in run.output
    for name in NAMES:
        assert name in run.output
    assert f"{run.record['metrics']['validation/nll']:.4f}" in run.output
    assert "\x1b" not in run.output


def test_a_job_of_a_sweep_leaves_its_result_to_the_sweep(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *QUICK, "trainer.max_steps=1", title="job 0: seed=0")
    assert run.record["status"] == "done"
    assert [line.partition(":")[0] for line in run.output.splitlines() if not line.startswith("note: ")] == [
        "toy",
        "2 classes",
    ]


def test_a_rank_goes_from_the_shell_to_the_tensors(runs: Callable[..., Trained]) -> None:
    run = runs("adapter.rank=3", "adapter.target_modules=qv", "adapter.layers=top:1")
    record = run.record
    targets = ["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.1.attention.self.value"]
    assert record["targets"] == dict.fromkeys(targets, 3)
    assert record["config"]["adapter"]["rank"] == 3
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    for name in targets:
        assert saved[f"base_model.model.{name}.lora_A.weight"].shape == (3, 32)
        assert saved[f"base_model.model.{name}.lora_B.weight"].shape == (32, 3)
    assert sum("lora_" in name for name in saved) == 4
    assert record["params"]["adapter"] == 2 * 3 * (32 + 32)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 16.0, targets)


def test_the_config_is_written_resolved(runs: Callable[..., Trained]) -> None:
    run = runs("adapter.rank=3", "adapter.target_modules=qv", "adapter.layers=top:1")
    config = yaml.safe_load((run.folder / ".hydra" / "config.yaml").read_text())
    assert config == run.record["config"]
    assert config["optimizer"]["lr"] == config["adapter"]["default_lr"] == 5e-4
    assert yaml.safe_load((run.folder / ".hydra" / "overrides.yaml").read_text()) == run.record["overrides"]


def test_full_leaves_a_plain_model_and_head_only_a_head(runs: Callable[..., Trained]) -> None:
    full, head = runs("adapter=full"), runs("adapter=head_only")
    assert ALWAYS | {"adapter/model.safetensors", "adapter/config.json"} <= files(full.folder)
    assert "adapter/adapter_model.safetensors" not in files(full.folder)
    assert full.record["params"]["adapter"] + full.record["params"]["head"] == full.record["params"]["total"]
    assert files(head.folder) == ALWAYS | ADAPTER
    assert head.record["params"]["adapter"] == 0
    assert head.record["targets"] == full.record["targets"] == {}
    assert head.record["cost"]["train_flops"] < full.record["cost"]["train_flops"]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_same_seed_twice_is_the_same_run(tmp_path: Path, adapter: str) -> None:
    def remains(run: Trained) -> tuple[list[dict[str, Any]], list[float]]:
        lines = [{key: value for key, value in line.items() if key != "seconds"} for line in run.lines]
        return lines, run.predictions("validation")["score"].tolist()

    options = [*QUICK, f"adapter={adapter}"] + (["adapter.dropout=0.1"] if adapter == "lora" else [])
    one = trained(tmp_path / "one", *options)
    torch.rand(7)  # what the process did before does not matter
    two = trained(tmp_path / "two", *options)
    other = trained(tmp_path / "three", *options, "seed=1")
    assert remains(one) == remains(two)
    assert remains(one)[1] != remains(other)[1]
    assert one.record["data"] == other.record["data"]
    assert one.record["environment"]["backbone_sha256"] == other.record["environment"]["backbone_sha256"]
    assert one.record["cost"]["train_flops"] == two.record["cost"]["train_flops"]


def test_a_run_in_bf16_says_so(runs: Callable[..., Trained]) -> None:
    run = runs("trainer.precision=bf16")
    assert run.record["status"] == "done"
    assert run.record["environment"]["precision"] == "bfloat16"
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    plain = runs("model=tiny_bert")
    assert run.record["environment"]["backbone_sha256"] == plain.record["environment"]["backbone_sha256"]
    off = run.predictions("validation")["score"] - plain.predictions("validation")["score"]
    assert 0 < np.abs(off).max() < 0.1


@pytest.mark.parametrize("family", TINY)
def test_the_backbone_is_bitwise_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    backbones: list[Any] = []
    load = inputs.load

    def keep(*arguments: Any, **keywords: Any) -> Any:
        backbones.append(load(*arguments, **keywords))
        return backbones[-1]

    monkeypatch.setattr(inputs, "load", keep)
    run = trained(tmp_path / "run", *QUICK, f"model={family}", "optimizer.lr=0.1")
    (backbone,) = backbones
    assert backbone.hash() == run.record["environment"]["backbone_sha256"]


def test_the_reported_split_is_scored_once_and_never_chosen_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_sizes: list[int] = []
    during: list[bool] = []
    ask, fit = model_selection.predict, story.PackTraining.fit

    def counting(pack: Pack, table: Any, *processes: Any) -> Any:
        batch_sizes.append(len(table))
        return ask(pack, table, *processes)

    def fitting(*arguments: Any, **keywords: Any) -> Any:
        (training,) = arguments
        (mixture,) = training.mixtures
        assert {len(data.train) for data in mixture.tasks.values()} != {40}
        assert {len(data.selection) for data in mixture.tasks.values()} == {12}
        score = training.observer.ended

        def ended(members: Any) -> None:
            during.append(40 in batch_sizes)
            score(members)

        training.observer.ended = ended
        return fit(*arguments, **keywords)

    monkeypatch.setattr(model_selection, "predict", counting)
    monkeypatch.setattr(recorder, "predict", counting)
    monkeypatch.setattr(story.PackTraining, "fit", fitting)
    run = trained(tmp_path / "run", *QUICK)
    assert batch_sizes == [12, 12, 40]
    assert during == [False]
    assert [line["split"] for line in run.lines] == ["selection", "selection", "validation"]


def test_a_run_whose_numbers_overflow_is_recorded_as_diverged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"step \d+: .*(nan|inf).*optimizer\.lr"):
        trained(folder, *QUICK, "optimizer.lr=1e18", "optimizer.grad_clip_norm=null", "optimizer.warmup=0")
    run = Trained(folder, "")
    record = run.record
    assert record["status"] == "diverged"
    assert re.search(r"step \d+: .*(nan|inf)", record["error"])
    assert record["metrics"] == {}
    assert record["cost"]["steps"] >= 1
    assert not (folder / "predictions").exists()
    assert not (folder / "adapter").exists()
    assert not (folder / "run.log").exists()


def test_a_diverging_run_never_shows_a_loss_of_zero(tmp_path: Path) -> None:
    output = io.StringIO()
    options = [*QUICK, "optimizer.lr=1e18", "optimizer.warmup=0", "trainer.max_steps=10"]
    with pytest.raises(DivergedError):
        trained(tmp_path / "run", *options, screen=output)
    losses = re.findall(r"loss (\S+)", output.getvalue())
    assert losses[-1] in ("nan", "inf")
    assert "0.000" not in losses


def fails(error: BaseException) -> Callable[..., Any]:
    def fit(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return fit


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (SystemExit(143), "interrupted", ""),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "failed", "RuntimeError: DefaultCPUAllocator"),
        (
            UserError("is too much", code=Code.INVALID_VALUE, key="adapter.rank", value=9),
            "failed",
            "adapter.rank=9: is too much.",
        ),
    ],
    ids=["ctrl-c", "signal", "defect", "refusal"],
)
def test_however_a_run_ends_its_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str, words: str
) -> None:
    monkeypatch.setattr(story.PackTraining, "fit", fails(error))
    folder = tmp_path / "run"
    with pytest.raises(type(error)):
        trained(folder, *QUICK)
    record = Trained(folder, "").record
    assert record["status"] == status
    assert record["error"]
    assert record["error"].startswith(words)
    assert record["finished"] is not None
    assert record["params"]["trainable"] > 0
    log = folder / "run.log"
    assert log.exists() == (type(error) is RuntimeError)  # a paragraph says all there is to a refusal
    if log.exists():
        assert "Traceback (most recent call last)" in log.read_text()
        assert type(error).__name__ in log.read_text()


def write(folder: Path, split: str, rows: list[tuple[str, ...]], header: str = "question1\tquestion2\tlabel") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")


GOOD = [(f"question {i}", f"other {i}", str(i % 2)) for i in range(12)]


def good(folder: Path) -> None:
    write(folder, "train", GOOD)
    write(folder, "validation", GOOD[:4])


def no_column(folder: Path) -> None:
    good(folder)
    write(folder, "train", GOOD, header="q1\tquestion2\tlabel")


def label_two(folder: Path) -> None:
    good(folder)
    write(folder, "validation", [*GOOD[:2], ("a", "b", "2")])


def train_alone(folder: Path) -> None:
    write(folder, "train", GOOD)


def validation_alone(folder: Path) -> None:
    write(folder, "validation", GOOD)


def empty_split(folder: Path) -> None:
    good(folder)
    write(folder, "validation", [])


def short_row(folder: Path) -> None:
    good(folder)
    write(folder, "train", [*GOOD, ("a", "b")])


def one_row(folder: Path) -> None:
    good(folder)
    write(folder, "train", GOOD[:1])


@pytest.mark.parametrize(
    ("make", "code", "key", "file", "row", "named"),
    [
        (no_column, Code.INVALID_DATA, None, "train.tsv", None, "'question1'"),
        (label_two, Code.INVALID_DATA, None, "validation.tsv", 4, "'2'"),
        (train_alone, Code.EMPTY, "data", None, None, "validation file"),
        (validation_alone, Code.EMPTY, "data", None, None, "train file"),
        (empty_split, Code.EMPTY, None, "validation.tsv", None, ""),
        (short_row, Code.INVALID_DATA, None, "train.tsv", 14, "2 columns"),
        (one_row, Code.INVALID_DATA, None, "train.tsv", None, "1 labels"),
    ],
)
def test_refused_data_leaves_no_folder(
    tmp_path: Path,
    make: Callable[[Path], None],
    code: Code,
    key: str | None,
    file: str | None,
    row: int | None,
    named: str,
) -> None:
    make(tmp_path / "data")
    with refuses(code, key=key) as caught:
        trained(tmp_path / "runs" / "run", "data=pairs", f"data.path={tmp_path / 'data'}")
    path = None if file is None else str(tmp_path / "data" / file)
    assert (caught.value.file, caught.value.row) == (path, row)
    assert named in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("overrides", "code", "key", "value", "named"),
    [
        (["adapter.rank=33"], Code.INVALID_VALUE, "adapter.rank", 33, "32"),
        (["adapter.rank=0"], Code.INVALID_VALUE, "adapter.rank", 0, ""),
        (["adapter.target_modules=nothing"], Code.NO_MATCH, "adapter.target_modules", "nothing", ""),
        (["model=tiny_t5", "adapter=head_only"], Code.UNSUPPORTED, "adapter.method", "head_only", "model.form"),
        (["optimizer.lr=-1"], Code.INVALID_VALUE, "optimizer.lr", -1.0, ""),
        (["+adapter.rnak=3"], Code.UNKNOWN_KEY, "adapter.rnak", None, "Did you mean rank?"),
        (["+extra=1"], Code.UNKNOWN_KEY, "extra", None, ""),
        (["seed=-1"], Code.INVALID_VALUE, "seed", -1, ""),
        (["dry_run=maybe"], Code.INVALID_VALUE, "dry_run", "maybe", ""),
        (
            ["+metric.mine={torchmetric: BinaryRecal, direction: up}"],
            Code.UNKNOWN_CHOICE,
            "metric.mine.torchmetric",
            "BinaryRecal",
            "Did you mean BinaryRecall?",
        ),
        (["data.train_size=1000"], Code.INVALID_VALUE, "data.train_size", 1000, "108 rows"),
    ],
)
def test_refused_settings_leave_no_folder(
    in_tmp: Path, overrides: list[str], code: Code, key: str, value: object, named: str
) -> None:
    with refuses(code, key=key) as caught:
        trained(in_tmp / "run", *QUICK, *overrides)
    assert caught.value.value == value
    assert named in str(caught.value)
    assert list(in_tmp.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused_and_kept(runs: Callable[..., Trained]) -> None:
    run = runs("model=tiny_bert")
    before = {name: (run.folder / name).read_bytes() for name in files(run.folder)}
    with refuses(Code.EXISTS, key="hydra.run.dir") as caught:
        trained(run.folder, *QUICK, "seed=9")
    assert caught.value.value == run.folder
    assert {name: (run.folder / name).read_bytes() for name in files(run.folder)} == before


def test_a_test_split_with_labels_is_reported_too_and_hidden_labels_are_not(tmp_path: Path) -> None:
    good(tmp_path / "data")
    write(tmp_path / "data", "test", GOOD[4:9])
    options = ["data=pairs", f"data.path={tmp_path / 'data'}", "data.selection_size=4", "trainer.max_steps=1"]
    run = trained(tmp_path / "one", *options)
    assert {key.split("/")[0] for key in run.record["metrics"]} == {"selection", "validation", "test"}
    assert run.predictions("test")["id"].tolist() == [0, 1, 2, 3, 4]
    write(tmp_path / "data", "test", [(*row[:2], "-1") for row in GOOD[4:9]])
    hidden = trained(tmp_path / "two", *options)
    assert {key.split("/")[0] for key in hidden.record["metrics"]} == {"selection", "validation"}


def test_data_worth_a_second_look_is_warned_of(tmp_path: Path) -> None:
    good(tmp_path / "data")  # validation repeats train
    write(tmp_path / "data", "test", [("a", "b", "1"), ("null", "d", "1")])
    run = trained(
        tmp_path / "run",
        *("data=pairs", f"data.path={tmp_path / 'data'}", "data.selection_size=4", "trainer.max_steps=1"),
    )
    assert "note: test: all 2 rows have label 1." in run.output
    assert "are in the first too" in run.output
    assert run.record["metrics"]["test/auroc"] is None
    assert run.record["metrics"]["test/mcc"] == 0.0
    assert run.record["data"]["null_texts"]["test"] == 1


def test_extra_metrics_are_recorded_beside_the_standard_ones(runs: Callable[..., Trained]) -> None:
    run = runs("metric=[specificity,average_precision]", "trainer.max_steps=2")
    for split in ("selection", "validation"):
        assert {f"{split}/specificity", f"{split}/average_precision"} < set(run.record["metrics"])
    assert "specificity" in run.lines[0]["metrics"]
    assert "average_precision" in run.output


def test_micro_batches_and_threads_reach_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    fit = story.PackTraining.fit

    def fitting(training: Any, **keywords: Any) -> Any:
        seen["trainer"] = training.trainer
        return fit(training, **keywords)

    monkeypatch.setattr(story.PackTraining, "fit", fitting)
    threads = torch.get_num_threads()
    run = trained(tmp_path / "run", *QUICK, "trainer.micro_batch_size=5", f"trainer.threads={threads}")
    assert seen["trainer"].micro_batch_size == 5
    assert run.record["environment"]["threads"] == threads
