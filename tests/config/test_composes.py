"""A run composes its configuration once and builds its settings once; a sweep composes its own and that of each job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from lora_bench.records.settings import Settings
from tests.command_line import lora_bench, toy_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def composes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of every configuration that Hydra composes, in order."""
    overrides_by_call: list[list[str]] = []
    load = ConfigLoaderImpl.load_configuration

    def record(loader: Any, config_name: Any, overrides: list[str], **settings: Any) -> Any:
        overrides_by_call.append(list(overrides))
        return load(loader, config_name, overrides, **settings)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", record)
    return overrides_by_call


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """All settings that are built from a config, in order."""
    settings: list[Settings] = []
    build = Settings.build

    def record(cfg: Any) -> Settings:
        settings.append(build(cfg))
        return settings[-1]

    monkeypatch.setattr(Settings, "build", record)
    return settings


def test_run_builds_its_settings_once(in_tmp: Path, builds: list[Settings]) -> None:
    assert lora_bench("train", *toy_run()).code == 0
    assert len(builds) == 1


def test_run_composes_once(in_tmp: Path, composes: list[list[str]]) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    assert len(composes) == 1


def test_printed_config_composes_once(in_tmp: Path, composes: list[list[str]]) -> None:
    answer = lora_bench("train", "--cfg", "job", *toy_run())
    assert (answer.code, "train_rows: 40" in answer.out) == (0, True)
    assert len(composes) == 1


@pytest.mark.parametrize("launcher", ["packed", "basic"])
def test_sweep_composes_once_and_once_per_job(in_tmp: Path, composes: list[list[str]], launcher: str) -> None:
    sweep = toy_run("seed=0,1,2", "hydra.sweep.dir=sweep", f"hydra/launcher={launcher}")
    assert lora_bench("train", "-m", *sweep).code == 0
    assert sorted(path.parent.name for path in in_tmp.glob("sweep/*/run.json")) == ["0", "1", "2"]
    assert len(composes) == 1 + 3


def test_resumed_run_composes_once(in_tmp: Path, composes: list[list[str]]) -> None:
    assert lora_bench("train", *toy_run("trainer.max_steps=2", "hydra.run.dir=run")).code == 0
    composes.clear()
    assert lora_bench("train", "resume=run").code == 0
    assert len(composes) == 1


def test_resumed_sweep_composes_once_and_once_per_job(in_tmp: Path, composes: list[list[str]]) -> None:
    """Finished jobs are composed too, to check that the sweep is unchanged."""
    assert lora_bench("train", "-m", *toy_run("seed=0,1", "hydra.sweep.dir=sweep")).code == 0
    (in_tmp / "sweep" / "1" / "run.json").unlink()
    composes.clear()
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert (in_tmp / "sweep" / "1" / "run.json").exists()
    assert len(composes) == 1 + 2
