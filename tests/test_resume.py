"""A run that was interrupted goes on and ends as if nothing had happened; what would change it is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from lora_bench.recording import Recorder
from tests.adapters.tools import assert_close
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable

ASKED = toy_run("trainer.max_steps=14", "trainer.eval_every=5", "trainer.checkpoint_every=3", "data.train_rows=80")


def record(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "run.json").read_text())  # type: ignore[no-any-return]


def lines(folder: str | Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in found]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    assert lines(one) == lines(other)
    for key in ("status", "metrics", "selection", "params", "targets", "data"):
        assert record(one)[key] == record(other)[key], key
    for cost in ("steps", "train_flops", "pack_size"):
        assert record(one)["cost"][cost] == record(other)["cost"][cost], cost
    found, expected = (load_file(*Path(folder, "adapter").glob("*model.safetensors")) for folder in (one, other))
    assert_close(found, expected, atol=0)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Does something when the display hears of a step."""

    told = Recorder.stepped

    def plan(step: int, action: Callable[[], None]) -> None:
        def stepped(self: Recorder, number: int, losses: Any, pairs: int) -> None:
            told(self, number, losses, pairs)
            if number == step:
                action()

        monkeypatch.setattr(Recorder, "stepped", stepped)

    return plan


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("method", ["lora", "adalora", "enhanced", "full"])
def test_a_signal_stops_at_the_steps_end_and_the_run_goes_on(
    method: str, number: int, code: int, in_tmp: Path, at_step: Any
) -> None:
    asked = [*ASKED, f"adapter={method}", *([] if method == "full" else ["adapter.dropout=0.2"])]
    assert lora_bench("train", *asked, "hydra.run.dir=whole").code == 0
    at_step(7, lambda: os.kill(os.getpid(), number))
    stopped = lora_bench("train", *asked, "hydra.run.dir=run")
    assert stopped.code == code
    assert record("run")["status"] == "interrupted"
    assert "lora-bench train resume=" in stopped.out
    assert [p.name for p in Path("run/checkpoints").iterdir() if p.name == "step-00000007"]
    at_step(0, lambda: None)
    gone_on = lora_bench("train", "resume=run")
    assert gone_on.code == 0, gone_on.err
    assert "going on from step 7" in gone_on.out
    assert_same_run("run", "whole")
    assert not Path("run/checkpoints").exists()
    assert not Path("outputs").exists()


def test_a_second_ctrl_c_ends_at_once(in_tmp: Path, at_step: Any) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(7, twice)
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 130
    assert record("run")["status"] == "interrupted"
    assert not Path("run/checkpoints/step-00000007").exists()
    assert Path("run/checkpoints/step-00000006").exists()


def test_a_killed_run_goes_on(in_tmp: Path) -> None:
    command = [sys.executable, "-m", "lora_bench", "train", *ASKED, "trainer.max_steps=400", "hydra.run.dir=run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path("run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert record("run")["status"] == "running"
    assert lora_bench("train", "resume=run").code == 0
    assert lora_bench("train", *ASKED, "trainer.max_steps=400", "hydra.run.dir=whole").code == 0
    assert_same_run("run", "whole")


def test_the_last_unfinished_run_is_found(in_tmp: Path, at_step: Any) -> None:
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert lora_bench("train", *ASKED).code == 143
    at_step(0, lambda: None)
    assert lora_bench("train", "resume=last").code == 0
    (folder,) = (path.parent for path in Path("outputs").rglob("run.json"))
    assert record(folder)["status"] == "done"
    assert "no unfinished run" in refused("train", "resume=last")


def test_a_finished_run_has_nothing_to_go_on_with(in_tmp: Path) -> None:
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 0
    before = record("run")
    answer = lora_bench("train", "resume=run")
    assert (answer.code, record("run")) == (0, before)
    assert "run is done" in answer.out


def test_without_a_checkpoint_it_begins_anew(in_tmp: Path, at_step: Any) -> None:
    at_step(2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))  # type: ignore[arg-type]
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 130
    at_step(0, lambda: None)
    assert not Path("run/checkpoints").exists()
    assert lora_bench("train", "resume=run").code == 0
    assert lora_bench("train", *ASKED, "hydra.run.dir=whole").code == 0
    assert_same_run("run", "whole")


@pytest.fixture
def interrupted(in_tmp: Path, at_step: Any) -> Path:
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert lora_bench("train", *ASKED, "hydra.run.dir=run").code == 143
    at_step(0, lambda: None)
    return in_tmp / "run"


@pytest.mark.usefixtures("interrupted")
def test_another_config_is_refused_with_the_difference() -> None:
    assert "trainer.max_steps=20: the run began with 14" in refused("train", "resume=run", "trainer.max_steps=20")
    assert "adapter=dora: the run began with lora" in refused("train", "resume=run", "adapter=dora")
    assert "nowhere/run.json: is missing" in refused("train", "resume=nowhere")
    assert lora_bench("train", *ASKED, "resume=run").code == 0  # the same again is no difference


def test_other_data_are_refused(interrupted: Path) -> None:
    found = record(interrupted)
    found["data"]["fingerprint"]["train"] = "0" * 64
    (interrupted / "run.json").write_text(json.dumps(found))
    assert "resume: the train split is not the one that the run began with" in refused("train", f"resume={interrupted}")


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(interrupted: Path) -> None:
    newest = interrupted / "checkpoints" / "step-00000007" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    answer = lora_bench("train", f"resume={interrupted}")
    assert answer.code == 0
    assert "passed over a damaged checkpoint, step-00000007" in answer.out
    assert "going on from step 6" in answer.out
