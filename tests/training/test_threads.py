"""The number of threads follows the processors that other programs leave free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.training import threads
from lora_bench.training.threads import Load, StarvationWatch, fit_threads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch four threads on four processors."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_processors", lambda: 4)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def at(monkeypatch: pytest.MonkeyPatch, **load: float) -> None:
    monkeypatch.setattr(threads.Load, "now", classmethod(lambda cls: Load(**load)))
    monkeypatch.setattr(threads.time, "monotonic", lambda: load["wall"])


@pytest.mark.parametrize(
    ("busy", "own", "left"),
    [(0.0, 0.0, 4), (8.0, 8.0, 4), (0.8, 0.0, 4), (2.0, 0.0, 3), (8.0, 2.0, 1), (8.0, 0.0, 1)],
    ids=["idle", "only this process", "hardly busy", "one", "three", "all"],
)
def test_threads_are_the_processors_that_others_leave(
    busy: float, own: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within two seconds."""
    at(monkeypatch, busy=100 + busy, of_this_process=10 + own, wall=52)
    text = fit_threads(Load(100, 10, 50))
    assert torch.get_num_threads() == left
    assert (text is None) == (left == 4)
    if text is not None:
        assert f"{left} of 4 threads" in text
        assert "trainer.threads=4" in text


def test_a_load_that_is_not_known_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, busy=101, of_this_process=0, wall=0.1)
    assert fit_threads(Load(100, 0, 0)) is None
    assert fit_threads(None) is None
    assert torch.get_num_threads() == 4


def test_a_quota_of_a_container_limits_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    torch.set_num_threads(4)
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    monkeypatch.setattr(threads, "_QUOTA", quota)
    text = fit_threads(None)
    assert torch.get_num_threads() == 1
    assert text is not None


def test_starving_threads_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, busy=0, of_this_process=0, wall=0)
    watch = StarvationWatch()
    answers: list[Any] = []
    for seconds, busy, own in ((5, 20, 10), (11, 44, 44), (22, 88, 66), (44, 176, 88)):
        at(monkeypatch, busy=busy, of_this_process=own, wall=seconds)
        answers.append(watch.update())
    assert [text is not None for text in answers] == [False, False, True, False]
    assert "OMP_NUM_THREADS=2" in answers[2]
    assert torch.get_num_threads() == 4  # results depend on it
