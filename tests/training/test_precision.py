"""The requested precision is the one of the products; one that the device lacks is refused before anything is built."""

from __future__ import annotations

import pytest
import torch

from lora_bench.errors import Code
from lora_bench.training import precision
from lora_bench.training.precision import continued_precision, has_fast_bf16, resolve_device, resolve_precision
from tests.command_line import refuses

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def given(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: bool = False,
    bf16: bool = False,
    cpu: tuple[str, ...] = (),
    speed: float = 2.0,
) -> None:
    """A machine with or without these abilities."""
    monkeypatch.setattr(precision, "cpu_bf16_speed", lambda: speed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True), raising=False)


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cuda=True)
    assert resolve_device("auto") == CUDA
    assert resolve_device("cpu") == CPU
    given(monkeypatch, cuda=False)
    assert resolve_device("auto") == CPU


def test_absent_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cuda=False)
    with refuses(Code.NO_DEVICE, key="trainer.device") as caught:
        resolve_device("cuda")
    assert caught.value.value == "cuda"
    assert "trainer.device=auto" in str(caught.value)


def test_each_of_several_processes_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with refuses(Code.MISSING, key="LOCAL_RANK"):
        resolve_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with refuses(Code.NO_DEVICE, key="LOCAL_RANK") as caught:
        resolve_device("cuda")
    assert caught.value.value == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert resolve_device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_is_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    given(monkeypatch, bf16=True, cpu=("avx512_bf16",))
    assert resolve_precision("auto", device) == torch.bfloat16
    assert resolve_precision("fp32", device) == torch.float32
    given(monkeypatch, bf16=False, cpu=("avx2", "avx512f"))
    assert resolve_precision("auto", device) == torch.float32
    assert not has_fast_bf16(device)


def test_bf16_by_name_is_slow_but_possible_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    assert resolve_precision("bf16", CPU) == torch.bfloat16


def test_bf16_by_name_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cuda=True, bf16=False)
    with refuses(Code.NO_DEVICE, key="trainer.precision") as caught:
        resolve_precision("bf16", CUDA)
    assert caught.value.value == "bf16"
    assert "trainer.precision=fp32" in str(caught.value)


def test_amx_counts_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cpu=("amx_bf16", "avx512_bf16"), speed=0.0)
    assert has_fast_bf16(CPU)


@pytest.mark.parametrize("instructions", ["avx512_bf16", "bf16"])
def test_a_cpu_whose_bf16_instructions_are_slower_than_fp32_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    given(monkeypatch, cpu=(instructions,), speed=0.6)
    assert resolve_precision("auto", CPU) == torch.float32
    given(monkeypatch, cpu=(instructions,), speed=2.3)
    assert resolve_precision("auto", CPU) == torch.bfloat16


def test_the_speed_of_bf16_is_measured_once() -> None:
    precision.cpu_bf16_speed.cache_clear()
    speed = precision.cpu_bf16_speed()
    assert speed > 0
    assert precision.cpu_bf16_speed() == speed


@pytest.mark.parametrize(
    ("precision", "before", "speed", "expected"),
    [
        ("auto", "bfloat16", 0.6, "bf16"),
        ("auto", "float32", 2.0, "fp32"),
        ("auto", "bfloat16", 2.0, "auto"),
        ("auto", "float32", 0.6, "auto"),
        ("auto", None, 0.6, "auto"),
        ("fp32", "bfloat16", 2.0, "fp32"),
    ],
)
def test_a_resumed_run_keeps_the_precision_that_auto_was(
    monkeypatch: pytest.MonkeyPatch, precision: str, before: str | None, speed: float, expected: str
) -> None:
    given(monkeypatch, cpu=("avx512_bf16",), speed=speed)
    assert continued_precision(precision, before, CPU) == expected


def test_a_gpu_without_bf16_cannot_continue_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, cuda=True, bf16=False)
    assert continued_precision("auto", "bfloat16", CUDA) == "auto"


def test_this_machine_answers() -> None:
    assert isinstance(has_fast_bf16(CPU), bool)
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
