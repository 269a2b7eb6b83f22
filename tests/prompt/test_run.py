"""`lora-bench prompt` against a real server that misbehaves by script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from lora_bench import record
from lora_bench.data import toy
from lora_bench.prompt import client
from tests.command_line import lora_bench, refused
from tests.llm_server import Reply, Server, completion, error

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["data=toy", "data.train_rows=40", "data.validation_rows=12"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path_factory.mktemp("answers")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)


def asked(server: Server, *more: str) -> list[str]:
    return overridden([*DATA, "llm.model=some-1", f"llm.base_url={server.url}", "hydra.run.dir=run"], *more)


def overridden(overrides: list[str], *more: str) -> list[str]:
    """The overrides without those that `more` replaces, and `more`."""
    replaced = {override.partition("=")[0] for override in more}
    return [*(each for each in overrides if each.partition("=")[0] not in replaced), *more]


def labels(rows: int = 12) -> dict[str, int]:
    examples = toy.generate(rows, 0, "validation")
    assert examples.labels is not None
    return dict(zip(zip(*examples.texts, strict=True), examples.labels.tolist(), strict=True))  # type: ignore[arg-type]


def knowing(body: dict[str, Any]) -> int:
    """The true label of the pair that was asked about."""
    text = body["messages"][-1]["content"]
    return next(label for (one, two), label in labels().items() if one in text and two in text)


def test_probabilities_make_scores(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        right, wrong = ("Yes", "no") if knowing(body) else ("no", " Yes")
        return completion(right, logprobs={right: -0.2231435513, wrong: -1.6094379124})

    with Server(script) as server:
        answer = lora_bench("prompt", *asked(server))
    assert (answer.code, answer.err) == (0, ""), answer
    found = record.read(in_tmp / "run")
    assert found["status"] == "done"
    assert found["metrics"]["validation/mcc"] == 1.0
    assert found["answers"] == {"validation": {"probabilities": 12, "text": 0, "refused": 0, "unparsable": 0}}
    assert found["params"] == dict.fromkeys(("adapter", "head", "trainable", "total"))
    assert found["cost"]["requests"] == 12
    assert found["cost"]["prompt_tokens"] == 240
    assert found["environment"]["llm"] == ["served-1"]
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    assert table["score"] == pytest.approx([0.8 if label else 0.2 for label in table["label"]])
    assert server.repeated == 0


def test_wrong_answers_are_counted_and_wrong(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        replies = [
            completion(None, refusal="I cannot."),
            completion("I am not sure"),
            completion(""),
            completion("Yes."),
        ]
        return replies[number % 4]

    with Server(script) as server:
        answer = lora_bench("prompt", *asked(server, "llm.concurrency=1"))
    assert answer.code == 0, answer
    assert "3 answers were refused" in answer.out
    found = record.read(in_tmp / "run")
    assert found["answers"]["validation"] == {"probabilities": 0, "text": 3, "refused": 3, "unparsable": 6}
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    silent = [i for i in range(12) if i % 4 != 3]
    assert [table["score"][i] for i in silent] == [1.0 - table["label"][i] for i in silent]


def test_a_server_that_misbehaves_is_asked_again(in_tmp: Path) -> None:
    bad: list[Reply] = [
        error(500),
        error(429, headers={"Retry-After": "0.3"}),
        (200, {}, b'{"choi'),
        (200, {}, b'{"choices": []}'),
        (200, {"X-Slow": "1"}, completion()[2]),
    ]

    def script(body: dict[str, Any], number: int) -> Reply:
        return bad[number] if number < len(bad) else completion("no")

    began = time.monotonic()
    with Server(script) as server:
        answer = lora_bench("prompt", *asked(server, "llm.timeout=0.5"))
    assert answer.code == 0, answer
    assert time.monotonic() - began > 0.7
    assert len(server.asked) == 12 + len(bad)
    assert record.read(in_tmp / "run")["cost"]["requests"] == 12 + len(bad)


def test_without_logprobs_the_text_is_read_and_nothing_is_repeated(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return error(400, "logprobs is not supported") if "logprobs" in body else completion("no")

    with Server(script) as server:
        first = lora_bench("prompt", *asked(server))
        assert first.code == 0, first
        assert len(server.asked) == 13
        assert "no log-probabilities" in first.out
        again = lora_bench("prompt", *asked(server, "hydra.run.dir=again"))
        assert again.code == 0, again
        assert len(server.asked) == 13
    assert record.read(in_tmp / "again")["cost"]["requests"] == 0
    assert record.read(in_tmp / "again")["metrics"] == record.read(in_tmp / "run")["metrics"]


def test_budgets_interrupt_and_a_rerun_goes_on(in_tmp: Path) -> None:
    prices = ["llm.input_price=1e6", "llm.output_price=1e6"]
    with Server(lambda body, number: completion("no")) as server:
        answer = lora_bench("prompt", *asked(server, "llm.max_requests=5"))
        assert answer.code == 1
        assert "llm.max_requests=5" in answer.err
        assert "5 of 12 questions" in answer.err
        assert record.read(in_tmp / "run")["status"] == "interrupted"
        assert len(server.asked) == 5
        assert "one request" in refused("prompt", *asked(server, "hydra.run.dir=b", "llm.max_cost=10", *prices))
        answer = lora_bench("prompt", *asked(server, "hydra.run.dir=c", "llm.max_cost=2000", *prices))
        assert answer.code == 0, answer
        assert record.read(in_tmp / "c")["cost"]["money_spent"] == 7 * 21
        answer = lora_bench("prompt", *asked(server, "hydra.run.dir=d"))
        assert answer.code == 0
    assert server.repeated == 0
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "bad key sk-secret"), "The key in OPENAI_API_KEY was not taken"),
        (error(404, "no such model"), "Is the model one of the server's"),
        (error(400, "context too long"), "context too long"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, said: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(lambda body, number: reply) as server:
        told = refused("prompt", *asked(server))
    assert said in told
    assert "sk-secret" not in told
    assert server.keys == ["Bearer sk-secret"]


def test_a_missing_key_is_said(in_tmp: Path) -> None:
    with Server(lambda body, number: error(401)) as server:
        assert "OPENAI_API_KEY holds no key" in refused("prompt", *asked(server))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("llm.base_url=http://127.0.0.1:1/v1", "the connection failed"),
        ("llm.base_url=localhost", "is no address"),
        ("llm.model=null", "llm.model: is needed"),
        ("llm.api_key_env=sk-secret", "must be the name of an environment variable"),
        ("llm.api_key=sk-secret", "a key is given in no config"),
        ("+llm.api_key=sk-secret", "a key is given in no config"),
        ("llm.base_url=http://me:sk-secret@localhost/v1", "holds a user"),
        ("prompt.template='{question1}'", "lacks {question2}"),
        ("prompt.template='{fields} {nothing}'", "{nothing}"),
        ("prompt.shots=3", "must be even"),
        ("prompt.shots=200", "train has"),
        ("llm.max_cost=1", "needs prices"),
        ("split=train", "is no labelled split"),
    ],
)
def test_wrong_requests(in_tmp: Path, override: str, said: str) -> None:
    asked = [*DATA, "llm.model=x", "llm.base_url=http://127.0.0.1:1/v1"]
    told = refused("prompt", *overridden(asked, override))
    assert said in told
    assert "sk-secret" not in told


def test_few_shot_examples_are_balanced_and_from_train(in_tmp: Path) -> None:
    with Server(lambda body, number: completion("no")) as server:
        assert lora_bench("prompt", *asked(server, "prompt=few_shot", "prompt.shots=4", "seed=1")).code == 0
        assert lora_bench("prompt", *asked(server, "prompt.shots=4", "seed=2", "hydra.run.dir=b")).code == 0
    first, other = server.asked[0]["messages"], server.asked[-1]["messages"]
    train = toy.generate(40, 0, "train")
    shown = [message["content"] for message in first[1:-1:2]]
    assert sorted(message["content"] for message in first[2:-1:2]) == ["no", "no", "yes", "yes"]
    assert all(any(one in text and two in text for one, two in zip(*train.texts, strict=True)) for text in shown)
    assert first[1:-1] != other[1:-1]


def test_killed_and_run_again_asks_nothing_twice(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.01)
        return completion("no")

    big = ["data.validation_rows=200", "llm.concurrency=2"]
    with Server(script) as server:
        command = [sys.executable, "-W", "error", "-m", "lora_bench", "prompt", *asked(server, *big)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.asked) < 50 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)
        before = len(server.asked)
        assert 50 <= before < 200
        answer = lora_bench("prompt", *asked(server, *big, "hydra.run.dir=again"))
    assert answer.code == 0, answer
    found = record.read(in_tmp / "again")
    assert found["cost"]["cached"] + found["cost"]["requests"] == 200
    assert server.repeated <= 2  # those under way when it was killed never had an answer
    assert "killed" in lora_bench("compare", ".").out


def test_an_interrupt_is_recorded(in_tmp: Path) -> None:
    with Server(lambda body, number: time.sleep(0.05) or completion("no")) as server:
        command = [
            sys.executable,
            "-m",
            "lora_bench",
            "prompt",
            *asked(server, "llm.concurrency=1", "data.validation_rows=200"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(server.asked) < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.decode()) == (130, "lora-bench: interrupted\n")
    assert record.read(in_tmp / "run")["status"] == "interrupted"


def test_answers_from_elsewhere(in_tmp: Path) -> None:
    truth = list(labels().values())
    rows = [{"id": i, "label": label} for i, label in enumerate(truth)]
    rows[3]["label"] = None  # type: ignore[typeddict-item]
    (in_tmp / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    answer = lora_bench("prompt", "predictions=answers.jsonl", *DATA, "hydra.run.dir=run")
    assert answer.code == 0, answer
    found = record.read(in_tmp / "run")
    assert found["answers"] == {"validation": {"given": 11, "absent": 1}}
    assert found["metrics"]["validation/accuracy"] == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id\tlabel\n0\t1\n", "lacks 11 of 12 ids: 1, 2, 3, 4, 5, …"),
        ("id\tlabel\n0\t1\n0\t1\n", "row 3: id 0 is given twice"),
        ("id\tlabel\n12\t1\n", "row 2: id '12' is none of the split's"),
        ("id\tscore\n0\tnan\n", "score 'nan' is not a number from 0 to 1"),
        ("id\tanswer\n0\t1\n", "has the columns id, answer"),
    ],
)
def test_wrong_files_of_answers(in_tmp: Path, text: str, said: str) -> None:
    (in_tmp / "a.tsv").write_text(text)
    assert said in refused("prompt", "predictions=a.tsv", *DATA)
