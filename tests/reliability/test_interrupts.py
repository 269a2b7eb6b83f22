"""A run that was interrupted goes on and ends as if nothing had happened; what would change it is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from lora_bench import train as story
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.run import packed_run
from lora_bench.run.final_evaluation import TrainedTask
from lora_bench.training import precision
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.cuda_graphs import Backward
from tests import command_line, forked
from tests.adapters.tools import assert_close
from tests.command_line import files_below, lora_bench, refused, signalled, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable

ASKED = toy_run("trainer.max_steps=14", "trainer.eval_every=5", "trainer.checkpoint_every=3", "data.train_rows=80")


def record(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "run.json").read_text())  # type: ignore[no-any-return]


def lines(folder: str | Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in entries]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    assert lines(one) == lines(other)
    for key in ("status", "metrics", "selection", "params", "targets", "data"):
        assert record(one)[key] == record(other)[key], key
    for cost in ("steps", "train_flops", "pack_size"):
        assert record(one)["cost"][cost] == record(other)["cost"][cost], cost
    tensors, expected = (load_file(*Path(folder, "adapter").glob("*model.safetensors")) for folder in (one, other))
    assert_close(tensors, expected, atol=0)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something when the record hears of a step."""
    return partial(command_line.at_step, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert lora_bench("train", *ASKED, f"hydra.run.dir={folder}").code == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `finished`, interrupted after step 7; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        command_line.at_step(patch, 7, signalled(signal.SIGTERM))
        assert lora_bench("train", *ASKED, f"hydra.run.dir={folder}").code == 143
    return folder


@pytest.fixture
def interrupted(in_tmp: Path, stopped: Path) -> Path:
    """A copy of it to go on with."""
    return Path(shutil.copytree(stopped, in_tmp / "run"))


def stopped_and_gone_on(at_step: Any, method: str, number: int) -> int:
    """The exit code of a run that got a signal in step 7 and then went on as if nothing had happened."""
    arguments = [*ASKED, *f"adapter={method}".split(), *([] if method == "full" else ["adapter.dropout=0.2"])]
    assert lora_bench("train", *arguments, "hydra.run.dir=whole").code == 0
    at_step(7, signalled(number))
    answer = lora_bench("train", *arguments, "hydra.run.dir=run")
    assert record("run")["status"] == "interrupted"
    assert "lora-bench train resume=" in answer.err
    assert [p.name for p in Path("run/checkpoints").iterdir() if p.name == "step-00000007"]
    at_step(0, lambda: None)
    gone_on = lora_bench("train", "resume=run")
    assert gone_on.code == 0, gone_on.err
    assert "resumed from step 7" in gone_on.out
    assert_same_run("run", "whole")
    assert not Path("run/checkpoints").exists()
    assert not Path("outputs").exists()
    return answer.code


@pytest.mark.reliability(21)
@pytest.mark.parametrize("method", ["lora", "lora adapter.layers=top:1", "full"])
def test_21_sigterm_stops_at_the_steps_end_and_the_run_goes_on(method: str, in_tmp: Path, at_step: Any) -> None:
    assert stopped_and_gone_on(at_step, method, signal.SIGTERM) == 143


@pytest.mark.reliability(21)
def test_21_a_hangup_is_handled_like_sigterm(in_tmp: Path, at_step: Any) -> None:
    assert stopped_and_gone_on(at_step, "lora", signal.SIGHUP) == 129


@pytest.mark.reliability(21)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_21_what_the_process_was_started_to_ignore_is_ignored(in_tmp: Path, at_step: Any, number: int) -> None:
    at_step(7, signalled(number))
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does, or a shell to what it runs in the background
    try:
        assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 0
    finally:
        signal.signal(number, before)


def before_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Do something before the first call of a function."""
    original, first = getattr(owner, name), iter([action])

    def call(*arguments: Any, **keywords: Any) -> Any:
        next(first, lambda: None)()
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.reliability(21)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_21_a_run_stopped_while_it_is_scored_is_only_scored_when_resumed(
    in_tmp: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before_call(monkeypatch, TrainedTask, "report", signalled(number))
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 128 + number
    assert record("run")["status"] == "interrupted"
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer.err
    assert f"resumed from step {record(finished)['cost']['steps']}" in answer.out
    assert_same_run("run", finished)


@pytest.mark.reliability(21)
def test_21_so_is_one_that_stopped_early(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        *ASKED,
        "trainer.eval_every=2",
        "trainer.early_stopping_patience=1",
        "optimizer.lr=1e-9",
        "trainer.checkpoint_every=7",
    ]
    assert lora_bench("train", *arguments, "hydra.run.dir=whole").code == 0
    assert record("whole")["cost"]["steps"] == 4
    before_call(monkeypatch, TrainedTask, "report", signalled(signal.SIGTERM))
    assert lora_bench("train", *arguments, "hydra.run.dir=run").code == 143
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer.err
    assert "resumed from step 4" in answer.out
    assert_same_run("run", "whole")


@pytest.mark.reliability(21)
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, (story.SharedInputs, "load")),
        (signal.SIGTERM, (packed_run, "prepare")),
        (signal.SIGHUP, (story.SharedInputs, "load")),
    ],
    ids=["SIGINT, loading", "SIGTERM, start", "SIGHUP, loading"],
)
def test_21_a_run_stopped_before_its_first_step_leaves_nothing(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, moment: Any, number: int
) -> None:
    before_call(monkeypatch, *moment, signalled(number))
    assert lora_bench("train", *ASKED, "adapter=pissa", "hydra.run.dir=new/run").code == 128 + number
    assert not list(in_tmp.iterdir())


@pytest.mark.reliability(21)
def test_21_a_sweep_stopped_before_its_first_step_has_no_jobs(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_call(monkeypatch, packed_run, "prepare", signalled(signal.SIGTERM))
    assert lora_bench("train", "-m", *ASKED, "seed=0,1", "hydra.sweep.dir=sweep").code == 143
    assert {path.name for path in Path("sweep").iterdir()} == {"sweep.json", ".lock"}


@pytest.mark.reliability(21)
def test_21_a_run_stopped_while_its_folder_is_claimed_is_interrupted(
    in_tmp: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_call(monkeypatch, Run, "update", signalled(signal.SIGTERM))
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 143
    assert record("run")["status"] == "interrupted"
    assert lora_bench("train", "resume=run").code == 0
    assert_same_run("run", finished)


@pytest.mark.reliability(22)
@pytest.mark.parametrize("method", ["adalora", "enhanced adapter.allocation=gradient"])
def test_22_ctrl_c_stops_at_the_steps_end_and_the_run_goes_on(method: str, in_tmp: Path, at_step: Any) -> None:
    assert stopped_and_gone_on(at_step, method, signal.SIGINT) == 130


@pytest.mark.reliability(22)
def test_22_a_second_ctrl_c_ends_at_once(in_tmp: Path, at_step: Any) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(7, twice)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 130
    assert record("run")["status"] == "interrupted"
    assert not Path("run/checkpoints/step-00000007").exists()
    assert Path("run/checkpoints/step-00000006").exists()


@pytest.mark.reliability(23)
def test_23_a_run_killed_at_a_random_step_ends_as_the_undisturbed_one(in_tmp: Path) -> None:
    arguments = [*ASKED, "trainer.max_steps=60", "trainer.epochs=100", "adapter.dropout=0.1"]
    process = forked.command("train", *arguments, "hydra.run.dir=run")
    deadline = time.monotonic() + 120
    while not list(Path("run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert record("run")["status"] == "running"
    assert lora_bench("train", "resume=run").code == 0
    assert lora_bench("train", *arguments, "hydra.run.dir=whole").code == 0
    assert_same_run("run", "whole")


def write_checkpoints(root: str) -> None:
    """Print how many checkpoints each of 20 processes has written that were killed as they wrote one after another."""
    tensors = {str(i): torch.randn(64, 64) for i in range(8)}
    for number in range(20):
        folder = Path(root, str(number))
        folder.mkdir()
        reading, writing = os.pipe()
        writer = os.fork()
        if not writer:
            for step in range(1, 100_000):
                Checkpoints(folder / "checkpoints").save(step, tensors, {})
                os.write(writing, b".")
        os.read(reading, 1)
        time.sleep(random.random() * 0.03)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.close(writing)
        written = 1 + len(os.read(reading, 65536) if os.set_blocking(reading, False) is None else b"")
        print(written, flush=True)


@pytest.mark.reliability(24)
def test_24_a_kill_inside_a_checkpoints_writing_leaves_the_one_before(in_tmp: Path) -> None:
    """A process that does nothing but write checkpoints, killed at 20 random moments."""
    done = forked.Forked(write_checkpoints, str(in_tmp))
    assert done.wait() == 0, done.err
    written = [int(line) for line in done.out.splitlines()]
    assert len(written) == 20
    half_written = 0
    for number, steps in enumerate(written):
        checkpoints = Checkpoints(in_tmp / str(number) / "checkpoints")
        run_record = checkpoints.newest()
        assert run_record is not None
        assert checkpoints.damaged == []
        assert run_record.step in (steps, steps + 1)  # renamed into its place, and killed before it could say so
        half_written += any(checkpoints.folder.glob(".*.part"))
    assert half_written


@pytest.mark.reliability(24)
def test_24_the_run_goes_on_beside_a_half_written_checkpoint(interrupted: Path, finished: Path) -> None:
    unfinished = interrupted / "checkpoints" / ".step-00000009.part"
    unfinished.mkdir()
    (unfinished / "tensors.safetensors").write_bytes(b"half")
    answer = lora_bench("train", f"resume={interrupted}")
    assert answer.code == 0, answer
    assert "resumed from step 7" in answer.out
    assert_same_run(interrupted, finished)


@pytest.mark.reliability(25)
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_25_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    interrupted: Path, finished: Path, damage: str
) -> None:
    newest = interrupted / "checkpoints" / "step-00000007" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"empty": b"", "truncated": content[:-1], "flipped": content}[damage])
    answer = lora_bench("train", f"resume={interrupted}")
    assert answer.code == 0, answer
    assert re.search("^note: .*step-00000007", answer.out, re.MULTILINE)
    assert "resumed from step 6" in answer.out
    assert_same_run(interrupted, finished)


@pytest.mark.reliability(26)
@pytest.mark.usefixtures("interrupted")
def test_26_another_config_is_refused_with_the_difference() -> None:
    error = refused("train", "resume=run", "trainer.max_steps=20")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "trainer.max_steps", "20")
    assert " 14." in str(error)
    error = refused("train", "resume=run", "adapter=dora")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "adapter", "dora")
    assert " lora." in str(error)
    error = refused("train", "resume=nowhere")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "resume", "nowhere")
    assert lora_bench("train", *ASKED, "resume=run").code == 0  # the same again is no difference


@pytest.mark.reliability(26)
@pytest.mark.parametrize("changed", ["data", "backbone"])
def test_26_other_data_or_another_backbone_are_refused(interrupted: Path, changed: str) -> None:
    run_record = record(interrupted)
    if changed == "data":
        run_record["data"]["fingerprint"]["train"] = "0" * 64
    else:
        run_record["environment"]["backbone_sha256"] = "0" * 64
    (interrupted / "run.json").write_text(json.dumps(run_record))
    error = refused("train", f"resume={interrupted}")
    assert (error.code, error.key) == (Code.MISMATCH, "resume")
    assert ("train split" if changed == "data" else "backbone") in str(error)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    run_record = record(folder)
    edit(run_record)
    (folder / "run.json").write_text(json.dumps(run_record))


@pytest.mark.reliability(26)
def test_26_a_record_edited_by_hand_is_refused_with_the_difference(interrupted: Path) -> None:
    edited(interrupted, lambda run_record: run_record["config"]["optimizer"].update(lr=0.5))
    error = refused("train", f"resume={interrupted}")
    assert (error.code, error.file) == (Code.DAMAGED, interrupted / "run.json")
    assert re.search(r"\boptimizer\.lr\b.* 0\.0005 .* 0\.5\b", str(error))
    edited(interrupted, lambda run_record: run_record["config"]["optimizer"].update(lr=0.0005))
    edited(interrupted, lambda run_record: run_record["config"]["trainer"].pop("max_steps"))
    error = refused("train", f"resume={interrupted}")
    assert (error.code, error.file) == (Code.DAMAGED, interrupted / "run.json")
    assert re.search(r"\btrainer\.max_steps\b.* 14 .* None\b", str(error))


@pytest.mark.reliability(26)
def test_26_a_checkpoint_of_before_configs_were_kept_is_used(interrupted: Path, finished: Path) -> None:
    for folder in (interrupted / "checkpoints").iterdir():
        facts = json.loads((folder / "state.json").read_text())
        assert facts.pop("config") == record(interrupted)["config"]
        (folder / "state.json").write_text(json.dumps(facts))
        manifest = json.loads((folder / "manifest.json").read_text())
        content = (folder / "state.json").read_bytes()
        manifest["state.json"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = lora_bench("train", f"resume={interrupted}")
    assert answer.code == 0, answer.err
    assert "resumed from step 7" in answer.out
    assert_same_run(interrupted, finished)


@pytest.mark.reliability(26)
def test_26_another_precision_is_refused_before_anything_is_loaded(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story.SharedInputs, "load", lambda *_: pytest.fail("it was loaded"))
    edited(interrupted, lambda run_record: run_record["environment"].update(precision="bfloat16", device="cuda"))
    error = refused("train", f"resume={interrupted}")
    assert (error.code, error.key, error.value) == (Code.MISMATCH, "resume", interrupted)
    assert re.search(r"\bbfloat16\b.* cuda\b.* trainer\.precision=fp32 .*\bfloat32\b.* cpu\b", str(error))


@pytest.mark.reliability(26)
def test_26_a_run_goes_on_in_its_precision_where_auto_is_another(
    in_tmp: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*ASKED, "trainer.precision=auto"]
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: True)
    assert lora_bench("train", *arguments, "hydra.run.dir=whole").code == 0
    at_step(7, signalled(signal.SIGTERM))
    assert lora_bench("train", *arguments, "hydra.run.dir=run").code == 143
    at_step(0, lambda: None)
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer.err
    assert record("run")["environment"]["precision"] == record("whole")["environment"]["precision"] == "bfloat16"
    assert record("run")["config"]["trainer"]["precision"] == "auto"
    assert_same_run("run", "whole")


@pytest.mark.reliability(26)
def test_26_steps_of_another_environment_stay_on_record(interrupted: Path, finished: Path) -> None:
    edited(interrupted, lambda environment: environment["environment"]["versions"].update(torch="1.0"))
    edited(interrupted, lambda environment: environment["environment"].update(device="cuda:3"))
    answer = lora_bench("train", f"resume={interrupted}")
    assert answer.code == 0, answer.err
    now = record(finished)["environment"]
    assert f"torch {now['versions']['torch']} (before: 1.0), device cpu (before: cuda:3)" in answer.out
    environment = record(interrupted)["environment"]
    (earlier,) = environment.pop("history")
    assert environment == now
    assert (earlier["first_step"], earlier["last_step"]) == (1, 7)
    assert (earlier["versions"]["torch"], earlier["device"]) == ("1.0", "cuda:3")
    assert "resumed in another environment" in lora_bench("compare", str(interrupted)).out
    assert_same_run(interrupted, finished)


@pytest.mark.reliability(27)
def test_27_a_finished_run_has_nothing_to_go_on_with(in_tmp: Path, finished: Path) -> None:
    before = files_below(finished)
    answer = lora_bench("train", f"resume={finished}")
    assert answer.code == 0
    assert f"{finished} is done" in answer.out
    assert files_below(finished) == before


@pytest.mark.reliability(27)
def test_27_a_run_killed_after_its_end_loses_what_nobody_needs(
    in_tmp: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear", signalled(signal.SIGINT))
        assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 130
    assert record("run")["status"] == "done"
    assert Path("run/checkpoints").exists()
    assert "run is done" in lora_bench("train", "resume=run").out
    assert not Path("run/checkpoints").exists()
    assert_same_run("run", finished)


@pytest.mark.reliability(28)
@pytest.mark.parametrize("step", [6, 7], ids=["at an epoch's end", "in mid-epoch"])
def test_28_the_same_batches_follow(in_tmp: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Three steps are an epoch here; pairs are shuffled and dropout draws."""
    seen: list[str] = []
    backward = Backward.__call__

    def noting(self: Backward, batch: Any, *rest: Any, **options: Any) -> Any:
        seen.append(sha256(batch.input_ids.numpy().tobytes()).hexdigest())
        return backward(self, batch, *rest, **options)

    monkeypatch.setattr(Backward, "__call__", noting)
    arguments = [*ASKED, "adapter.dropout=0.5"]
    assert lora_bench("train", *arguments, "hydra.run.dir=whole").code == 0
    whole = seen.copy()
    assert lines("whole")[0]["epoch"] == pytest.approx(5 / 3, abs=1e-4)
    assert len(set(whole[:6])) == 6  # the second epoch brings other batches
    seen.clear()
    at_step(step, signalled(signal.SIGTERM))
    assert lora_bench("train", *arguments, "hydra.run.dir=run").code == 143
    assert seen == whole[:step]
    at_step(0, lambda: None)
    assert lora_bench("train", "resume=run").code == 0
    assert seen == whole
    assert_same_run("run", "whole")


def test_the_last_unfinished_run_is_found(in_tmp: Path, at_step: Any) -> None:
    at_step(4, signalled(signal.SIGTERM))
    assert lora_bench("train", *ASKED).code == 143
    at_step(0, lambda: None)
    assert lora_bench("train", "resume=last").code == 0
    (folder,) = (path.parent for path in Path("outputs").rglob("run.json"))
    assert record(folder)["status"] == "done"
    error = refused("train", "resume=last")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "resume", "last")


def test_without_a_checkpoint_it_begins_anew(in_tmp: Path, at_step: Any, finished: Path) -> None:
    at_step(2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 130
    at_step(0, lambda: None)
    assert not Path("run/checkpoints").exists()
    assert lora_bench("train", "resume=run").code == 0
    assert_same_run("run", finished)


def test_a_line_of_the_log_that_a_full_disk_cut_off_is_dropped(interrupted: Path, finished: Path) -> None:
    log = interrupted / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + whole[: whole.index("}") + 1])  # ends in a brace, and is no line
    assert lora_bench("train", f"resume={interrupted}").code == 0
    assert_same_run(interrupted, finished)
