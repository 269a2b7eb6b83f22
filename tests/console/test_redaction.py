"""Keys are hidden wherever they stand, and innocent text is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.console.redaction import hides_secret, redact, remember, remember_config
from lora_bench.console.secret_patterns import HIDDEN
from lora_bench.files.atomic_io import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
    assert to_json(record) == {
        "llm": {"api_key": HIDDEN, "client_secret": [HIDDEN, HIDDEN], "hf_token": None, "pin_password": HIDDEN},
        "overrides": [f"llm.api_key={HIDDEN}", "seed=1"],
        "targets": {"encoder.layer.0.attention.self.key": 8},
        "text": HIDDEN,
    }
    assert hides_secret(to_json(record))
    assert not hides_secret(to_json({"a": ["x", {"b": 1}]}))
    assert record["llm"]["api_key"] == "abc"  # the running process keeps it


def test_what_was_given_once_is_hidden_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "from the shell")
    monkeypatch.setenv("KEY_FILE_PASSWORD", "/")  # a place, not a key
    remember(["llm.api_key=open sesame", "+a.token=first1,second2", "x_key=short", "seed=123456"])
    assert redact("no such key: open sesame (123456)") == "no such key: *** (123456)"
    assert redact("first1 or second2 / from the shell / short") == "*** or *** / *** / short"


@pytest.mark.parametrize(
    "text",
    [
        "model.path=sk-quora-pairs",
        "/data/hf_models2024/mini",
        "hf_checkpoint20000 pk-questions sk-learn-2025 ghp_models",
        "/nowhere/my_token=x: is not a folder",
        "Put a value with special characters in quotes inside quotes: 'key=\"a,b [c]\"'.",
        "http://localhost:8000/v1/name@main",
        "hf://datasets/user/repo@main/x",
        '{"pad_token": "[PAD]", "mask_token": "<mask>"}',
        "needs Bearer authentication",
    ],
)
def test_paths_advice_and_words_are_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("https://me:p@ss/w@rd@host/x", "https://***@host/x"),
        ("https://me:pa/ss@host/x", "https://***@host/x"),
        ("https://me:12/34?5#6@host", "https://***@host"),
        ("postgres://ghp_x@host/db", "postgres://***@host/db"),
    ],
)
def test_all_of_a_password_in_an_address_is_hidden(url: str, hidden: str) -> None:
    assert redact(f"no answer from {url} today") == f"no answer from {hidden} today"


def test_a_path_that_exists_is_never_hidden(in_tmp: Path) -> None:
    for name in ("sk-abcdefgh12345678", "a token=b (1)/hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "db_password=x"):
        (in_tmp / name).mkdir(parents=True)
        for text in (name, str(in_tmp / name), f"data.path={in_tmp / name}: is damaged", f"'{in_tmp / name}/x.tsv'"):
            assert redact(text) == text
        assert to_json({"path": str(in_tmp / name)}) == {"path": str(in_tmp / name)}
    remember([f"llm.api_key={in_tmp}"])
    assert redact(str(in_tmp)) == str(in_tmp)


@pytest.mark.parametrize("name", ["X_PWD", "DB_PASS", "PROXY_AUTH", "GITLAB_PAT", "WHATEVER"])
def test_variables_that_a_config_reads_are_secrets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "tiger-lily")
    remember([])
    remember_config({"tracking": {"uri": f"http://me:${{oc.env:{name},none}}@host"}})
    assert redact("refused: tiger-lily") == f"refused: {HIDDEN}"
    assert redact("refused: tiger%2Dlily dGlnZXItbGlseQ==".replace("%2D", "-")).startswith(f"refused: {HIDDEN}")


def test_a_model_named_by_a_variable_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "roberta-large")
    remember(["model.hub_id=${oc.env:MODEL_ID}", "hydra.run.dir=out/${oc.env:MODEL_ID}"])
    assert redact("roberta-large") == "roberta-large"


def test_values_below_a_secrets_name_are_hidden_however_deep() -> None:
    record = {"credentials": {"user": "me", "words": ["a", {"b": "c"}]}, "apiKey": "x", "text": '{"password": "a b"}'}
    assert to_json(record) == {
        "credentials": {"user": HIDDEN, "words": [HIDDEN, {"b": HIDDEN}]},
        "apiKey": HIDDEN,
        "text": '{"password": ***}',
    }


@pytest.mark.parametrize("fragment", ["a", "a.", ":", "/", "key", "key=", "api_key=", "a_key=1", "://", "sk-", "eyJ-"])
def test_a_long_text_takes_linear_time(fragment: str) -> None:
    """A text of 300,000 characters; in quadratic time it would take an hour."""
    redact(fragment * (300_000 // len(fragment)))


def test_a_path_in_a_quotation_is_not_hidden(in_tmp: Path) -> None:
    (in_tmp / "x-my_token=abcdef").mkdir()
    for text in ('load("x-my_token=abcdef")', "see 'x-my_token=abcdef'.", '{"a": ["x-my_token=abcdef"]}'):
        assert redact(text) == text
    assert "ghijkl" not in redact('load("x-my_token=ghijkl")')
