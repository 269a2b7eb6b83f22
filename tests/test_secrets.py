"""Keys are hidden wherever they stand, and innocent text is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.disk import plain
from lora_bench.secrets import HIDDEN, hides_secret, redact, remember

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    remember([])
    yield
    remember([])


@pytest.mark.parametrize(
    "key",
    [
        "sk-abcdefgh12345678",
        "sk-proj-A1_b2-C3d4e5f6",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "github_pat_11ABCDEFG0_abcdefghij",
        "AKIAIOSFODNN7EXAMPLE",
        "AIzaSyA-1234567890abcdefghijklmnopqrst",
        "xoxb-123456789012-abcdefg",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmN",
    ],
)
def test_what_looks_like_a_key_is_hidden_wherever_it_stands(key: str) -> None:
    for text in (key, f"data.path=/x/{key}", f"a {key}.", f"['{key}']", f"refused: {key}: no such key"):
        assert key not in redact(text)
        assert HIDDEN in redact(text)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("llm.api_key=abc", "llm.api_key=***"),
        ("++llm.api_key='a b'", "++llm.api_key=***"),
        ("llm.api_key=abc: is not a known key. Did you?", "llm.api_key=***: is not a known key. Did you?"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("llm={api_key: abc, x: 1}", "llm={api_key: ***, x: 1}"),
        ("DB_PASSWORD=hunter2 and more", "DB_PASSWORD=*** and more"),
        ("https://me:word@host/x", "https://***@host/x"),
        ("-----BEGIN PRIVATE KEY-----\nMII\n-----END PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_values_of_keys_so_named_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden
    assert redact(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "is not a known key: foo",
        "cannot be read as key=value. Give llm.api_key=VALUE.",
        "adapter.allocation=['.*key=16','.*query=8']",
        "encoder.layer.0.attention.self.key=16",
        "/data/task-12345678-risk-abcdefgh",
        "hf_hub_download hf_transformers",
        "KeyError: 'question1'",
        "llm.api_key=${oc.env:OPENAI_API_KEY}",
        "data.max_tokens=128",
        "adapter.rank=4",
        "a bearer of bad news",
    ],
)
def test_innocent_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_a_record_hides_by_the_names_of_its_keys() -> None:
    record = {
        "llm": {"api_key": "abc", "client_secret": ["a", "b"], "hf_token": None, "pin_password": 1234},
        "overrides": ["llm.api_key=abc", "seed=1"],
        "targets": {"encoder.layer.0.attention.self.key": 8},
        "text": "AKIAIOSFODNN7EXAMPLE",
    }
    assert plain(record) == {
        "llm": {"api_key": HIDDEN, "client_secret": [HIDDEN, HIDDEN], "hf_token": None, "pin_password": HIDDEN},
        "overrides": [f"llm.api_key={HIDDEN}", "seed=1"],
        "targets": {"encoder.layer.0.attention.self.key": 8},
        "text": HIDDEN,
    }
    assert hides_secret(plain(record))
    assert not hides_secret(plain({"a": ["x", {"b": 1}]}))
    assert record["llm"]["api_key"] == "abc"  # the running process keeps it


def test_what_was_given_once_is_hidden_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "from the shell")
    monkeypatch.setenv("KEY_FILE_PASSWORD", "/")  # a place, not a key
    remember(["llm.api_key=open sesame", "+a.token=first1,second2", "x_key=short", "seed=123456"])
    assert redact("no such key: open sesame (123456)") == "no such key: *** (123456)"
    assert redact("first1 or second2 / from the shell / short") == "*** or *** / *** / short"
