"""Where weights lie is found out without importing what a config names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_bench.backbones.locate import package_folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that says when it is imported, with another below it, on Python's path."""
    for folder in ("outer", "outer/inner", "namespace/inner"):
        Path(tmp_path, folder).mkdir(parents=True)
        if folder != "namespace/inner":
            Path(tmp_path, folder, "__init__.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    Path(tmp_path, "module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["outer", "outer.inner"])
def test_a_package_is_found_and_not_imported(site: Path, name: str) -> None:
    assert package_folder(name) == str(site / name.replace(".", "/"))
    assert not (site / "canary").exists()
    assert "outer" not in sys.modules


@pytest.mark.parametrize(
    "name", ["absent", "outer.absent", "module", "module.x", ".outer", "outer.", "", "../outer", "a b"]
)
def test_what_is_no_package(site: Path, name: str) -> None:
    assert package_folder(name) is None
    assert not (site / "canary").exists()
