"""`lora-bench prompt` against a real OpenAI-compatible server: `transformers serve` with a tiny language model."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from lora_bench.records import run_folder
from tests.command_line import lora_bench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUIREMENTS = ("fastapi", "uvicorn", "openai", "pydantic")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, REQUIREMENTS)), reason=f"transformers serve needs {', '.join(REQUIREMENTS)}"
    ),
]


def make_language_model(folder: Path) -> tuple[int, int]:
    """Save a random byte-level Llama with tokenizer and chat template; return the ids of its tokens no and yes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.add_tokens(["no", "yes"])
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    eos = fast.eos_token_id
    config = LlamaConfig(vocab_size=len(fast), initializer_range=1.0, eos_token_id=eos, pad_token_id=eos, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    no, yes = fast.convert_tokens_to_ids(["no", "yes"])
    return no, yes


@dataclass
class RunningServer:
    url: str
    model: str
    words: tuple[int, int]
    log: Path

    @property
    def requests(self) -> int:
        """The number of requested completions in the server's log."""
        return len(re.findall("POST /v1/chat/completions", self.log.read_text()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    top = tmp_path_factory.mktemp("served")
    words = make_language_model(top / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", str(top / "model"), "--host", "127.0.0.1"]
    log = top / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--device", "cpu"], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield RunningServer(f"http://127.0.0.1:{port}/v1", str(top / "model"), words, log)
    finally:
        process.kill()
        process.wait()


def test_a_terminated_run_is_repeated_with_cached_answers(
    in_tmp: Path, served: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path_factory.mktemp("answers")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    no, yes = served.words
    bias = f"+llm.extra.logit_bias={{{no}: 100.0, {yes}: 100.0}}"  # the model answers with one of the two
    arguments = [
        *("prompt", f"llm.model={served.model}", f"llm.base_url={served.url}", bias, "llm.max_tokens=1"),
        *("data=toy", "data.train_rows=40", "data.validation_rows=200", "prompt=few_shot", "prompt.shots=2"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_bench", *arguments, "hydra.run.dir=stopped"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while served.requests < 50:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    stopped = run_folder.read(in_tmp / "stopped")
    assert stopped["status"] == "interrupted"
    assert stopped["cost"]["requests"] < 200

    answer = lora_bench(*arguments, "hydra.run.dir=run")
    assert answer.code == 0, answer
    record = run_folder.read(in_tmp / "run")
    assert record["cost"]["cached"] == stopped["cost"]["requests"]
    assert record["cost"]["cached"] + record["cost"]["requests"] == 200
    assert served.requests == 200  # every pair once
    assert record["answers"]["validation"] == {"probabilities": 0, "text": 200, "refused": 0, "unparsable": 0}
    assert record["cost"]["completion_tokens"] == 200
    assert "no log-probabilities" in answer.out
    repeated = lora_bench(*arguments, "hydra.run.dir=repeated")
    assert (repeated.code, served.requests) == (0, 200)
    assert run_folder.read(in_tmp / "repeated")["metrics"] == record["metrics"]


def test_unparsable_answers_count_as_wrong(in_tmp: Path, served: RunningServer) -> None:
    arguments = [f"llm.model={served.model}", f"llm.base_url={served.url}", "llm.max_tokens=2", "hydra.run.dir=run"]
    answer = lora_bench("prompt", *arguments, "data=toy", "data.train_rows=40", "data.validation_rows=8")
    assert answer.code == 0, answer
    record = run_folder.read(in_tmp / "run")
    assert record["answers"]["validation"]["unparsable"] == 8
    assert record["metrics"]["validation/accuracy"] == 0.0
