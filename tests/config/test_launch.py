"""Distributed launch: RANK is read only with WORLD_SIZE above 1, and invalid variables are refused."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from lora_bench.config.launch import Launch
from lora_bench.errors import Code
from lora_bench.training import distributed
from tests.command_line import lora_bench, refused, refuses, toy_run

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_variables(environment: pytest.MonkeyPatch, text: str) -> None:
    for pair in text.split():
        environment.setenv(*pair.split("=", 1))


@pytest.mark.parametrize("text", ["", "RANK=1", "RANK=3 LOCAL_RANK=3 WORLD_SIZE=1", "SLURM_PROCID=x SLURM_NTASKS=4"])
def test_rank_is_ignored_in_a_single_process(environment: pytest.MonkeyPatch, text: str) -> None:
    set_variables(environment, text)
    assert Launch.read() == Launch()


def test_variables_of_torchrun_are_read(environment: pytest.MonkeyPatch) -> None:
    set_variables(environment, "WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 MASTER_ADDR=host MASTER_PORT=29500")
    assert Launch.read() == Launch(3, 4, 1, "host", 29500)


INVALID = ["RANK=node1", "RANK=", "RANK=-1", "RANK=1.0", "LOCAL_RANK=x", "LOCAL_RANK=", "RANK=" + "9" * 400]
INVALID += [f"WORLD_SIZE={value}" for value in ("", "two", "0", "-2", "1e3", "9" * 5000)]
INVALID_WITH_OTHERS = ["RANK=2", "RANK=-1", "RANK=", "LOCAL_RANK=2", "LOCAL_RANK=-1", "MASTER_PORT=", "MASTER_PORT=0"]
INVALID_WITH_OTHERS += ["MASTER_PORT=65536", "MASTER_PORT=http", "MASTER_ADDR="]


@pytest.mark.parametrize("text", [*INVALID, *(f"{variable} WORLD_SIZE=2" for variable in INVALID_WITH_OTHERS)])
def test_variables_out_of_range_are_refused(environment: pytest.MonkeyPatch, text: str) -> None:
    set_variables(environment, text)
    name = text.partition("=")[0]
    with refuses(Code.INVALID_VALUE, key=name) as caught:
        Launch.read()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variables_are_refused(environment: pytest.MonkeyPatch, missing: str) -> None:
    set_variables(environment, "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500")
    environment.delenv(missing)
    with refuses(Code.MISSING, key=missing) as caught:
        Launch.read().check()
    assert "WORLD_SIZE=2" in str(caught.value)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "export"])
def test_every_command_refuses_an_invalid_rank(environment: pytest.MonkeyPatch, in_tmp: Path, command: str) -> None:
    set_variables(environment, "RANK=node1")
    error = refused(command)
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "RANK", "node1")


def test_a_run_with_a_rank_but_no_world_size_is_trained(environment: pytest.MonkeyPatch, in_tmp: Path) -> None:
    set_variables(environment, "RANK=1 LOCAL_RANK=1")
    answer = lora_bench("train", *toy_run("hydra.run.dir=run"))
    assert answer.code == 0, answer
    assert "record: " in answer.out
    assert (in_tmp / "run/run.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_waiting_process_prints_a_notice_and_times_out(
    environment: pytest.MonkeyPatch, in_tmp: Path, rank: int
) -> None:
    environment.setattr(distributed, "JOIN_SECONDS", 1.0)
    environment.setattr(distributed, "NOTICE_SECONDS", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    set_variables(environment, f"WORLD_SIZE=2 RANK={rank} MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
    answer = lora_bench("train", *toy_run("hydra.run.dir=run"))
    assert answer.code == 2, answer
    notice, _ = answer.err.splitlines()
    for datum in (f"process {rank}", "2 processes", f"127.0.0.1:{port}", "1 of 2" if rank == 0 else "process 0"):
        assert datum in notice
    error = answer.error
    assert error is not None
    assert (error.code, error.key, error.value) == (Code.SERVER, "MASTER_ADDR:MASTER_PORT", f"127.0.0.1:{port}")
    assert "WORLD_SIZE=2" in str(error)
    assert not list(in_tmp.iterdir())


def test_a_port_in_use_is_refused(environment: pytest.MonkeyPatch, in_tmp: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        set_variables(environment, f"WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
        error = refused("train", *toy_run("hydra.run.dir=run"))
    assert (error.code, error.key, error.value) == (Code.SERVER, "MASTER_ADDR:MASTER_PORT", f"127.0.0.1:{port}")
    assert "address already in use" in str(error)
