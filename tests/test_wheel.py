"""The built wheel is whole: installed beside the same packages, it runs from any folder with its conf and plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_bench.config.groups import conf_folder
from tests.command_line import TOY_RUN

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that must succeed; with `path`, Python finds that folder's packages first."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("lora_bench", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, copy, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "-q", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    return target


def test_every_module_and_every_yaml_travels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package, conf = ROOT / "lora_bench", conf_folder()
    expected = {f"lora_bench/{path.relative_to(package)}" for path in package.rglob("*.py")}
    expected |= {"lora_bench/py.typed", "lora_bench/analysis/published.yaml", "lora_bench/config/keys.json"}
    expected |= {f"lora_bench/conf/{path.relative_to(conf)}" for path in conf.rglob("*.yaml")}
    report = [path for path in (package / "report").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len([path for path in report if path.parent.name in ("templates", "vendor")]) >= 12
    expected |= {f"lora_bench/{path.relative_to(package)}" for path in report}
    assert inside == expected | {"lora_bench/conf/__init__.py"}


def test_the_installed_command_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "lora-bench"
    where = "import lora_bench, lora_bench.cli; print(lora_bench.__file__); print(lora_bench.cli.conf_folder())"
    found = run(sys.executable, "-c", where, cwd=tmp_path, path=installed).stdout.splitlines()
    assert found == [str(installed / "lora_bench" / "__init__.py"), str(installed / "lora_bench" / "conf")]
    assert run(command, "--version", cwd=tmp_path, path=installed).stdout == "lora-bench 0.2.0\n"
    shown = run(command, "train", "--cfg", "job", "model=tiny_bert", cwd=tmp_path, path=installed).stdout
    assert "default_lr: 0.0005" in shown


def test_the_installed_command_sweeps(installed: Path, tmp_path: Path) -> None:
    """Training itself, and the sweeper plugin that Hydra must find inside the wheel."""
    command = installed / "bin" / "lora-bench"
    sweep = ["-m", *TOY_RUN, "adapter=lora,head_only", "hydra.sweep.dir=sweep"]
    done = run(command, "train", *sweep, cwd=tmp_path, path=installed)
    assert done.stderr == ""
    for job in ("0", "1"):
        found = json.loads((tmp_path / "sweep" / job / "run.json").read_text())
        assert found["status"] == "done"
        assert found["environment"]["commit"] is None
    assert (tmp_path / "sweep" / "table.md").is_file()
