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

NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"transformers serve needs {', '.join(NEEDED)}"),
]


def make_language_model(folder: Path) -> tuple[int, int]:
    """A random Llama that reads bytes, saved with tokenizer and chat template; the ids of its words no and yes."""
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
class Served:
    url: str
    model: str
    words: tuple[int, int]
    log: Path

    @property
    def requests(self) -> int:
        """Completions that it was asked for, by its own log."""
        return len(re.findall("POST /v1/chat/completions", self.log.read_text()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
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
        yield Served(f"http://127.0.0.1:{port}/v1", str(top / "model"), words, log)
    finally:
        process.kill()
        process.wait()


def test_two_hundred_pairs_stopped_and_run_again(
    in_tmp: Path, served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path_factory.mktemp("answers")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    no, yes = served.words
    bias = f"+llm.extra.logit_bias={{{no}: 100.0, {yes}: 100.0}}"  # so that the model says one of the two
    asked = [
        *("prompt", f"llm.model={served.model}", f"llm.base_url={served.url}", bias, "llm.max_tokens=1"),
        *("data=toy", "data.train_rows=40", "data.validation_rows=200", "prompt=few_shot", "prompt.shots=2"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_bench", *asked, "hydra.run.dir=stopped"],
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

    answer = lora_bench(*asked, "hydra.run.dir=run")
    assert answer.code == 0, answer
    found = run_folder.read(in_tmp / "run")
    assert found["cost"]["cached"] == stopped["cost"]["requests"]
    assert found["cost"]["cached"] + found["cost"]["requests"] == 200
    assert served.requests == 200  # none of them twice
    assert found["answers"]["validation"] == {"probabilities": 0, "text": 200, "refused": 0, "unparsable": 0}
    assert found["cost"]["completion_tokens"] == 200
    assert "no log-probabilities" in answer.out
    again = lora_bench(*asked, "hydra.run.dir=again")
    assert (again.code, served.requests) == (0, 200)
    assert run_folder.read(in_tmp / "again")["metrics"] == found["metrics"]


def test_a_model_that_says_neither_word_is_always_wrong(in_tmp: Path, served: Served) -> None:
    asked = [f"llm.model={served.model}", f"llm.base_url={served.url}", "llm.max_tokens=2", "hydra.run.dir=run"]
    answer = lora_bench("prompt", *asked, "data=toy", "data.train_rows=40", "data.validation_rows=8")
    assert answer.code == 0, answer
    found = run_folder.read(in_tmp / "run")
    assert found["answers"]["validation"]["unparsable"] == 8
    assert found["metrics"]["validation/accuracy"] == 0.0
