"""Decoders in words: the scores of the label words are those that transformers computes for the same prompt."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from rich.console import Console

import lora_bench
from lora_bench.data.batching import collate
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import tokenize
from lora_bench.errors import Code
from lora_bench.records.job import Job
from lora_bench.train import train
from tests.backbones.test_decoders import config_of
from tests.backbones.tools import END, byte_tokenizer, enliven, make, model_settings, save, spread
from tests.command_line import lora_bench as command_line
from tests.command_line import refused, refuses
from tests.helpers import SMALL_TOY, composed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_bench.data.batching import Batch

FIRST = ["Is it?", "What is the best way to learn a language?", ""]
SECOND = ["Why not?", "How", "Is it not so?"]
COLUMNS = ["question1", "question2"]
PROMPTS = [f"question1: {one}\nquestion2: {other}\nanswer:" for one, other in zip(FIRST, SECOND, strict=True)]
CUE = 'model.template="{fields}\nanswer:\n"'
"""A template after which a byte tokenizer gives words first tokens that differ: no space begins them."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return a folder with a tiny random language model for each type; that of Llama pads on the left."""
    root = tmp_path_factory.mktemp("decoders")
    folders = {}
    for model_type in ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt"):
        tokenizer = byte_tokenizer(eos_token=END)
        tokenizer.padding_side = "left" if model_type == "llama" else "right"
        config = config_of(model_type, tokenizer)
        config.final_logit_softcapping = 1.0
        network = enliven(transformers.AutoModelForCausalLM.from_config(config))
        folders[model_type] = save(root / model_type, network, tokenizer)
    return folders


def in_words(folder: Path, *overrides: str) -> Any:
    return make("gemma", f"model.path={folder}", "model.form=text_to_text", *overrides)


def batch_of(backbone: Any, length: int = 160) -> Batch:
    table = tokenize(Examples(np.arange(3), (FIRST, SECOND), None), COLUMNS, backbone, length, cached=False)
    return collate(table, np.arange(3), int(table.lengths.max()), backbone.tokenizer.pad_token_id)


def logits_of(backbone: Any, batch: Batch) -> torch.Tensor:
    return backbone.suffix(backbone.prefix(batch, 0), batch, 0)


def next_scores(backbone: Any, text: str, following: list[int]) -> torch.Tensor:
    """Return the language model's scores (V,) after a text and these tokens, by transformers alone."""
    ids = torch.tensor([[*backbone.tokenizer(text)["input_ids"], *following]])
    return backbone.network(input_ids=ids).logits[0, -1]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt"])
@torch.no_grad()
def test_logits_are_the_scores_of_the_first_tokens_after_the_prompt(
    folders: Mapping[str, Path], model_type: str
) -> None:
    backbone = in_words(folders[model_type], CUE)
    tokens = backbone.tokenizer.convert_tokens_to_ids(["n", "d"])  # not_duplicate, duplicate
    logits = logits_of(backbone, batch_of(backbone))
    expected = torch.stack([next_scores(backbone, f"{prompt}\n", [])[tokens] for prompt in PROMPTS])
    assert spread(expected) > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert list(backbone.head_modules) == []
    assert not any("embed" in name or "lm_head" in name for name in backbone.linears())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt"])
@torch.no_grad()
def test_words_that_begin_alike_are_scored_whole(folders: Mapping[str, Path], model_type: str) -> None:
    """Each word follows a space, which is a token of its own here, so all words begin alike."""
    words = ["no", "none", "not one", "yes"]
    backbone = in_words(folders[model_type])
    backbone.name_labels([words])
    assert backbone.reads_tree
    end = backbone.tokenizer.eos_token_id
    paths = [[*backbone.tokenizer(f" {word}")["input_ids"], end] for word in words]
    expected = torch.zeros(len(PROMPTS), len(words))
    for row, prompt in enumerate(PROMPTS):
        for c, path in enumerate(paths):
            for i, token in enumerate(path):
                possible = sorted({other[i] for other in paths if other[:i] == path[:i]})
                scores = next_scores(backbone, prompt, path[:i])[possible]
                expected[row, c] += scores.log_softmax(-1)[possible.index(token)]
    assert spread(expected) > 0.01
    batch = batch_of(backbone)
    torch.testing.assert_close(logits_of(backbone, batch), expected, atol=1e-5, rtol=0)
    backbone.reads_tree = False
    torch.testing.assert_close(logits_of(backbone, batch), expected, atol=1e-5, rtol=0)
    assert backbone.max_tokens == 160 - len(" not one")


def test_truncation_shortens_the_texts_and_keeps_the_template(folders: Mapping[str, Path]) -> None:
    backbone = in_words(folders["gpt2"])
    batch = batch_of(backbone, 54)
    rows = [row[mask.bool()] for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    names = ["".join(backbone.tokenizer.convert_ids_to_tokens(row)) for row in rows]
    decoded = [name.replace("Ġ", " ").replace("Ċ", "\n") for name in names]
    assert (decoded[0], decoded[2]) == (PROMPTS[0], PROMPTS[2])
    assert len(rows[1]) == 54
    kept = "\nquestion2: How\nanswer:"
    assert decoded[1] == PROMPTS[1][: 54 - len(kept)] + kept
    with refuses(Code.CONFLICT, key="data.max_length"):
        batch_of(backbone, 30)


def test_a_chat_template_wraps_the_text_and_begins_the_reply(folders: Mapping[str, Path], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos_token=END)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chat = (f"model.tokenizer={tmp_path}", "model.chat_template=true")
    backbone = in_words(folders["gpt2"], *chat)
    (text, *_), _ = backbone.render([("a", ["x"]), ("b", ["y"])])
    assert text == "<user>a: x\nb: y\nanswer:</><assistant>\n"
    assert backbone.words[0].first_tokens == tokenizer.convert_tokens_to_ids(["n", "d"])  # no space after a new line
    with refuses(Code.UNSUPPORTED, key="model.chat_template"):
        in_words(folders["gpt2"], "model.chat_template=true")


# -- runs --


def trained(folder: Path, *overrides: str) -> Path:
    """Train three steps of LoRA into a folder, and return it."""
    settings = [*SMALL_TOY, "data.max_length=160", "trainer.max_steps=3", "optimizer.lr=0.02"]
    job = Job(composed(*settings, *overrides), folder, {"model": "m", "adapter": "a", "data": "d"}, [])
    train(job, console=Console(file=io.StringIO()))
    return folder


PAIRS = list(zip(FIRST, SECOND, strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2"])
def test_a_run_in_words_predicts_the_same_reloaded_alone_and_exported(
    folders: Mapping[str, Path], tmp_path: Path, model_type: str
) -> None:
    base = folders[model_type]
    folder = trained(tmp_path / "run", "model=gemma", f"model.path={base}", "model.form=text_to_text", CUE)
    run = lora_bench.load(folder)
    together = run.predict(PAIRS)
    assert all(update.lora_B.abs().max() > 0 for update in run.pack.updates[0].values())
    np.testing.assert_allclose(np.concatenate([run.predict([pair]) for pair in PAIRS]), together, atol=1e-6)
    tokens = run.pack.backbone.words[0].first_tokens
    for form in ("merged", "peft"):
        output = tmp_path / form
        answer = command_line("export", f"run={folder}", f"format={form}", f"output={output}")
        assert "AutoModelForCausalLM" in answer.out
        readme = (output / "README.md").read_text(encoding="utf-8")
        assert "answer:" in readme
        assert ", ".join(map(str, tokens)) in readme
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(output if form == "merged" else base)
        if form == "peft":
            network = peft.PeftModel.from_pretrained(network, output)
        tokenizer = transformers.AutoTokenizer.from_pretrained(output)
        with torch.no_grad():
            rows = [tokenizer(f"{prompt}\n", return_tensors="pt").input_ids for prompt in PROMPTS]
            scores = [network.eval()(input_ids=row).logits[0, -1, tokens].softmax(-1)[1].item() for row in rows]
        np.testing.assert_allclose(scores, together, atol=1e-5)


# -- refusals --


def test_encoders_and_models_without_a_language_model_are_refused(tmp_path: Path) -> None:
    with refuses(Code.CONFLICT, key="model.form"):
        model_settings("deberta", "model.form=text_to_text")
    config = transformers.ElectraConfig(
        vocab_size=300, embedding_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    save(tmp_path, transformers.ElectraForSequenceClassification(config), byte_tokenizer(eos_token=END))
    with refuses(Code.UNSUPPORTED, key="model.form"):
        in_words(tmp_path)


def test_wrong_words_are_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    with refuses(Code.INVALID_VALUE, key="model.label_words"):
        in_words(folders["gpt2"]).name_labels([["no", "no"]])
    with refuses(Code.CONFLICT, key="model.form"):
        in_words(folders["gpt2"]).name_labels([None])
    backend = byte_tokenizer(unk_token="<unk>", eos_token=END).backend_tokenizer
    words = {word: i for word, i in backend.get_vocab().items() if word not in "xyz"}
    ids = {word: i for i, word in enumerate(sorted(words, key=words.__getitem__))}
    backend.model = type(backend.model)(ids, [], unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=END)
    tokenizer.save_pretrained(tmp_path)
    with refuses(Code.INVALID_VALUE, key="model.label_words"):
        in_words(folders["gpt2"], f"model.tokenizer={tmp_path}", "model.label_words=[no,yes]")


def test_an_adapter_of_a_decoder_needs_its_template(folders: Mapping[str, Path], in_tmp: Path) -> None:
    """Nothing in the adapter's files says how the two texts were joined."""
    base = folders["gpt2"]
    folder = trained(in_tmp / "run", "model=gpt2", f"model.path={base}")
    assert command_line("export", f"run={folder}", "format=peft", "output=adapter").code == 0
    asked = ("peft=adapter", "data=toy", "data.validation_rows=16", "data.max_length=160")
    error = refused("eval", *asked)
    assert (error.code, error.key) == (Code.UNSUPPORTED, "peft")
    assert "model.template" in str(error)
    answer = command_line("eval", *asked, "model=gpt2", f"model.path={base}", "output=scores")
    assert answer.code == 0, answer
