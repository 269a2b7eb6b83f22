"""The environment in a record: all versions, and the commit only of lora-bench's own checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import requires, version
from typing import TYPE_CHECKING

import pytest

from lora_bench.records import environment

if TYPE_CHECKING:
    from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *settings, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_versions_of_every_package_that_results_depend_on() -> None:
    described = environment.versions()
    assert described == {name: version(name) for name in environment.PACKAGES}
    named = [re.split("[<>=!~; ]", line)[0] for line in requires("lora-bench") or [] if "extra" not in line]
    required = {name for name in named if name}
    no_figure_depends_on = {
        "rich",
        "pyyaml",
        "sentencepiece",
        "protobuf",
        "filelock",
        "xxhash",
        "jinja2",
    }  # screen, files, tokenizers' formats, locks, pages
    assert required - no_figure_depends_on <= set(environment.PACKAGES)


def test_a_package_that_is_not_there_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.versions() == {"no-such-package": None}


def test_description_goes_into_json() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert set(described) == {"commit", "dirty", "versions", "platform", "cpu", "cpu_count"}
    assert described["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with a `lora_bench` folder that `environment` believes to lie in."""
    package = tmp_path / "repository" / "lora_bench"
    package.mkdir(parents=True)
    for name in ("errors.py", "environment.py"):
        (package / name).write_text("")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return package.parent


def test_commit_of_a_checkout(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    (checkout / "notes.txt").write_text("untracked files change no result")
    described = environment.describe()
    assert (described["commit"], described["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "lora_bench" / "errors.py").write_text("changed")
    assert environment.describe()["dirty"] is False  # the code that was imported is the commit's
    environment._commit.cache_clear()
    assert environment.describe()["dirty"] is True


def test_outside_git_the_commit_is_null(checkout: Path) -> None:
    described = environment.describe()
    assert (described["commit"], described["dirty"]) == (None, None)


def test_someone_elses_repository_is_not_ours(checkout: Path) -> None:
    """Installed into a virtual environment inside another project, whose commit says nothing about lora-bench."""
    (checkout / "other.py").write_text("")
    git(checkout, "init", "-q")
    git(checkout, "add", "other.py")
    git(checkout, "commit", "-qm", "theirs")
    assert environment.describe()["commit"] is None


def test_without_the_git_program_the_commit_is_null(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(checkout, "init", "-q")
    monkeypatch.setenv("PATH", str(checkout))
    assert environment.describe()["commit"] is None


def test_cpu_is_named_on_other_systems_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    monkeypatch.setattr(environment.platform, "processor", lambda: "arm")
    assert environment.describe()["cpu"] == "arm"
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    assert environment.describe()["cpu"] is None
