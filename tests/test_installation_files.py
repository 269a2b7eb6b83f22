"""The container file and the conda environments: they install what pyproject.toml offers, on a Python it allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTAINER = (ROOT / "Containerfile").read_text(encoding="utf-8")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip_lines(name: str) -> tuple[dict[str, object], list[str]]:
    """Return a conda environment without its pip lines, and these."""
    environment = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    *packages, by_pip = environment["dependencies"]
    return {**environment, "dependencies": packages}, by_pip["pip"]


def minor_versions() -> list[str]:
    """Return the Python versions that the project allows, as `3.11`."""
    lowest, highest = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    return [f"3.{minor}" for minor in range(lowest, highest)]


@pytest.mark.parametrize(("name", "options"), [("environment.yml", [CPU_INDEX]), ("environment-gpu.yml", [])])
def test_a_conda_environment_installs_the_clone_with_known_extras(name: str, options: list[str]) -> None:
    environment, lines = pip_lines(name)
    python = next(p for p in environment["dependencies"] if p.startswith("python="))
    assert python.removeprefix("python=") in minor_versions()
    assert [line.split()[-1] for line in lines if line.startswith("--extra-index-url")] == options
    (clone,) = [re.fullmatch(r"-e \.\[([\w,]+)\]", line) for line in lines if line.startswith("-e")]
    assert set(clone[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_container_installs_known_extras_and_starts_the_command() -> None:
    (version,) = re.findall(r"^FROM python:([\d.]+)-slim$", CONTAINER, re.MULTILINE)
    (extras,) = re.findall(r"^ARG EXTRAS=([\w,]+)$", CONTAINER, re.MULTILINE)
    (command,) = re.findall(r'^ENTRYPOINT \["([\w-]+)"\]$', CONTAINER, re.MULTILINE)
    assert version in minor_versions()
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert command in PROJECT["scripts"]
    assert f"PIP_EXTRA_INDEX_URL={CPU_INDEX}" in CONTAINER
