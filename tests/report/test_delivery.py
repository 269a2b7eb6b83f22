"""The page in the browser, and the page that is written again while runs finish."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from lora_bench.report.delivery import EVERY, deliver
from tests.command_line import refuses
from tests.report.runs import make

if TYPE_CHECKING:
    from lora_bench.analysis.table import Table


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    urls: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: urls.append(url) or True)
    return urls


def start(folder: Path) -> Run:
    """Return a run that is running; this process holds its lock."""
    return Run.claim(folder, choices={"model": "bert", "adapter": "dora"}, config={"seed": 0}, overrides=[])


def render(table: Table, refresh: int | None) -> str:
    return page(table, refresh=refresh)


def test_open_without_a_file_writes_one_that_remains(
    runs: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs), "--open"]) == 0
    match = re.search(r"written: (.*)", capsys.readouterr().err)
    assert match
    assert opened == [Path(match[1]).as_uri()]
    assert Path(match[1]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    Path(match[1]).unlink()
    Path(match[1]).parent.rmdir()


def test_open_shows_the_file_and_says_so_where_there_is_no_browser(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert main([str(runs), "--open", "--html", str(tmp_path / "report.html")]) == 0
    assert "no browser could be started" in capsys.readouterr().err


def test_a_watched_page_is_refreshed_until_no_run_is_running(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a", "lora", 0, 0.6)
    run = start(tmp_path / "runs" / "b")
    file, versions = tmp_path / "report.html", []

    def sleep(seconds: float) -> None:
        assert seconds == EVERY
        versions.append(file.read_text(encoding="utf-8"))
        if len(versions) == 2:
            run.finish("failed", "no room")

    table = deliver(lambda: summarise([tmp_path / "runs"]), render, file, watch=True, sleep=sleep)
    assert [missing.status for missing in table.missing] == ["failed"]
    assert len(versions) == 2
    for html in versions:
        assert f'data-refresh="{EVERY}"' in html
        assert f'http-equiv="refresh" content="{EVERY}"' in html
    assert "refresh" not in file.read_text(encoding="utf-8").partition("<script>")[0].partition("<title>")[0]


def test_ctrl_c_leaves_a_page_that_is_not_refreshed(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a", "lora", 0, 0.6)
    run = start(tmp_path / "runs" / "b")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deliver(lambda: summarise([tmp_path / "runs"]), render, tmp_path / "x.html", watch=True, sleep=interrupt)
    assert "data-refresh=" not in (tmp_path / "x.html").read_text(encoding="utf-8").partition("<head>")[0]
    run.finish("failed", "no room")


def test_without_running_runs_the_page_is_written_once(runs: Path, tmp_path: Path) -> None:
    assert main([str(runs), "--watch", "--html", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--watch"], "--watch"),
        (["--watch", "--html", "x.html", "--format", "csv"], "--watch"),
        (["--open", "--format", "json"], "--open"),
        (["--open", "--html", "-"], "--open"),
        (["--watch", "--html", "/dev/stdout"], "--watch"),
    ],
)
def test_options_that_exclude_each_other(runs: Path, arguments: list[str], key: str) -> None:
    with refuses(Code.CONFLICT, key=key):
        main([str(runs), *arguments])
