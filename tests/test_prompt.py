"""`lora-bench prompt` against a real server that misbehaves by script."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
import warnings
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from lora_bench.config.build import build_data
from lora_bench.data import sources, toy
from lora_bench.errors import Code
from lora_bench.files.cache import cache_folder
from lora_bench.llm import client
from lora_bench.records import run_folder
from tests import forked, three_classes
from tests.command_line import files_below, lora_bench, refused, toy_run
from tests.helpers import composed
from tests.llm_server import Reply, Server, completion
from tests.llm_server import error as error_reply
from tests.three_classes import put

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_bench.data.examples import Examples

NOBODY = "http://127.0.0.1:1/v1"
"""An address where no server is."""
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
    found = run_folder.read(in_tmp / "run")
    assert found["status"] == "done"
    assert found["metrics"]["validation/mcc"] == 1.0
    assert found["answers"] == {"validation": {"probabilities": 12, "text": 0, "refused": 0, "unparsable": 0}}
    assert found["params"] == dict.fromkeys(("adapter", "head", "trainable", "total"))
    assert found["cost"]["requests"] == 12
    assert found["cost"]["prompt_tokens"] == 240
    assert found["environment"]["llm"] == ["served-1"]
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    assert table["score"] == pytest.approx([0.8 if label else 0.2 for label in table["label"]])
    assert server.repeated == []


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
    found = run_folder.read(in_tmp / "run")
    assert found["answers"]["validation"] == {"probabilities": 0, "text": 3, "refused": 3, "unparsable": 6}
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    silent = [i for i in range(12) if i % 4 != 3]
    assert [table["score"][i] for i in silent] == [1.0 - table["label"][i] for i in silent]


def test_a_server_that_misbehaves_is_asked_again(in_tmp: Path) -> None:
    bad: list[Reply] = [
        error_reply(500),
        error_reply(429, headers={"Retry-After": "0.3"}),
        (200, {}, b'{"choi'),
        (200, {}, b'{"choices": []}'),
        (200, {"X-Cut": "1"}, completion()[2]),
        (200, {"X-Slow": "1"}, completion()[2]),
    ]

    def script(body: dict[str, Any], number: int) -> Reply:
        return bad[number] if number < len(bad) else completion("no")

    began = time.monotonic()
    with Server(script) as server:
        answer = lora_bench("prompt", *asked(server, "llm.timeout=2"))
    assert answer.code == 0, answer
    assert time.monotonic() - began > 0.3 + 2
    found = run_folder.read(in_tmp / "run")
    assert found["answers"]["validation"] == {"probabilities": 0, "text": 12, "refused": 0, "unparsable": 0}
    assert found["cost"]["requests"] == len(server.bodies) >= 12 + len(bad)


def test_without_logprobs_the_text_is_read_and_nothing_is_repeated(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return error_reply(400, "logprobs is not supported") if "logprobs" in body else completion("no")

    with Server(script) as server:
        first = lora_bench("prompt", *asked(server))
        assert first.code == 0, first
        assert len(server.bodies) == 13
        assert "no log-probabilities" in first.out
        again = lora_bench("prompt", *asked(server, "hydra.run.dir=again"))
        assert again.code == 0, again
        assert len(server.bodies) == 13
    assert run_folder.read(in_tmp / "again")["cost"]["requests"] == 0
    assert run_folder.read(in_tmp / "again")["metrics"] == run_folder.read(in_tmp / "run")["metrics"]


def test_budgets_interrupt_and_a_rerun_goes_on(in_tmp: Path) -> None:
    prices = ["llm.input_price=1e6", "llm.output_price=1e6"]
    with Server(lambda body, number: completion("no")) as server:
        answer = lora_bench("prompt", *asked(server, "llm.max_requests=5"))
        assert answer.code == 1
        assert answer.error is not None
        assert (answer.error.code, answer.error.key) == (Code.BUDGET_SPENT, "llm.max_requests")
        assert "5 of 12" in answer.err
        assert run_folder.read(in_tmp / "run")["status"] == "interrupted"
        assert len(server.bodies) == 5
        error = refused("prompt", *asked(server, "hydra.run.dir=b", "llm.max_cost=10", *prices))
        assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "llm.max_cost", 10.0)
        answer = lora_bench("prompt", *asked(server, "hydra.run.dir=c", "llm.max_cost=2000", *prices))
        assert answer.code == 0, answer
        assert run_folder.read(in_tmp / "c")["cost"]["money_spent"] == 7 * 21
        answer = lora_bench("prompt", *asked(server, "hydra.run.dir=d"))
        assert answer.code == 0
    assert server.repeated == []
    assert len(server.bodies) == 12


@pytest.mark.parametrize(
    ("reply", "key", "named"),
    [
        (error_reply(401, "bad key sk-secret"), "llm.api_key_env", "OPENAI_API_KEY"),
        (error_reply(404, "no such model"), "llm.model", "no such model"),
        (error_reply(400, "context too long"), "llm", "context too long"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, key: str, named: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(lambda body, number: reply) as server:
        error = refused("prompt", *asked(server))
    assert (error.code, error.key) == (Code.SERVER, key)
    assert named in str(error)
    assert "sk-secret" not in str(error)
    assert server.keys == ["Bearer sk-secret"]


def test_a_missing_key_is_refused(in_tmp: Path) -> None:
    with Server(lambda body, number: error_reply(401)) as server:
        error = refused("prompt", *asked(server))
    assert (error.code, error.key) == (Code.MISSING, "llm.api_key_env")
    assert "OPENAI_API_KEY" in str(error)


@pytest.mark.parametrize(
    ("override", "expected", "named"),
    [
        (f"llm.base_url={NOBODY}", (Code.SERVER, "llm.base_url", NOBODY), ""),
        ("llm.base_url=localhost", (Code.INVALID_VALUE, "llm.base_url", "localhost"), "http://localhost:8000/v1"),
        ("llm.model=null", (Code.MISSING, "llm.model", None), ""),
        ("llm.api_key_env=sk-secret", (Code.INVALID_VALUE, "llm.api_key_env", None), ""),
        ("llm.api_key=sk-secret", (Code.FORBIDDEN, "llm", None), "llm.api_key_env"),
        ("+llm.api_key=sk-secret", (Code.FORBIDDEN, "llm", None), "llm.api_key_env"),
        ("llm.base_url=http://me:sk-secret@localhost/v1", (Code.FORBIDDEN, "llm.base_url", None), "llm.api_key_env"),
        ("prompt.template='{question1}'", (Code.INVALID_SYNTAX, "prompt.template", None), "{question2}"),
        ("prompt.template='{fields} {nothing}'", (Code.INVALID_SYNTAX, "prompt.template", None), "{nothing}"),
        ("prompt.shots=3", (Code.INVALID_VALUE, "prompt.shots", 3), ""),
        ("prompt.shots=200", (Code.INVALID_VALUE, "prompt.shots", 200), "train has 20"),
        ("llm.max_cost=1", (Code.CONFLICT, "llm.max_cost", 1.0), "llm.input_price"),
        ("split=train", (Code.UNKNOWN_CHOICE, "split", "train"), "validation"),
    ],
)
def test_wrong_requests(in_tmp: Path, override: str, expected: tuple[Code, str, object], named: str) -> None:
    request = [*DATA, "llm.model=x", f"llm.base_url={NOBODY}"]
    error = refused("prompt", *overridden(request, override))
    assert (error.code, error.key, error.value) == expected
    assert named in str(error)
    assert "sk-secret" not in str(error)


def test_few_shot_examples_are_balanced_and_from_train(in_tmp: Path) -> None:
    with Server(lambda body, number: completion("no")) as server:
        assert lora_bench("prompt", *asked(server, "prompt=few_shot", "prompt.shots=4", "seed=1")).code == 0
        assert lora_bench("prompt", *asked(server, "prompt.shots=4", "seed=2", "hydra.run.dir=b")).code == 0
    first, other = server.bodies[0]["messages"], server.bodies[-1]["messages"]
    train, selection = sources.split_selection(
        toy.generate(40, 0, "train"), build_data(composed(*DATA, name="prompt").data)
    )
    shown = [message["content"] for message in first[1:-1:2]]
    assert sorted(message["content"] for message in first[2:-1:2]) == ["no", "no", "yes", "yes"]

    def among(examples: Examples) -> list[bool]:
        return [any(one in text and two in text for one, two in zip(*examples.texts, strict=True)) for text in shown]

    assert among(train) == [True] * 4
    assert among(selection) == [False] * 4
    assert first[1:-1] != other[1:-1]


def without_warnings(*arguments: str) -> int:
    """Run a command for which a warning is an error."""
    warnings.simplefilter("error")
    return forked.run_command(*arguments)


def child(*arguments: str) -> forked.Forked:
    return forked.Forked(without_warnings, *arguments)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kept() -> int:
    """Answers in the cache."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(cache_folder() / "prompt/answers.sqlite")) as db:
        return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    return 0


class Held:
    """A script that answers so many questions and then keeps silent until it is let go."""

    def __init__(self, answered: int) -> None:
        self.answered = answered
        self.go = threading.Event()

    def __call__(self, body: dict[str, Any], number: int) -> Reply:
        if number >= self.answered:
            assert self.go.wait(120)
        return completion("no")


BIG = ["data.validation_rows=200", "llm.concurrency=3"]


def test_killed_and_run_again_asks_nothing_twice_that_was_answered(in_tmp: Path) -> None:
    held = Held(50)
    with Server(held) as server:
        process = child("prompt", *asked(server, *BIG))
        wait_until(lambda: kept() == 50 and len(server.bodies) == 53)
        process.signal(signal.SIGKILL)
        process.wait()
        held.go.set()
        under_way = [json.dumps(body, sort_keys=True) for body in server.bodies[50:]]
        folder = in_tmp / "run"
        assert "same command" in lora_bench("compare", ".").out
        error = refused("train", f"resume={folder}")
        assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "resume", folder)
        assert "lora-bench prompt" in str(error)
        error = refused("prompt", *asked(server, *BIG))
        assert (error.code, error.key, error.value) == (Code.EXISTS, "hydra.run.dir", folder)
        assert "lora-bench prompt" in str(error)
        error = refused("train", "resume=last")
        assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "resume", "last")
        answer = lora_bench("prompt", *asked(server, *BIG, "hydra.run.dir=again"))
    assert answer.code == 0, answer
    assert sorted(server.repeated) == sorted(under_way)  # these three were never answered
    cost = run_folder.read(in_tmp / "again")["cost"]
    assert (cost["cached"], cost["requests"]) == (50, 150)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_waits_for_what_is_under_way(in_tmp: Path, number: signal.Signals, code: int) -> None:
    held = Held(10)
    with Server(held) as server:
        process = child("prompt", *asked(server, *BIG))
        wait_until(lambda: kept() == 10 and len(server.bodies) == 13)
        process.signal(number)
        with pytest.raises(TimeoutError):
            process.wait(0.5)
        held.go.set()
        assert process.wait() == code, process.err
        assert process.err.count("\n") == (1 if code == 130 else 0), process.err
        found = run_folder.read(in_tmp / "run")
        assert (found["status"], found["cost"]["requests"], kept()) == ("interrupted", 13, 13)
        assert lora_bench("prompt", *asked(server, *BIG, "hydra.run.dir=again")).code == 0
    assert server.repeated == []


def test_a_second_interrupt_ends_at_once(in_tmp: Path) -> None:
    held = Held(10)
    with Server(held) as server:
        process = child("prompt", *asked(server, *BIG))
        wait_until(lambda: kept() == 10 and len(server.bodies) == 13)
        process.signal(signal.SIGINT)
        time.sleep(0.5)
        process.signal(signal.SIGINT)
        code = process.wait()
        held.go.set()
    assert (code, process.err.count("\n")) == (130, 1), process.err
    assert run_folder.read(in_tmp / "run")["status"] == "interrupted"


def test_a_key_that_comes_back_is_kept_nowhere(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "horse-battery-staple")
    echo = [completion("horse-battery-staple"), error_reply(500, "horse-battery-staple"), completion("no")]
    with Server(lambda body, number: echo[min(number, 2)]) as server:
        answer = lora_bench("prompt", *asked(server, "llm.api_key_env=MINE"))
    assert answer.code == 0, answer
    assert set(server.keys) == {"Bearer horse-battery-staple"}
    written = {**files_below(in_tmp), **files_below(cache_folder() / "prompt")}
    assert written
    assert not [name for name, content in written.items() if content is not None and b"horse-battery" in content]
    assert "horse-battery" not in answer.out


def test_a_server_that_counts_no_tokens_spends_the_most_there_can_be(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        status, headers, content = completion("no")
        return status, headers, json.dumps(json.loads(content) | {"usage": None}).encode()

    prices = ["llm.input_price=1e6", "llm.output_price=1e6", "llm.max_tokens=null", "llm.logprobs=false"]
    with Server(script) as server:
        error = refused("prompt", *asked(server, *prices, "llm.max_cost=900"))
        assert (error.code, error.key, error.value) == (Code.CONFLICT, "llm.max_cost", 900.0)
        assert "llm.max_tokens" in str(error)
        bound = "+llm.extra.max_completion_tokens=100"
        answer = lora_bench("prompt", *asked(server, *prices, "llm.max_cost=900", bound))
    assert (answer.code, len(server.bodies)) == (1, 2), answer  # each counts some 400: its bytes and 100 tokens
    cost = run_folder.read(in_tmp / "run")["cost"]
    assert (cost["money"], cost["prompt_tokens"]) == (None, None)
    assert 600 < cost["money_spent"] <= 900


def test_a_metric_that_is_none_is_refused_before_anything_is_asked(in_tmp: Path) -> None:
    with Server(lambda body, number: completion("no")) as server:
        error = refused("prompt", *asked(server, "+metric.mine={torchmetric: Nothing, direction: up}"))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "metric.mine.torchmetric", "Nothing")
    assert server.bodies == []


def test_pace_and_concurrency(in_tmp: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()
    times: list[float] = []

    def script(body: dict[str, Any], number: int) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            times.append(time.monotonic())
        time.sleep(0.1)
        with lock:
            running -= 1
        return completion("no")

    with Server(script) as server:
        assert lora_bench("prompt", *asked(server, "llm.concurrency=3")).code == 0
        assert most == 3
        times.clear()
        slowly = asked(server, "llm.requests_per_minute=1200", "prompt=labels", "hydra.run.dir=b")
        assert lora_bench("prompt", *slowly).code == 0
    assert times[-1] - times[1] > 10 * 60 / 1200 * 0.8


def test_prompted_runs_stand_beside_trained_ones(in_tmp: Path) -> None:
    with Server(lambda body, number: completion("no")) as server:
        assert lora_bench("prompt", *asked(server, "hydra.run.dir=all/a")).code == 0
        assert lora_bench("prompt", *asked(server, "hydra.run.dir=all/b", "prompt=few_shot")).code == 0
    (in_tmp / "a.tsv").write_text("id\tlabel\n" + "".join(f"{i}\t1\n" for i in range(12)))
    given = ["predictions=a.tsv", *DATA, "llm.model=old-1"]
    assert "12 answers for validation, 0 " in lora_bench("prompt", *given, "dry_run=true").out
    assert lora_bench("prompt", *given, "hydra.run.dir=all/c").code == 0
    for name in ("lora", "full"):
        trained = toy_run(*DATA, f"adapter={name}", f"hydra.run.dir=all/{name}")
        assert lora_bench("train", *trained).code == 0
    rows = json.loads(lora_bench("compare", "all", "--format", "json").out)
    before = [*rows[0]][: [*rows[0]].index("n")]
    assert before == ["model", "adapter", "prompt", "llm.model", "predictions"]
    assert {tuple(row[key] for key in ("adapter", "prompt", "llm.model")) for row in rows} == {
        ("lora", None, None),
        ("full", None, None),
        (None, "zero_shot", "some-1"),
        (None, "few_shot", "some-1"),
        (None, None, "old-1"),
    }


@pytest.mark.parametrize(
    "command", [["predict", "input=a.tsv"], ["eval", "data=toy"], ["export", "output=b", "format=peft"]]
)
def test_a_prompted_run_leaves_no_model(in_tmp: Path, command: list[str]) -> None:
    (in_tmp / "a.tsv").write_text("id\tlabel\n" + "".join(f"{i}\t1\n" for i in range(12)))
    assert lora_bench("prompt", "predictions=a.tsv", *DATA, "hydra.run.dir=run").code == 0
    error = refused(command[0], "run=run", *command[1:])
    assert (error.code, error.key, str(error.value)) == (Code.UNSUPPORTED, "run", "run")
    assert "lora-bench prompt" in str(error)


def test_answers_from_elsewhere(in_tmp: Path) -> None:
    truth = list(labels().values())
    rows = [{"id": i, "label": label} for i, label in enumerate(truth)]
    rows[3]["label"] = None  # type: ignore[typeddict-item]
    (in_tmp / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    answer = lora_bench("prompt", "predictions=answers.jsonl", *DATA, "hydra.run.dir=run")
    assert answer.code == 0, answer
    found = run_folder.read(in_tmp / "run")
    assert found["answers"] == {"validation": {"given": 11, "absent": 1}}
    assert found["metrics"]["validation/accuracy"] == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    ("text", "row", "named"),
    [
        ("id\tlabel\n0\t1\n", None, "1, 2, 3, 4, 5, …"),
        ("id\tlabel\n0\t1\n0\t1\n", 3, "id 0"),
        ("id\tlabel\n12\t1\n", 2, "id '12'"),
        ("id\tscore\n0\tnan\n", 2, "score 'nan'"),
        ("id\tscore\n0\t1_0\n", 2, "score '1_0'"),
        ("id\tanswer\n0\t1\n", None, "id, answer"),
    ],
)
def test_wrong_files_of_answers(in_tmp: Path, text: str, row: int | None, named: str) -> None:
    (in_tmp / "a.tsv").write_text(text)
    error = refused("prompt", "predictions=a.tsv", *DATA)
    assert (error.code, str(error.file), error.row) == (Code.INVALID_DATA, str(in_tmp / "a.tsv"), row)
    assert named in str(error)


# -- three classes, and numbers --

WORDS = {"robin": "bird", "lion": "big cat", "trout": "fish"}


def classes(folder: Path, server_url: str, *more: str, numbers: bool = False) -> list[str]:
    data = three_classes.write(folder / "data", numbers=numbers)
    of_task = three_classes.NUMBERS if numbers else three_classes.CLASSES
    prompt = "prompt=similarity" if numbers else "prompt=labels"
    given = ["data=files", f"data.path={data}", *of_task, prompt, "llm.model=some-1", f"llm.base_url={server_url}"]
    return overridden([*given, "hydra.run.dir=run"], *more)


def class_asked(body: dict[str, Any]) -> str:
    return next(name for word, name in WORDS.items() if word in body["messages"][-1]["content"])


def test_three_classes_get_probabilities(in_tmp: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        name = class_asked(body)
        answers = [
            completion(name, logprobs={name[:2]: -0.5108256238, "the": -1.2039728043}),
            completion(f"{name.replace(' ', '_').upper()}!"),
            completion(json.dumps({"bird": 1, "big cat": 1, "fish": 1} | {name: 3})),
            completion("It is a dog"),
        ]
        return answers[number % 4]

    with Server(script) as server:
        answer = lora_bench("prompt", *classes(in_tmp, server.url, "llm.concurrency=1"))
    assert (answer.code, answer.err) == (0, ""), answer
    assert "3 answers are none of the labels and count as wrong, for example 'It is a dog'" in answer.out
    assert "Answer bird, big cat or fish, with no other word." in server.bodies[0]["messages"][-1]["content"]
    record = run_folder.read(in_tmp / "run")
    assert record["answers"]["validation"] == {"probabilities": 4, "text": 5, "refused": 0, "unparsable": 3}
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    for i, (label, probabilities) in enumerate(zip(table["label"], table["probabilities"], strict=True)):
        assert sum(probabilities) == pytest.approx(1)
        expected = {2: 0.6, 3: 0.0}.get(i % 4, 1.0)  # "bi" begins two of the words, so the text decides
        if i % 4 == 0 and label == 2:
            expected = 0.6 / 0.7
        assert probabilities[label] == pytest.approx(expected), (i, label)
    assert record["metrics"]["validation/accuracy"] == pytest.approx(9 / 12)
    assert set(record["per_class"]["validation"]) == set(three_classes.NAMES)


@pytest.mark.parametrize(("shots", "counts"), [(6, [2, 2, 2]), (4, [1, 1, 2]), (2, [0, 1, 1])])
def test_examples_of_three_classes_are_balanced(in_tmp: Path, shots: int, counts: list[int]) -> None:
    with Server(lambda body, number: completion(class_asked(body))) as server:
        answer = lora_bench("prompt", *classes(in_tmp, server.url, f"prompt.shots={shots}"))
    assert answer.code == 0, answer
    given = [message["content"] for message in server.bodies[0]["messages"][1:-1:2]]
    assert sorted(given.count(name) for name in three_classes.NAMES) == counts
    assert ("prompt.shots=2 examples show as many of the 3 classes" in answer.out) == (shots == 2)


def test_a_regression_reads_numbers(in_tmp: Path) -> None:
    replies = [completion("0.5"), completion("The score is -0.25."), completion("no idea"), completion("7/9")]
    with Server(lambda body, number: replies[number % 4]) as server:
        shots = ["prompt.shots=4", "llm.concurrency=1"]
        answer = lora_bench("prompt", *classes(in_tmp, server.url, *shots, numbers=True))
    assert (answer.code, answer.err) == (0, ""), answer
    assert "6 answers are no number and count as the mean of train" in answer.out
    messages = server.bodies[0]["messages"]
    assert "from -0.5 (not at all) to 2 (the same)" in messages[-1]["content"]
    given = [float(message["content"]) for message in messages[1:-1:2]]
    assert len(given) == 4
    assert min(given) < 0.5 < 1 <= max(given)
    record = run_folder.read(in_tmp / "run")
    assert record["answers"]["validation"] == {"probabilities": 0, "text": 6, "refused": 0, "unparsable": 6}
    files = ["data=files", f"data.path={in_tmp / 'data'}", *three_classes.NUMBERS]
    data, splits = sources.load(build_data(composed(*files, name="prompt").data))
    train, _ = sources.split_selection(splits["train"], data)
    assert train.labels is not None
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    assert table["score"] == pytest.approx([0.5, -0.25, train.labels.mean(), train.labels.mean()] * 3)
    assert "validation/spearman" in record["metrics"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prompt=zero_shot", (Code.MISMATCH, "prompt.answers")),
        ("prompt.answers=[a,b]", (Code.MISMATCH, "prompt.answers")),
        ("prompt.answers=[a-b,A b,c]", (Code.INVALID_VALUE, "prompt.answers")),
        ("prompt.answers=[a,b,'?']", (Code.INVALID_VALUE, "prompt.answers")),
        ("prompt.shots=100", (Code.INVALID_VALUE, "prompt.shots")),
        ("prompt.template='{fields} {label_3}'", (Code.INVALID_SYNTAX, "prompt.template")),
        ("prompt.template='{fields} {min}'", (Code.INVALID_SYNTAX, "prompt.template")),
    ],
)
def test_wrong_requests_about_three_classes(in_tmp: Path, override: str, expected: tuple[Code, str]) -> None:
    error = refused("prompt", *classes(in_tmp, NOBODY, override))
    assert (error.code, error.key) == expected


def test_wrong_requests_about_numbers(in_tmp: Path) -> None:
    for override, key in (("prompt.answers=[a,b]", "prompt.answers"), ("prompt.shots=100", "prompt.shots")):
        assert refused("prompt", *classes(in_tmp, NOBODY, override, numbers=True)).key == key
    error = refused("prompt", *classes(in_tmp, NOBODY, "prompt=labels", numbers=True))
    assert (error.code, error.key) == (Code.INVALID_SYNTAX, "prompt.template")


TRUTH = [(i + 100) % 3 for i in range(12)]


@pytest.mark.parametrize(
    ("name", "row_of"),
    [
        ("a.jsonl", lambda y: {"label": y}),
        ("a.parquet", lambda y: {"label": float(y)}),
        ("a.csv", lambda y: {"label": three_classes.NAMES[y]}),
        ("a.tsv", lambda y: {"label": 0, "predicted_label": y}),
        ("a.tsv", lambda y: {"label": "", "probabilities": json.dumps([0.6 if c == y else 0.2 for c in range(3)])}),
        ("a.parquet", lambda y: {"probabilities": [0.6 if c == y else 0.2 for c in range(3)]}),
        (
            "a.csv",
            lambda y: {f"p_{name}": 0.6 if c == y else 0.2 for c, name in enumerate(("bird", "big_cat", "fish"))},
        ),
    ],
)
def test_predictions_of_three_classes_from_elsewhere(
    in_tmp: Path, name: str, row_of: Callable[[int], dict[str, Any]]
) -> None:
    rows = [{"id": i, **row_of(y)} for i, y in enumerate(TRUTH)]
    if name.endswith(("csv", "tsv")):
        rows = [{key: str(value) for key, value in row.items()} for row in rows]
    put(in_tmp / name, rows)
    data = classes(in_tmp, NOBODY, f"predictions={name}")
    answer = lora_bench("prompt", *(each for each in data if not each.startswith(("llm.", "prompt="))))
    assert answer.code == 0, answer
    record = run_folder.read(in_tmp / "run")
    assert record["metrics"]["validation/accuracy"] == 1.0
    table = pq.read_table(in_tmp / "run" / "predictions" / "validation.parquet").to_pydict()
    assert table["label"] == TRUTH
    expected = 0.6 if "probabilities" in rows[0] or "p_bird" in rows[0] else 1.0
    assert [max(each) for each in table["probabilities"]] == pytest.approx([expected] * 12)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("id\tscore\n0\t1\n", None),
        ("id\tlabel\n0\tdog\n", 2),
        ("id\tlabel\n0\t\n1\t3\n", 3),
        ("id\tprobabilities\n0\t[0.5,0.5]\n", 2),
        ("id\tprobabilities\n0\t[0.5,0.5,0.5]\n", 2),
        ("id\tprobabilities\n0\t[0.5,0.5,NaN]\n", 2),
        ("id\tprobabilities\n0\t0.5\n", 2),
        ("id\tp_bird\tp_big_cat\tp_fish\n0\t1\t0\t\n", 2),
        ("id\tprediction\n0\t1\n", None),
    ],
)
def test_wrong_files_of_three_classes(in_tmp: Path, text: str, row: int | None) -> None:
    (in_tmp / "a.tsv").write_text(text)
    error = refused("prompt", *classes(in_tmp, NOBODY, "predictions=a.tsv"))
    assert (error.code, str(error.file), error.row) == (Code.INVALID_DATA, str(in_tmp / "a.tsv"), row)


@pytest.mark.parametrize("text", ["id\tlabel\n0\t1\n", "id\tscore\n0\tnan\n", "id\tprediction\n0\thigh\n"])
def test_wrong_files_of_numbers(in_tmp: Path, text: str) -> None:
    (in_tmp / "a.tsv").write_text(text)
    error = refused("prompt", *classes(in_tmp, NOBODY, "predictions=a.tsv", numbers=True))
    assert (error.code, str(error.file)) == (Code.INVALID_DATA, str(in_tmp / "a.tsv"))


def test_predicted_numbers_from_elsewhere(in_tmp: Path) -> None:
    rows = "".join(f"{i}\t{'' if i == 3 else i % 3 - 0.5 * (i % 2)}\t9\n" for i in range(12))
    (in_tmp / "a.tsv").write_text(f"id\tprediction\tscore\n{rows}")
    answer = lora_bench("prompt", *classes(in_tmp, NOBODY, "predictions=a.tsv", numbers=True))
    assert answer.code == 0, answer
    record = run_folder.read(in_tmp / "run")
    assert record["answers"] == {"validation": {"given": 11, "absent": 1}}
    assert 0.8 < record["metrics"]["validation/pearson"] < 1
