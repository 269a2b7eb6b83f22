"""A reader that goes away, a full disk behind the screen and closed streams end no command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.command_line import toy_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs the shell of a Unix")
COMMAND = f"{sys.executable} -m lora_bench"


def shell(command: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=240, env=environment)


def unread(*arguments: str) -> int:
    """Run a command whose output nobody reads, and whose errors go onto a full disk."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    return forked.run_command(*arguments)


def without_streams(*arguments: str) -> int:
    """Run a command as Python starts it where the standard streams are closed."""
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    return forked.run_command(*arguments)


def test_a_training_goes_on_when_nobody_reads_it_any_more(in_tmp: Path) -> None:
    """Its output goes into a pipe whose reader ends at once, its errors onto a full disk."""
    overrides = toy_run("trainer.max_steps=6", "trainer.eval_every=2", "hydra.run.dir=run")
    assert forked.Forked(unread, "train", *overrides).wait() == 0
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"


def test_streams_that_are_closed_are_nobody_s(in_tmp: Path) -> None:
    assert forked.Forked(without_streams, "train", *toy_run("hydra.run.dir=run")).wait() == 0
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"


def test_a_stream_that_a_script_opened_keeps_its_own_file(in_tmp: Path) -> None:
    """Nothing else holds the script's file object: with it the descriptor would be closed, and taken by a result."""
    script = """import sys
from lora_bench.console import streams
sys.stdout = open("printed", "w")
streams.protect()
with open("result", "w"):
    print("ours", flush=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert (Path("printed").read_text(), Path("result").read_text()) == ("ours\n", "")


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("--help", ""), ("--help", "1"), ("train --cfg job", ""), ("compare .", "1")]
)
def test_what_is_only_printed_must_be_printed(in_tmp: Path, command: str, unbuffered: str) -> None:
    Path("run").mkdir()
    if command == "compare .":
        Path("run/run.json").write_text(json.dumps({"schema": 1, "status": "failed", "config": {"seed": 1}}))
    assert shell(f"({COMMAND} {command}; echo $? >code) | true", unbuffered).stderr == ""
    assert Path("code").read_text() == "0\n"
    full = shell(f"{COMMAND} {command} >/dev/full", unbuffered)
    assert full.stderr.startswith("lora-bench: ")
    assert full.stderr.endswith("No space left on device\n")
    assert full.stderr.count("\n") == 1
    assert full.returncode == (0 if command.startswith("train") else 1)
