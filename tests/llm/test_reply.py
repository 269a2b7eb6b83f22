"""Hostile servers: replies are bounded, and the key is neither sent to another origin nor shown."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zlib
from base64 import b64encode
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from lora_bench.errors import Code
from lora_bench.files.cache import cache_folder
from lora_bench.llm import cache, client, reply
from lora_bench.llm.reply import contains_key
from lora_bench.records import run_folder
from tests.command_line import files_below, lora_bench, refused
from tests.llm_server import Reply, Server, completion
from tests.llm_server import error as error_reply

if TYPE_CHECKING:
    from pathlib import Path

KEY = "horse.battery-staple/42"


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path_factory.mktemp("answers")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)


def arguments(server: Server, *overrides: str) -> list[str]:
    data = ["data=toy", "data.train_rows=40", "data.validation_rows=8"]
    run = [] if any(override.startswith("hydra.run.dir") for override in overrides) else ["hydra.run.dir=run"]
    return [*data, "llm.model=some-1", f"llm.base_url={server.url}", "llm.retries=0", *run, *overrides]


def server_error(*overrides: str) -> str:
    """Run a request that the server makes fail; assert exit code 1 and one line without a traceback, and return it."""
    answer = lora_bench("prompt", *overrides)
    assert answer.code == 1, answer
    assert answer.error is not None
    assert (answer.error.code, answer.error.key) == (Code.SERVER, "llm.base_url")
    assert answer.err.count("\n") == 1
    assert "Error:" not in answer.err
    return answer.err


def compressed(content: bytes, encoding: str) -> Reply:
    if encoding == "gzip":
        return 200, {"Content-Encoding": "gzip"}, gzip.compress(content)
    compressor = zlib.compressobj(wbits=-15 if encoding == "bare" else 15)
    return 200, {"Content-Encoding": "deflate"}, compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "bare"])
def test_compressed_replies_are_read_and_bounded(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(reply, "MAX_BYTES", 2**16)
    with Server(lambda body, number: compressed(completion("no")[2], encoding)) as server:
        assert lora_bench("prompt", *arguments(server)).code == 0
    bomb = compressed(b" " * 2**20, encoding)
    assert len(bomb[2]) < 2**16
    with Server(lambda body, number: bomb) as server:
        assert "65,536 bytes" in server_error(*arguments(server, "hydra.run.dir=b"))


@pytest.mark.parametrize("status", [200, 400])
def test_a_long_reply_is_not_read(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(reply, "MAX_BYTES", 2**16)
    with Server(lambda body, number: (status, {}, b"{" * 2**17)) as server:
        assert "65,536 bytes" in server_error(*arguments(server))


@pytest.mark.parametrize("headers", [{"Content-Encoding": "br"}, {"Content-Encoding": "gzip, gzip"}])
def test_other_compressions_are_refused_and_named(in_tmp: Path, headers: dict[str, str]) -> None:
    with Server(lambda body, number: (200, headers, b"x")) as server:
        assert headers["Content-Encoding"] in server_error(*arguments(server))


def test_huge_headers_and_charsets_that_decompress_are_refused(in_tmp: Path) -> None:
    with Server(lambda body, number: (200, {"X-Huge": "x" * 200_000}, b"{}")) as server:
        server_error(*arguments(server))
    bomb = zlib.compress(b" " * 2**26)
    with Server(lambda body, number: (200, {"Content-Type": "text/plain; charset=zlib"}, bomb)) as server:
        assert "JSON" in server_error(*arguments(server))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_another_origin_are_refused(in_tmp: Path, status: int) -> None:
    with Server(lambda body, number: completion("no")) as other:
        targets = [other.url, "//evil.example/v1", "http://["] if status == 307 else [other.url]
        for target in targets:
            with Server(lambda body, number, at=target: (status, {"Location": at}, b"")) as server:  # type: ignore[misc]
                error = refused("prompt", *arguments(server))
            assert (error.code, error.key) == (Code.SERVER, "llm.base_url")
            assert ("http://evil.example" in str(error)) == ("evil.example" in target)
        assert other.bodies == []


def test_redirects_within_the_origin_are_followed_up_to_a_limit(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return (307, {"Location": "/v1/elsewhere"}, b"") if number % 2 == 0 else completion("no")

    with Server(script) as server:
        assert lora_bench("prompt", *arguments(server, "llm.concurrency=1")).code == 0
    assert set(server.keys) == {f"Bearer {KEY}"}
    with Server(lambda body, number: (307, {"Location": "/v1/again"}, b"")) as server:
        assert "redirects" in server_error(*arguments(server, "hydra.run.dir=b"))
    assert len(server.bodies) < 6
    with Server(lambda body, number: (302, {"Location": "/v1/again"}, b"")) as server:
        error = refused("prompt", *arguments(server, "hydra.run.dir=c"))
    assert (error.code, error.key) == (Code.SERVER, "llm.base_url")
    assert "302" in str(error)


ECHOES = [
    KEY,
    KEY[:12],
    KEY[9:],
    f"{KEY[:9]}\n{KEY[9:]}",
    f"{KEY[:9]}\\n  {KEY[9:]}",
    quote(KEY, safe=""),
    quote(quote(KEY, safe=""), safe=""),
    b64encode(KEY.encode()).decode(),
    b64encode(f"me:{KEY}".encode()).decode(),
    KEY.encode().hex(),
    "".join(f"\\u{ord(char):04x}" for char in KEY),
    f"{KEY[:4]}***{KEY[-4:]}",
]


@pytest.mark.parametrize("echo", ECHOES)
def test_contains_key_recognises_parts_and_encodings_of_the_key(echo: str) -> None:
    assert contains_key(f"no such key: {echo}.", KEY)
    assert not contains_key("the model does not exist, or you have no access to it ... **ask** again", KEY)


def test_an_echoed_key_is_neither_shown_nor_recorded(in_tmp: Path) -> None:
    cut_in_key = error_reply(401, f"{'x' * 290} {KEY}")  # the shown part ends in the middle of the key
    with Server(lambda body, number: cut_in_key) as server:
        error = refused("prompt", *arguments(server))
    assert (error.code, error.key) == (Code.SERVER, "llm.api_key_env")
    assert "401" in str(error)
    assert KEY[:3] not in str(error)

    def script(body: dict[str, Any], number: int) -> Reply:
        echo = ECHOES[number % len(ECHOES)]
        return completion(echo, logprobs={echo: -0.1}) if number % 2 else completion(f"it is {echo}")

    with Server(script) as server:
        answer = lora_bench("prompt", *arguments(server, "data.validation_rows=12"))
    assert answer.code == 0, answer
    contents = {**files_below(in_tmp), **files_below(cache_folder() / "prompt"), "": (answer.out + answer.err).encode()}
    for echo in ECHOES[:-1]:
        assert not [name for name, content in contents.items() if echo.encode() in (content or b"")]


def test_a_damaged_cache_is_replaced_with_a_note(in_tmp: Path) -> None:
    path = cache_folder() / "prompt" / "answers.sqlite"
    with Server(lambda body, number: completion("no")) as server:
        assert lora_bench("prompt", *arguments(server)).code == 0
        with closing(sqlite3.connect(path)) as db:
            keys = [row[0] for row in db.execute("SELECT key FROM answers")]
            damaged = ["", "[]", "{}", "{" * 9000, '{"text": 1}', b"\xff\x00", "9" * 5000]
            for key, entry in zip(keys, damaged, strict=False):
                db.execute("UPDATE answers SET answer = ? WHERE key = ?", (entry, key))
            db.commit()
        requests = len(server.bodies)
        answer = lora_bench("prompt", *arguments(server, "hydra.run.dir=b"))
        assert answer.code == 0, answer
        assert f"{len(damaged)} entries of the cache" in answer.out
        assert len(server.bodies) == requests + len(damaged)
        for number, content in enumerate(
            (b"no database", path.read_bytes()[:3000], b"SQLite format 3\0" + b"x" * 9000)
        ):
            path.write_bytes(content)
            answer = lora_bench("prompt", *arguments(server, f"hydra.run.dir=c{number}"))
            assert (answer.code, run_folder.read(in_tmp / f"c{number}")["status"]) == (0, "done"), answer
            assert "answers.damaged-" in answer.out
        assert path.with_name("answers.damaged-1.sqlite").read_bytes() == b"no database"
        path.unlink()
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE VIEW answers AS SELECT 'x' AS key, 'y' AS answer")
        assert lora_bench("prompt", *arguments(server, "hydra.run.dir=d")).code == 0


def test_answers_are_cached_per_server_address(in_tmp: Path) -> None:
    with (
        Server(lambda body, number: completion("no")) as server,
        Server(lambda body, number: completion("yes")) as other,
    ):
        assert lora_bench("prompt", *arguments(server)).code == 0
        assert lora_bench("prompt", *arguments(other, "hydra.run.dir=b")).code == 0
    assert len(other.bodies) == len(server.bodies) == 8
    assert json.loads((in_tmp / "b/run.json").read_text())["cost"]["cached"] == 0
    assert cache.key({"a": 1}) != cache.key({"a": 2})
