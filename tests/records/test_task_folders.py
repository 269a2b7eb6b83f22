"""Several tasks in one run: what it learns, what its record and the folder of each task say, and how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import lora_bench
from lora_bench.analysis.summary import summarise
from lora_bench.data.toy import generate
from lora_bench.errors import Code
from lora_bench.report import page
from lora_bench.run.final_evaluation import report_tasks
from tests.command_line import at_step, refused, signalled, toy_run
from tests.command_line import lora_bench as command

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS = {"small": 48, "middle": 96, "large": 160}
ASKED = [
    override
    for override in toy_run("trainer.epochs=1", "optimizer.lr=1e-2")
    if not override.startswith(("data", "trainer.max"))
]
ASKED += ["trainer.batch_size=16", "trainer.eval_every=4", "trainer.micro_batch_size=16"]
THREE = "data.tasks=[small,middle,large]"
PAIRS = list(zip(*generate(16, 0, "validation").texts, strict=True))


def write_tasks(folder: Path) -> None:
    """A folder of choices for `data`: tasks of unlike size, labels and columns."""
    (folder / "data").mkdir(parents=True)
    for seed, (name, rows) in enumerate(ROWS.items()):
        settings = [f"task: {name}", f"train_rows: {rows}", "validation_rows: 16", f"generator_seed: {seed}"]
        settings += ["label_names: ['no', 'yes']"] if name == "middle" else []
        (folder / f"data/{name}.yaml").write_text("\n".join(["defaults: [toy, _self_]", *settings]) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shared` and `own`, and each task by itself in `alone/<task>`: not to be changed. `conf` has the tasks."""
    top = tmp_path_factory.mktemp("runs")
    write_tasks(top / "conf")
    train(top, "shared", THREE)
    train(top, "own", THREE, "data.share=backbone")
    for task in ROWS:
        train(top, f"alone/{task}", f"data={task}")
    return top


def train(top: Path, name: str, *overrides: str) -> Path:
    answer = command("train", "--config-dir", str(top / "conf"), *ASKED, *overrides, f"hydra.run.dir={top / name}")
    assert answer.code == 0, answer
    return top / name


def record(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def scores(folder: Path | str) -> NDArray[np.float64]:
    return pq.read_table(Path(folder, "predictions/validation.parquet"))["score"].to_numpy()  # type: ignore[no-any-return]


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("share", ["shared", "own"])
def test_its_record_has_the_figures_of_each_task_and_their_means(runs: Path, share: str) -> None:
    run_record = record(runs / share)
    for split in ("selection", "validation"):
        for name in ("accuracy", "f1", "mcc", "nll"):
            values = [run_record["metrics"][f"{split}/{task}/{name}"] for task in ROWS]
            assert run_record["metrics"][f"{split}/{name}"] == pytest.approx(fmean(values))
            assert values == [record(runs / share / "tasks" / task)["metrics"][f"{split}/{name}"] for task in ROWS]
    assert run_record["data"]["rows"]["large/train"] == 144
    assert run_record["config"]["data"]["tasks"] == list(ROWS)
    assert list(run_record["selection"]["tasks"]) == list(ROWS)
    assert not (runs / share / "checkpoints").exists()


def test_a_shared_adapter_is_one_with_a_head_for_each(runs: Path) -> None:
    shared, single = record(runs / "shared"), record(runs / "alone/small")
    assert shared["params"]["adapter"] == single["params"]["adapter"]
    assert shared["params"]["head"] == 3 * single["params"]["head"]
    assert shared["cost"]["steps"] == sum(record(runs / f"alone/{task}")["cost"]["steps"] for task in ROWS)
    tensors = [load_file(runs / f"shared/tasks/{task}/adapter/adapter_model.safetensors") for task in ROWS]
    for name, tensor in tensors[0].items():
        same = [bool((other[name] == tensor).all()) for other in tensors[1:]]
        assert same == ([True, True] if "lora_" in name else [False, False])
    for task in ROWS:
        of_task = record(runs / f"shared/tasks/{task}")
        assert of_task["params"] == single["params"]
        assert (of_task["choices"]["data"], of_task["config"]["data"]["task"]) == (task, task)
        assert of_task["cost"] == shared["cost"]
    splits = [line["split"] for line in lines(runs / "shared")]
    assert splits[:4] == ["selection", *(f"selection/{task}" for task in ROWS)]
    assert [line["split"] for line in lines(runs / "shared/tasks/small")] == ["selection"] * 5 + ["validation"]


def test_adapters_of_their_own_are_those_that_each_task_learns_alone(runs: Path) -> None:
    for task in ROWS:
        of_task, single = runs / "own/tasks" / task, runs / "alone" / task
        assert scores(of_task) == pytest.approx(scores(single), abs=1e-4)
        for name in ("steps", "train_flops", "train_tokens"):
            assert record(of_task)["cost"][name] == record(single)["cost"][name]
        assert record(of_task)["cost"]["train_seconds"] is None
        one, other = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (of_task, single))
        assert all((one[name] - tensor).abs().max() < 1e-4 for name, tensor in other.items())
        assert {k: record(of_task)[k] for k in ("params", "targets", "data")} == {
            k: record(single)[k] for k in ("params", "targets", "data")
        }
    assert record(runs / "own")["params"]["adapter"] == 3 * record(runs / "alone/small")["params"]["adapter"]
    assert record(runs / "own")["cost"]["train_flops"] == sum(
        record(runs / f"alone/{task}")["cost"]["train_flops"] for task in ROWS
    )


@pytest.mark.parametrize("share", ["shared", "own"])
def test_the_folder_of_a_task_is_used_like_a_run(runs: Path, in_tmp: Path, share: str) -> None:
    run = Path(shutil.copytree(runs / share / "tasks/middle", "run"))
    assert np.array_equal(
        lora_bench.load(run).predict(PAIRS), lora_bench.load(runs / share / "tasks/middle").predict(PAIRS)
    )
    conf = ["--config-dir", str(runs / "conf")]
    assert command("eval", *conf, f"run={run}", "data=middle").code == 0
    again = json.loads((run / "evaluations/middle.json").read_text())["metrics"]
    assert again == pytest.approx(
        {k: v for k, v in record(run)["metrics"].items() if k.startswith("validation/")}, abs=1e-6
    )
    Path("pairs.tsv").write_text("question1\tquestion2\n" + "".join(f"{one}\t{two}\n" for one, two in PAIRS))
    assert command("predict", f"run={run}", "input=pairs.tsv", "output=out.parquet").code == 0
    assert pq.read_table("out.parquet")["score"].to_numpy() == pytest.approx(lora_bench.load(run).predict(PAIRS))
    assert command("export", f"run={run}", "format=peft", "output=peft").code == 0
    assert command("export", f"run={run}", "format=merged", "output=merged").code == 0
    assert json.loads(Path("merged/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_of_several_tasks_one_must_be_chosen(runs: Path, in_tmp: Path) -> None:
    for arguments in (["eval", "data=toy"], ["predict", "input=x"], ["export", "format=merged", "output=x"]):
        error = refused(*arguments, f"run={runs / 'shared'}")
        assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "run", runs / "shared")
        assert str(runs / "shared/tasks/middle") in str(error)
    error = refused("train", *toy_run(), f"adapter.init_from={runs / 'shared'}")
    assert (error.code, error.key) == (Code.UNSUPPORTED, "adapter.init_from")
    assert str(runs / "shared/tasks/middle") in str(error)


@pytest.mark.parametrize(("share", "step"), [("adapter", 11), ("backbone", 5)])
def test_it_goes_on_where_it_was_stopped(
    runs: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, share: str, step: int
) -> None:
    """With adapters of their own the smallest task is done by then."""
    arguments = ["--config-dir", str(runs / "conf"), *ASKED, THREE, f"data.share={share}", "hydra.run.dir=run"]
    with monkeypatch.context() as patch:
        at_step(patch, step, signalled(signal.SIGTERM))
        assert command("train", *arguments).code == 143
    assert record("run")["status"] == "interrupted"
    assert not Path("run/tasks").exists()
    answer = command("train", "resume=run")
    assert answer.code == 0, answer
    assert f"resumed from step {step}" in answer.out
    undisturbed = runs / {"adapter": "shared", "backbone": "own"}[share]
    assert record("run")["metrics"] == record(undisturbed)["metrics"]
    for task in ROWS:
        one, other = (
            load_file(top / "tasks" / task / "adapter/adapter_model.safetensors") for top in (Path("run"), undisturbed)
        )
        assert all(bool((one[name] == tensor).all()) for name, tensor in other.items())
        assert [(line["split"], line["step"], line["metrics"]) for line in lines(f"run/tasks/{task}")] == [
            (line["split"], line["step"], line["metrics"]) for line in lines(undisturbed / "tasks" / task)
        ]


def test_what_a_kill_left_of_its_folders_is_written_anew(
    runs: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(run: Any, learned: Any, sections: Any) -> None:
        report_tasks(run, dict(list(learned.items())[:2]), sections)
        raise KeyboardInterrupt

    arguments = ["--config-dir", str(runs / "conf"), *ASKED, THREE, "hydra.run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr("lora_bench.run.recorder.report_tasks", killed)
        assert command("train", *arguments).code == 130
    assert len(list(Path("run/tasks").iterdir())) == 2
    assert command("train", "resume=run").code == 0
    assert record("run")["metrics"] == record(runs / "shared")["metrics"]


def test_compare_has_a_row_for_each_task_beside_runs_of_it_alone(runs: Path) -> None:
    table = summarise([runs])
    rows_by_key = {(row.keys["data"], str(row.keys["data.tasks"]), row.keys["data.share"]): row for row in table.rows}
    three = str(list(ROWS))
    assert rows_by_key.keys() == {
        (task, *setting) for task in ROWS for setting in ((three, "adapter"), (three, "backbone"), ("None", "adapter"))
    }
    for task in ROWS:
        mcc = record(runs / "shared")["metrics"][f"validation/{task}/mcc"]
        assert rows_by_key[task, three, "adapter"].stats["mcc"].mean == mcc
        alike = {
            rows_by_key[task, *setting].data
            for setting in ((three, "adapter"), (three, "backbone"), ("None", "adapter"))
        }
        assert len(alike) == 1
        assert all(rows_by_key[key].finding is not None for key in rows_by_key)
    assert any("a row for each" in note for note in table.notes)
    text = page(table)
    assert "data.tasks" in text
    assert all(task in text for task in ROWS)


def test_an_adapter_goes_from_one_task_into_several_and_back(runs: Path, in_tmp: Path) -> None:
    conf = ["--config-dir", str(runs / "conf"), *ASKED, "trainer.max_steps=1"]
    arguments = [*conf, THREE, f"adapter.init_from={runs / 'alone/small'}", "hydra.run.dir=run"]
    answer = command("train", *arguments)
    assert answer.code == 0, answer
    assert "the head is not" in answer.out
    answer = command("train", *conf, "data=small", "adapter.init_from=run/tasks/small", "hydra.run.dir=again")
    assert answer.code == 0, answer
    assert "adapter and head are initialised from" in answer.out


def test_a_sweep_of_runs_of_several_tasks_is_packed(runs: Path, in_tmp: Path) -> None:
    conf = ["--config-dir", str(runs / "conf"), *ASKED]
    answer = command("train", "-m", *conf, THREE, "data.share=adapter,backbone", "seed=0,1", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer
    for number, share in enumerate(("shared", "own")):
        assert record(f"sweep/{2 * number}")["cost"]["pack_size"] == (2, 6)[number]
        for task in ROWS:
            packed = scores(f"sweep/{2 * number}/tasks/{task}")
            assert packed == pytest.approx(scores(runs / share / "tasks" / task), abs=1e-4)


def test_both_orders_and_objectives_are_of_each_task(runs: Path, in_tmp: Path) -> None:
    """The kept prefix, exchanged pairs and the likelihood's shift are of the task, and not of the first one."""
    arguments = ["trainer.max_steps=4", "adapter.layers=top:1", "trainer.score_both_orders=true"]
    arguments += ["trainer.objective=order_consistency"]
    arguments += ["data.task=qqp", "data.perturb=[order]"]
    several = train(runs, f"{in_tmp}/own", "data.tasks=[small,large]", "data.share=backbone", *arguments)
    for task in ("small", "large"):
        single = train(runs, f"{in_tmp}/{task}", f"data={task}", *arguments)
        assert scores(several / "tasks" / task) == pytest.approx(scores(single), abs=1e-4)
        metrics = record(several / "tasks" / task)["metrics"]
        assert metrics == pytest.approx(record(single)["metrics"], abs=1e-3)
        assert metrics["validation/perturbed/order_consistency"] == 1
    shared = train(runs, f"{in_tmp}/shared", "data.tasks=[small,large]", *arguments, "trainer.objective=cross_entropy")
    for task in ("small", "large"):
        again = lora_bench.load(shared / "tasks" / task).score(generate(16, list(ROWS).index(task), "validation"))
        assert again == pytest.approx(scores(shared / "tasks" / task), abs=1e-6)


def test_order_consistency_and_a_target_with_a_shared_adapter(runs: Path, in_tmp: Path) -> None:
    arguments = [THREE, "trainer.objective=order_consistency", "trainer.stop_at=0.05"]
    run_record = record(train(runs, f"{in_tmp}/run", *arguments))
    means = {line["step"]: line["metrics"]["mcc"] for line in lines("run") if line["split"] == "selection"}
    steps = sorted(means)
    ends = [steps[i + 2] for i in range(len(steps) - 2) if min(means[step] for step in steps[i : i + 3]) >= 0.05]
    assert run_record["cost"]["steps"] == (ends[0] if ends else 18)


def test_t5_reads_each_task_under_its_name_and_answers_with_the_words_of_its_classes(runs: Path, in_tmp: Path) -> None:
    arguments = ["--config-dir", str(runs / "conf"), *ASKED[1:], "model=tiny_t5", "trainer.max_steps=2"]
    assert command("train", *arguments, THREE, "hydra.run.dir=words").code == 0
    for task in ROWS:
        words = lora_bench.load(f"words/tasks/{task}")
        assert words.score(generate(16, 2, "validation")).shape == (16,)
    assert lora_bench.load("words/tasks/middle").score(generate(16, 1, "validation")) == pytest.approx(
        scores("words/tasks/middle"), abs=1e-6
    )
    assert command("train", *arguments, THREE, "model.form=encoder", "hydra.run.dir=heads").code == 0
    run = lora_bench.load("heads/tasks/large")
    texts, _ = run.pack.backbone.render([("question1", ["a"]), ("question2", ["b"])])
    assert texts == ["large question1: a question2: b"]
    assert run.score(generate(16, 2, "validation")) == pytest.approx(scores("heads/tasks/large"), abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected", "named"),
    [
        (["data.tasks=[small]"], (Code.INVALID_VALUE, "data.tasks", ["small"]), ""),
        (["data.tasks=[]"], (Code.INVALID_VALUE, "data.tasks", []), ""),
        (["data.tasks=[small,large,small]"], (Code.INVALID_VALUE, "data.tasks", ["small", "large", "small"]), ""),
        (["data.tasks=[small,smal]"], (Code.UNKNOWN_CHOICE, "data", "smal"), "Did you mean small?"),
        (["data.tasks=small"], (Code.INVALID_VALUE, "data.tasks", "small"), ""),
        (["data.tasks=[small,'../x']"], (Code.INVALID_VALUE, "data.tasks", ["small", "../x"]), "'../x' is"),
        ([THREE, "head.pair_features=true"], (Code.CONFLICT, "head.pair_features", "true"), "data.share=backbone"),
        ([THREE, "head.pair_features=null"], (Code.CONFLICT, "head.pair_features", "null"), "data.share=backbone"),
        ([THREE, "ensemble.members=3"], (Code.CONFLICT, "ensemble.members", 3), "data.tasks"),
        (
            [THREE, "data.share=backbone", "adapter=full"],
            (Code.UNSUPPORTED, "data.share", "backbone"),
            "data.share=adapter",
        ),
        ([THREE, "data.share=backbone", "data.temperature=2"], (Code.CONFLICT, "data.temperature", 2.0), ""),
        ([THREE, "data.share=backbone", "pack.halving=true"], (Code.CONFLICT, "pack.halving", "true"), ""),
        ([THREE, "data.share=both"], (Code.UNKNOWN_CHOICE, "data.share", "both"), "adapter, backbone"),
        ([THREE, "data.temperature=0.5"], (Code.INVALID_VALUE, "data.temperature", 0.5), ""),
        ([THREE, "data.train_size=100"], (Code.INVALID_VALUE, "data.train_size", 100), "43 rows"),
        ([THREE, "data.train_rowz=100"], (Code.UNKNOWN_KEY, "data.train_rowz", None), ""),
        ([THREE, "dry_run=true"], (Code.UNSUPPORTED, "dry_run", "true"), ""),
        (["data=small", "data.share=backbone"], (Code.CONFLICT, "data.share", "backbone"), "data.tasks"),
        (["data=small", "data.temperature=3"], (Code.CONFLICT, "data.temperature", 3.0), "data.tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_learned_together_is_refused(
    runs: Path, in_tmp: Path, overrides: list[str], expected: tuple[Code, str, object], named: str
) -> None:
    error = refused("train", "--config-dir", str(runs / "conf"), *ASKED, *overrides)
    assert (error.code, error.key, error.value) == expected
    assert named in str(error)
