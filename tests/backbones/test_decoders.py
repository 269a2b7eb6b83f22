"""Decoders as classifiers: a padding token is chosen, and the head reads the last token of a text."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_bench
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.adapters.targets import match_targets
from lora_bench.backbones.conv1d import replace_conv1d
from lora_bench.errors import Code
from lora_bench.records.job import Job
from lora_bench.train import train
from lora_bench.training.padding import check_padding
from tests.adapters.tools import adapter, stir
from tests.backbones.tools import END, byte_tokenizer, enliven, make, model_settings, random_batch, save
from tests.command_line import lora_bench as command_line
from tests.command_line import refused, refuses
from tests.helpers import SMALL_TOY, composed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
"""Sizes of decoders in which attention heads share keys and values."""
DECODERS: Mapping[str, Mapping[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "mistral": GROUPED,
    "smollm3": GROUPED,
    "phi": SIZES,
    "gpt_neox": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 160},
}  # fmt: skip
"""Sizes of a tiny random decoder by its model type."""


def config_of(model_type: str, tokenizer: Any) -> Any:
    """Return the config of a tiny decoder, which names no padding token."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **DECODERS[model_type])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return a folder with a tiny random language model for each type; its tokenizer names an end token only."""
    tokenizer = byte_tokenizer(eos_token=END)
    root = tmp_path_factory.mktemp("decoders")
    return {
        model_type: save(
            root / model_type,
            enliven(transformers.AutoModelForCausalLM.from_config(config_of(model_type, tokenizer))),
            tokenizer,
        )
        for model_type in DECODERS
    }


# -- padding --


def llama_folder(place: Path, **special_tokens: str) -> Path:
    """Save a tiny Llama with a tokenizer of these special tokens, and return its folder."""
    tokenizer = byte_tokenizer(**special_tokens)
    config = config_of("llama", tokenizer)
    folder = save(place, enliven(transformers.LlamaForCausalLM(config)), tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # LlamaTokenizer adds special tokens of its own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("special_tokens", "token", "noted"),
    [
        ({"unk_token": "<unk>", "eos_token": END, "pad_token": "<pad>"}, "<pad>", False),
        ({"unk_token": "<unk>", "eos_token": END}, END, True),
    ],
)
def test_the_padding_token_is_the_named_one_else_the_end_token(
    tmp_path: Path, special_tokens: dict[str, str], token: str, noted: bool
) -> None:
    backbone = make("auto", f"model.path={llama_folder(tmp_path, **special_tokens)}")
    assert backbone.tokenizer.pad_token == token
    assert backbone.network.config.pad_token_id == backbone.tokenizer.convert_tokens_to_ids(token)
    assert any(token in note for note in backbone.notes) == noted
    check_padding(backbone)
    assert len(backbone.notes) == noted


def test_a_tokenizer_without_padding_and_end_token_is_refused(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, unk_token="<unk>")
    with refuses(Code.UNSUPPORTED, key="model.tokenizer") as caught:
        make("auto", f"model.path={folder}")
    assert caught.value.value == str(folder)
    assert "pad_token" in str(caught.value.remedy)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_side_on_which_a_tokenizer_pads_changes_no_score(
    folders: Mapping[str, Path], tmp_path: Path, model_type: str, side: str
) -> None:
    tokenizer = byte_tokenizer(eos_token=END)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    backbone = make("auto", f"model.path={folders[model_type]}", f"model.tokenizer={tmp_path}")
    check_padding(backbone)
    assert [note for note in backbone.notes if "differently in a batch" in note] == []
    assert backbone.network.config.pad_token_id == backbone.tokenizer.pad_token_id


# -- every type --


@pytest.mark.parametrize("model_type", DECODERS)
def test_attention_and_mlp_are_adapted_and_neither_embeddings_nor_heads(
    folders: Mapping[str, Path], model_type: str
) -> None:
    backbone = make("auto", f"model.path={folders[model_type]}")
    targets = match_targets(backbone, "all", "all")
    weights = {name for name, p in backbone.network.named_parameters() if p.ndim > 1}
    outside = {name for name in weights if "embed" in name or name.endswith(("wte.weight", "wpe.weight"))}
    assert {f"{name}.weight" for name in targets} == weights - outside - {"score.weight"}
    assert backbone.new_parameters == {"score.weight"}
    assert len(backbone.layers) == 2


def trained(folder: Path, *overrides: str) -> Path:
    """Train five steps of LoRA into a folder, and return it."""
    settings = ["model=auto", *SMALL_TOY, "data.max_length=160", "trainer.max_steps=5", "optimizer.lr=0.02"]
    job = Job(composed(*settings, *overrides), folder, {"model": "m", "adapter": "a", "data": "d"}, [])
    train(job, console=Console(file=io.StringIO()))
    return folder


TEXTS = ["Is it?", "What is the best way to learn a language in a year, and at which age?", "Why not?", ""]
PAIRS = [*zip(TEXTS, reversed(TEXTS), strict=True), ("", "")]


# -- linears that store their weights transposed --


def test_a_replaced_conv1d_computes_and_saves_the_same() -> None:
    network = nn.Sequential(enliven(Conv1D(5, 3)))
    state, x = {name: p.clone() for name, p in network.state_dict().items()}, torch.randn(2, 4, 3)
    expected = network(x)
    replace_conv1d(network)
    (linear,) = network
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features, linear.weight.shape) == (3, 5, (5, 3))
    torch.testing.assert_close(network(x), expected, atol=1e-6, rtol=0)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(network.state_dict()[name], p) for name, p in state.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("adapter", "modules"),
    [
        ("dora", "qv"),
        pytest.param("lora", "all", marks=pytest.mark.matrix),
        pytest.param("vera", "all", marks=pytest.mark.matrix),
    ],
)
def test_an_exported_gpt2_gives_the_scores_of_the_run(
    folders: Mapping[str, Path], tmp_path: Path, adapter: str, modules: str
) -> None:
    base = folders["gpt2"]
    folder = trained(tmp_path / "run", f"model.path={base}", f"adapter={adapter}", f"adapter.target_modules={modules}")
    run = lora_bench.load(folder)
    for form in ("merged", "peft"):
        output = tmp_path / form
        assert command_line("export", f"run={folder}", f"format={form}", f"output={output}").code == 0
        source = output if form == "merged" else base
        network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(source)
        if form == "peft":
            network = peft.PeftModel.from_pretrained(network, output)
        with torch.no_grad():
            rows = [run.pack.backbone.tokenizer(*pair, return_tensors="pt").input_ids for pair in PAIRS[:-1]]
            scores = [float(network.eval()(input_ids=row).logits.softmax(1)[0, 1]) for row in rows]
        np.testing.assert_allclose(scores, run.predict(PAIRS[:-1]), atol=1e-6)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # of every AdaLoRA
@pytest.mark.parametrize("method", ["adalora", "dora", "hira", "lora", "lora_xs", "miss", "pissa", "vera"])
def test_peft_reads_every_method_that_is_written_for_it_beside_transposed_weights(
    folders: Mapping[str, Path], tmp_path: Path, method: str
) -> None:
    made = stir(Pack(make("gpt2", f"model.path={folders['gpt2']}"), [Member(adapter(method), 0)])).eval()
    files.save(tmp_path, made, 0, "", for_peft=True)
    if method == "miss":
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] is None
        return
    batch = random_batch(made.backbone, padded=False)
    network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folders["gpt2"])
    theirs = peft.PeftModel.from_pretrained(network, tmp_path).eval()
    logits = torch.cat([theirs(input_ids=row[None]).logits for row in batch.input_ids])
    torch.testing.assert_close(logits, made(batch)[0], atol=1e-5, rtol=0)


def test_miss_beside_transposed_weights_is_not_exported_to_peft(folders: Mapping[str, Path], tmp_path: Path) -> None:
    options = ["adapter=miss", "adapter.rank=8", "trainer.max_steps=1"]
    folder = trained(tmp_path / "run", f"model.path={folders['gpt2']}", *options)
    error = refused("export", f"run={folder}", "format=peft", f"output={tmp_path / 'peft'}")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "format", "peft")
    assert not (tmp_path / "peft").exists()
    assert command_line("export", f"run={folder}", "format=merged", f"output={tmp_path / 'merged'}").code == 0


def test_peft_has_no_form_for_vera_on_a_part_of_a_linear(folders: Mapping[str, Path], tmp_path: Path) -> None:
    options = ["adapter=vera", "adapter.target_modules=qv", "trainer.max_steps=1"]
    folder = trained(tmp_path / "run", f"model.path={folders['gpt_neox']}", *options)
    answer = command_line("export", f"run={folder}", "format=peft", f"output={tmp_path / 'peft'}")
    assert answer.code == 2
    assert "format=merged" in answer.err


# -- choices --


@pytest.mark.parametrize("choice", ["llama", "qwen", "gemma", "mistral", "gpt2", "smollm"])
def test_a_named_choice_loads_any_folder_of_its_family(folders: Mapping[str, Path], choice: str) -> None:
    settings = model_settings(choice)
    assert settings.family == "auto"
    assert settings.hub_id
    folder = folders.get(choice, folders["llama"])
    assert len(make(choice, f"model.path={folder}").layers) == 2
