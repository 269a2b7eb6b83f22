"""The hub is asked once; where it does not answer, or is switched off, nothing touches the network again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
from huggingface_hub import constants

from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The requests requests, each answered."""
    requests: list[tuple[str, object]] = []
    session = SimpleNamespace(head=lambda url, timeout: requests.append((url, timeout)))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    return requests


def failing(error: Exception) -> Callable[..., None]:
    def head(*_: object, **__: object) -> None:
        raise error

    return head


def test_switched_off_no_request_is_made(monkeypatch: pytest.MonkeyPatch, requests: list[tuple[str, object]]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.is_reachable() is False
    assert requests == []


def test_an_answer_is_remembered(requests: list[tuple[str, object]]) -> None:
    assert [hub.is_reachable(), hub.is_reachable()] == [True, True]
    assert requests == [(constants.ENDPOINT, hub._TIMEOUT_SECONDS)]
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("error", [OSError("unreachable"), TimeoutError(), RuntimeError("of some HTTP client")])
def test_silence_switches_the_libraries_offline(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=failing(error)))
    assert hub.is_reachable() is False
    assert constants.HF_HUB_OFFLINE is True
