"""Linears that compute query, key and value at once: `qv` adapts two of the three, for every layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.adapters.targets import match_targets
from lora_bench.backbones import fused_linear, tiny_tokenizers
from lora_bench.backbones.auto import Auto
from lora_bench.errors import Code
from tests.adapters.tools import adapter, stir
from tests.backbones.tools import enliven, random_batch
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FUSED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": SIZES,
    "modernbert": SIZES,
    "phi3": {**SIZES, "num_key_value_heads": 2},
    "persimmon": SIZES,
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
"""Sizes by model type, of those whose attention can be replaced."""


def network_of(model_type: str, attention: str = "eager") -> Any:
    tokenizer = tiny_tokenizers.tokenizer("roberta")
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **FUSED[model_type])
    network = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return enliven(network).eval()


def make(model_type: str, attention: str = "eager") -> Auto:
    return Auto(network_of(model_type, attention), tiny_tokenizers.tokenizer("roberta"), set())


@pytest.mark.parametrize("model_type", FUSED)
@torch.no_grad()
def test_qv_changes_queries_and_values_and_no_keys(model_type: str) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen.append((query, key, value))
        options.setdefault("scaling", query.shape[-1] ** -0.5)
        repeats = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(repeats, 1) for t in (key, value))
        scores = (query @ keys.transpose(2, 3) * options["scaling"]).softmax(-1)
        return (scores @ values).transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    backbone = make(model_type, "recorded")
    batch = random_batch(backbone, padded=False)
    seen.clear()  # of the observation at construction
    backbone.run_network(batch)
    before = seen[0]
    for part, changed in (("q", (True, False, False)), ("v", (False, False, True)), ("qv", (True, False, True))):
        pattern = part if part == "qv" else rf".*\.{part}"
        pack = stir(Pack(backbone, [Member(adapter("lora", f"target_modules={pattern}"), 0)]))
        seen.clear()
        pack(batch)
        assert tuple(not torch.allclose(a, b, atol=1e-6) for a, b in zip(before, seen[0], strict=True)) == changed
        pack.detach()


@pytest.mark.parametrize("model_type", FUSED)
def test_a_part_is_adapted_instead_of_the_whole_and_not_besides(model_type: str) -> None:
    backbone = make(model_type)
    qv = match_targets(backbone, "qv", "all")
    assert [name.rpartition(".")[2] for name in qv] == ["q", "v"] * 2
    owner = qv[0].rpartition(".")[0]
    for pattern in ("all", ".*", rf".*{owner.rpartition('.')[2]}.*"):
        assert owner in match_targets(backbone, pattern, "all")
        assert not [name for name in match_targets(backbone, pattern, "all") if name.endswith((".q", ".v"))]


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera", "adalora", "lora_xs", "bitfit", "qlora"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_member_equals_the_network_with_its_merged_weights(model_type: str, method: str) -> None:
    rank = [] if method == "bitfit" else ["rank=4"]
    members = [Member(adapter(method, "target_modules=qv", *rank), seed) for seed in (0, 1)]
    backbone = make(model_type)
    batch, logits = random_batch(backbone), []
    for batched in (False, True):
        pack = stir(Pack(backbone, members, batched=batched))
        logits.append(pack(batch))
        pack.detach()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    pack = stir(Pack(backbone, members))
    merged, head = pack.merged(1), pack.head_parameters(1)
    assert not [name for name in merged if name.endswith((".q.weight", ".v.weight"))]
    pack.detach()
    for name, tensor in {**merged, **head}.items():
        module, _, key = name.rpartition(".")
        getattr(backbone.network.get_submodule(module), key).copy_(tensor)
    torch.testing.assert_close(backbone.run_network(batch).logits, logits[0][1], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3"])
@torch.no_grad()
def test_peft_computes_the_scores_of_an_exported_adapter(tmp_path: Path, model_type: str, method: str) -> None:
    pack = stir(Pack(make(model_type), [Member(adapter(method, "target_modules=qv", "rank=4"), 0)]))
    batch = random_batch(pack.backbone, padded=False)
    expected = pack(batch)[0]
    files.save(tmp_path / "peft", pack, 0, "", for_peft=True)
    files.save(tmp_path / "own", pack, 0, "")
    network: Any = peft.PeftModel.from_pretrained(network_of(model_type), tmp_path / "peft").eval()
    torch.testing.assert_close(network(**pack.backbone.inputs(batch)).logits, expected, atol=1e-5, rtol=0)
    pack.detach()
    again = Pack(pack.backbone, [Member(adapter(method, "target_modules=qv", "rank=4"), 0)])
    files.load(tmp_path / "own", again, 0)
    torch.testing.assert_close(again(batch)[0], expected, atol=1e-6, rtol=0)


def test_a_fused_linear_of_unknown_layout_is_refused_with_the_names_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "LAYOUTS", {})
    with refuses(Code.NO_MATCH, key="target_modules") as caught:
        match_targets(make("gpt2"), "qv", "all")
    assert "transformer.h.*.attn.c_attn" in str(caught.value.remedy)
