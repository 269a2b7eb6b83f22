"""Networks that are cut between layers: prefix and suffix make what the whole network makes, at every depth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.auto import Auto
from lora_bench.training.prefix_cache import PrefixCache
from tests.adapters.tools import adapter, assert_close, optimizer, tables, trainer
from tests.backbones.tools import cut_logits, enliven, random_batch, reference, spread
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.data.batching import Batch

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
STACKS = {f"{stack}_{name}": n for stack in ("encoder", "decoder") for name, n in
          {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16}
ARCHITECTURES: Mapping[str, tuple[Mapping[str, Any], set[int]]] = {
    "distilbert": ({"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}, {1, 2, 3}),
    "electra": ({**SIZES, "embedding_size": 16}, {1, 2, 3}),
    "albert": ({**SIZES, "embedding_size": 16}, {1}),  # one layer, called three times
    "mpnet": (SIZES, {1, 2, 3}),
    "xlm-roberta": (SIZES, {1, 2, 3}),
    "deberta-v2": ({**SIZES, **RELATIVE, "conv_kernel_size": 3, "conv_act": "gelu"}, {1, 2, 3}),
    "modernbert": ({**SIZES, "local_attention": 8}, {1, 2, 3}),
    # The decoder reads the encoder's output in every layer, so it is cut before its first layer and behind its last.
    "bart": ({"d_model": 32, "max_position_embeddings": 64, "eos_token_id": 2, **STACKS}, {1, 2, 4}),
    "xlm": ({"emb_dim": 32, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 64}, {1, 2, 3}),
    "funnel": ({"block_sizes": [2, 2], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64}, {1, 2}),  # pools then
    "longformer": ({**SIZES, "attention_window": 4}, set()),  # it pads rows to whole windows
    "convbert": ({**SIZES, "embedding_size": 32}, set()),  # padding reaches tokens
    "gpt2": ({"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}, {1, 2, 3}),
    "llama": (GROUPED, {1, 2, 3}),
}  # fmt: skip
"""By model type: sizes of a tiny network, and the depths at which it can be cut."""


@cache
def make(model_type: str) -> Auto:
    """Return a backbone around a tiny random network with a tokenizer of bytes."""
    tokenizer = tiny_tokenizers.tokenizer("roberta")
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 0}
    sizes, _ = ARCHITECTURES[model_type]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**ids, **sizes})
    network = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    return Auto(enliven(network).eval(), tokenizer, set())


def ended_batch(backbone: Auto, *, padded: bool) -> Batch:
    """Return a random batch whose rows have one end token, the last one: BART's classifier reads it."""
    batch = random_batch(backbone, padded=padded)
    ids = batch.input_ids.masked_fill(batch.input_ids == 2, 9)
    ids[torch.arange(len(ids)), batch.attention_mask.sum(1) - 1] = 2
    return replace(batch, input_ids=ids)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_prefix_and_suffix_make_what_the_network_makes(model_type: str) -> None:
    backbone = make(model_type)
    for padded in (True, False):
        batch = ended_batch(backbone, padded=padded)
        expected = reference(backbone.network, batch)
        assert spread(expected) > 0.01
        for depth in range(len(backbone.layers) + 1):
            torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_depths_of_cuts_are_found(model_type: str) -> None:
    backbone, (_, depths) = make(model_type), ARCHITECTURES[model_type]
    cuts = [backbone.cut_depth(depth) for depth in range(len(backbone.layers) + 1)]
    assert cuts == [max((d for d in depths if d <= depth), default=0) for depth in range(len(cuts))]
    assert any("cannot be cut" in note for note in backbone.notes) == (not depths)


@torch.no_grad()
def test_the_prefix_is_not_computed_again() -> None:
    backbone = make("modernbert")
    batch, calls = random_batch(backbone), []
    hidden = backbone.prefix(batch, 2)
    assert hidden.shape == (*batch.input_ids.shape, backbone.hidden_size)
    hooks = [
        module.register_forward_hook(lambda *_, path=path: calls.append(path)) for path, module in _attentions(backbone)
    ]
    backbone.suffix(hidden, batch, 2)
    for hook in hooks:
        hook.remove()
    assert calls == ["model.layers.2.attn"]
    assert not any("forward" in vars(module) for module in backbone.network.modules())


def _attentions(backbone: Auto) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in backbone.network.named_modules() if name.endswith(".attn")]


@torch.no_grad()
def test_the_states_for_pair_features_are_those_of_the_base_model() -> None:
    backbone = make("llama")
    batch = random_batch(backbone)
    _, states = backbone.suffix_with_states(backbone.prefix(batch, 2), batch, 2)
    base = backbone.network.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    torch.testing.assert_close(states, base, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "layers"), [("distilbert", "top:1"), ("gpt2", "top:1"), ("bart", "decoder:top:1")]
)
def test_a_pack_with_cached_prefix_learns_what_single_runs_learn(model_type: str, layers: str) -> None:
    settings, seeds = adapter("lora", f"layers={layers}", "rank=2"), (0, 1)
    learned = []
    for members, cached in ((seeds, True), ((0,), False), ((1,), False)):
        made = Pack(make(model_type), [Member(settings, seed) for seed in members])
        train, selection = tables(made.backbone)
        cut = PrefixCache(model_type, 1e9 if cached else 0).with_cached_hidden_states(made, {"train": train})
        assert (cut["train"].hidden is not None) == cached
        options = trainer(4)
        prepare(made, options, cut["train"])
        fit(made, [optimizer()] * made.size, options, cut["train"], selection)
        learned += [made.state(k) for k in range(made.size)]
        made.detach()
    for together, alone in zip(learned[:2], learned[2:], strict=True):
        assert_close(together, alone, atol=1e-4)
        assert max(float(t.abs().max()) for name, t in together.items() if name.endswith("lora_B")) > 0
