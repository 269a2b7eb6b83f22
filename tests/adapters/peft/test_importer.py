"""Adapters that peft made say on our backbones what they say in peft; what cannot be read is refused by its name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from lora_bench.adapters import patterns
from lora_bench.adapters.peft import importer
from lora_bench.adapters.peft.config import PeftConfig
from lora_bench.errors import Code, UserError
from tests.adapters.peft_tools import CLASSES, CLOSE, TASKS, bodies, in_peft, logits_of, made_by_peft, move, on_folder
from tests.backbones.tools import FORMS, held, random_batch, save, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.adapters.pack.pack import Pack

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # peft asks transformers for a property that is going away.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
QUERY_VALUE = {"bert": ["query", "value"], "roberta": ["query", "value"], "t5": ["q", "v"], "t5_encoder": ["q", "v"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bodies(tmp_path_factory.mktemp("bodies"))


def attached(form: str, base: Path, adapter: Path) -> Pack:
    return importer.attach(PeftConfig.read(adapter), on_folder(form, base)).eval()


@torch.no_grad()
def assert_same(form: str, base: Path, adapter: Path, theirs: Any = None) -> tuple[Pack, dict[str, torch.Tensor]]:
    """Our logits are those of peft, which loads the folder unless its model is given; the pack and its tensors."""
    made = attached(form, base, adapter)
    state = made.state(0)
    batch = random_batch(made.backbone)
    logits = made(batch)[0]
    assert spread(logits) > 1e-3
    expected = logits_of(theirs or in_peft(form, base, adapter), made.backbone, batch)
    torch.testing.assert_close(logits, expected, **CLOSE)
    made.detach()
    assert made.backbone.hash() == on_folder(form, base).hash()
    return made, state


# -- LORA --

LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rank-stable": {"r": 4, "use_rslora": True, "lora_dropout": 0.3},
    "everywhere": {"target_modules": "all-linear", "exclude_modules": ["classifier"], "use_dora": True},
    "expression": {"target_modules": r".*\.1\..*(query|dense|wo|q)"},
    "patterns": {"r": 4, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {"query|q": 32}, "use_rslora": True},
    "layers": {"layers_to_transform": [1]},
    "layer-of-a-list": {"layers_to_transform": 0, "layers_pattern": ["layer", "block"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {r".*\.1\..*": 2}},
    "dora-pissa": {"init_lora_weights": "pissa", "use_dora": True},
}


ON_EVERY_FORM = ("plain", "everywhere", "patterns", "pissa")


@pytest.mark.parametrize(
    ("form", "settings"), [(form, name) for name in LORA for form in FORMS if form == "bert" or name in ON_EVERY_FORM]
)
def test_a_lora_of_peft_says_what_it_says_there(
    form: str, settings: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = peft.LoraConfig(**{"task_type": TASKS[form], "target_modules": QUERY_VALUE[form], **LORA[settings]})
    made_by_peft(form, folders[form], tmp_path, config)
    assert_same(form, folders[form], tmp_path)


def test_a_start_that_was_made_plain_is_a_lora_of_twice_the_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=3, init_lora_weights="pissa_niter_4")
    theirs = peft.get_peft_model(CLASSES["bert"].from_pretrained(folders["bert"]), config)
    theirs.save_pretrained(tmp_path / "start")
    move(theirs)
    theirs.save_pretrained(tmp_path / "moved", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    file = tmp_path / "moved" / "adapter_model.safetensors"
    error = refusal(Code.DAMAGED, tmp_path / "moved", folders)  # peft 0.21 leaves the head out
    assert error.file == file
    assert "classifier.bias" in str(error)
    head = theirs.get_base_model().classifier.modules_to_save.default.state_dict()
    save_file(held(file) | {f"base_model.model.classifier.{key}": tensor for key, tensor in head.items()}, file)
    made, _ = assert_same("bert", folders["bert"], tmp_path / "moved")
    assert set(made.ranks(0).values()) == {6}


@pytest.mark.parametrize("saved", [None, ["pooler"], ["bert.pooler", "classifier"]])
def test_the_head_is_what_peft_trained_and_else_the_backbones(
    saved: list[str] | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    kept = saved and [*saved]  # peft adds to the list
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=kept)
    theirs = made_by_peft("bert", folders["bert"], tmp_path, config)
    _, state = assert_same("bert", folders["bert"], tmp_path, theirs)
    pretrained = on_folder("bert", folders["bert"]).network.bert.pooler.dense.weight
    assert torch.equal(state["bert.pooler.dense.weight"], pretrained) == (saved is None)


def test_a_classifier_that_was_trained_before_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = on_folder("bert", folders["bert"])
    whole = save(tmp_path / "whole", backbone.network, backbone.tokenizer)
    made_by_peft("bert", whole, tmp_path / "adapter", peft.LoraConfig(target_modules=["query"]))
    assert_same("bert", whole, tmp_path / "adapter")


# -- ADALORA and VERA --


@pytest.mark.parametrize("form", FORMS)
def test_an_adalora_of_peft_says_what_it_says_there(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Pruned by peft itself, unevenly."""
    settings = {"init_r": 6, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 4, "lora_alpha": 12}
    config = peft.AdaLoraConfig(task_type=TASKS[form], target_modules=QUERY_VALUE[form], **settings)
    theirs = made_by_peft(form, folders[form], tmp_path, config, save=False)
    backbone = on_folder(form, folders[form])
    batch = random_batch(backbone)
    for step in range(1, 4):
        theirs.zero_grad()
        logits_of(theirs, backbone, batch).square().sum().backward()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert len({sum(each) for each in kept.values()}) > 1
    made, _ = assert_same(form, folders[form], tmp_path, theirs)
    assert made.ranks(0) == {key.removesuffix(".lora_E"): sum(each) for key, each in kept.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_vera_of_peft_says_what_it_says_there(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    targets = {"t5": ["q", "wi", "wo"], "t5_encoder": ["q", "wi", "wo"]}.get(form, ["query", "output.dense"])
    config = peft.VeraConfig(task_type=TASKS[form], target_modules=targets, r=16)
    made_by_peft(form, folders[form], tmp_path, config)
    assert_same(form, folders[form], tmp_path)


# -- names are matched as peft matches them --

PARTS = st.sampled_from(["query", "dense", "output.dense", "layer.1.output.dense", "bert", "1", "er", ".*", "q.*y"])
EXPRESSIONS = st.sampled_from([r".*\.query", "query", r".*(0|1)\.output.*", "bert.encoder.*dense", ".*"])
BERT_NAMES = [
    f"bert.encoder.layer.{i}.{name}"
    for i in (0, 1, 11)
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "output")
]
T5_NAMES = ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q", "lm_head"]
NAMES = [*BERT_NAMES, *T5_NAMES, "bert.pooler.dense", "classifier", "classifier.dense"]
MODULES = st.one_of(EXPRESSIONS, st.lists(PARTS, min_size=1, max_size=3))


@given(
    targets=MODULES,
    exclude_modules=st.one_of(st.none(), MODULES),
    modules_to_save=st.one_of(st.none(), st.lists(PARTS, max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 12), max_size=2)),
    layers_pattern=st.one_of(st.none(), st.sampled_from(["layer", "block", ["layer", "block"], ["encoder.layer"]])),
)
def test_targets_are_those_of_peft(
    targets: Any, exclude_modules: Any, modules_to_save: Any, layers: Any, layers_pattern: Any
) -> None:
    chosen = {"target_modules": targets, "exclude_modules": exclude_modules, "modules_to_save": modules_to_save}
    if not isinstance(targets, str) and layers is not None:
        chosen |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    theirs = peft.LoraConfig(**chosen)
    ours = PeftConfig(Path(), {"peft_type": "LORA", **chosen})
    for name in NAMES:
        assert ours.adapts(name) == bool(check_target_module_exists(theirs, name)), name


@given(patterns=st.dictionaries(st.one_of(PARTS, EXPRESSIONS, st.sampled_from(NAMES)), st.integers(1, 9), max_size=3))
def test_patterns_are_those_of_peft(patterns: dict[str, int]) -> None:
    ours = PeftConfig(Path(), {"rank_pattern": patterns})
    expected = {name: patterns.get(get_pattern_key(list(patterns), name), 0) for name in NAMES}
    idle = [p for p in patterns if all(get_pattern_key([p], name) != p for name in NAMES)]
    if idle:
        with pytest.raises(UserError) as caught:
            ours.by_module("rank_pattern", 0, NAMES)
        assert (caught.value.code, caught.value.key) == (Code.NO_MATCH, "rank_pattern")
        assert repr(idle[0]) in caught.value.reason
    else:
        assert ours.by_module("rank_pattern", 0, NAMES) == expected


# -- what is refused --


@pytest.fixture
def adapter(folders: dict[str, Path], tmp_path: Path) -> Path:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
    made_by_peft("bert", folders["bert"], tmp_path / "adapter", config)
    return tmp_path / "adapter"


def refusal(
    code: Code, adapter: Path, folders: dict[str, Path], form: str = "bert", *, key: str | None = None
) -> UserError:
    with refuses(code, key=key) as caught:
        attached(form, folders[form], adapter)
    return caught.value


def rewrite(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("content", "code", "key"),
    [
        (b"", Code.DAMAGED, None),
        (b"{", Code.DAMAGED, None),
        (b"\xff\xfe", Code.DAMAGED, None),
        (b"[" * 100_000, Code.DAMAGED, None),
        (b'["LORA"]', Code.DAMAGED, None),
        (b"{}", Code.UNSUPPORTED, "peft_type"),
    ],
)
def test_a_config_that_is_none_is_refused(
    content: bytes, code: Code, key: str | None, adapter: Path, folders: dict[str, Path]
) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    assert refusal(code, adapter, folders, key=key).file == adapter / "adapter_config.json"


@pytest.mark.parametrize(
    ("changes", "code", "key", "named"),
    [
        ({"peft_type": "IA3"}, Code.UNSUPPORTED, "peft_type", "LORA, ADALORA, VERA"),
        ({"peft_type": None}, Code.UNSUPPORTED, "peft_type", "LORA, ADALORA, VERA"),
        ({"r": "absent"}, Code.MISSING, "r", ""),
        ({"lora_alpha": "absent"}, Code.MISSING, "lora_alpha", ""),
        ({"target_modules": "absent"}, Code.MISSING, "target_modules", ""),
        ({"r": 0}, Code.INVALID_VALUE, "r", ""),
        ({"r": 4.5}, Code.INVALID_VALUE, "r", ""),
        ({"r": True}, Code.INVALID_VALUE, "r", ""),
        ({"lora_alpha": "16"}, Code.INVALID_VALUE, "lora_alpha", ""),
        ({"lora_alpha": math.nan}, Code.INVALID_VALUE, "lora_alpha", ""),
        ({"target_modules": 7}, Code.INVALID_VALUE, "target_modules", ""),
        ({"target_modules": "(query"}, Code.INVALID_VALUE, "target_modules", ""),
        ({"target_modules": ["qurey"]}, Code.NO_MATCH, "target_modules", ""),
        ({"target_modules": []}, Code.NO_MATCH, "target_modules", ""),
        (
            {"target_modules": ["query", "word_embeddings"]},
            Code.UNSUPPORTED,
            "target_modules",
            "bert.embeddings.word_embeddings",
        ),
        (
            {"target_modules": ["query", "output"]},
            Code.UNSUPPORTED,
            "target_modules",
            "bert.encoder.layer.0.attention.output",
        ),
        (
            {"modules_to_save": ["classifier", "LayerNorm"]},
            Code.UNSUPPORTED,
            "modules_to_save",
            "bert.embeddings.LayerNorm",
        ),
        ({"layers_to_transform": "top"}, Code.INVALID_VALUE, "layers_to_transform", ""),
        ({"rank_pattern": {"qurey": 4}}, Code.NO_MATCH, "rank_pattern", "'qurey'"),
        ({"rank_pattern": {"query": 0}}, Code.INVALID_VALUE, "rank_pattern", "rank 0"),
        ({"rank_pattern": {"(?i)query": 4}}, Code.INVALID_VALUE, "rank_pattern", ""),
        ({"rank_pattern": [4]}, Code.INVALID_VALUE, "rank_pattern", ""),
        ({"alpha_pattern": {"qurey": 4}}, Code.NO_MATCH, "alpha_pattern", "'qurey'"),
        ({"alpha_pattern": {"query": "4"}}, Code.INVALID_VALUE, "alpha_pattern", ""),
        ({"bias": "lora_only"}, Code.UNSUPPORTED, "bias", ""),
        ({"lora_bias": True}, Code.UNSUPPORTED, "lora_bias", ""),
        ({"use_bdlora": {"nblocks": 2}}, Code.UNSUPPORTED, "use_bdlora", ""),
        ({"trainable_token_indices": [3]}, Code.UNSUPPORTED, "trainable_token_indices", ""),
        ({"some_variant_to_come": True}, Code.UNSUPPORTED, "some_variant_to_come", "merge_and_unload"),
        (
            {"init_lora_weights": "corda"},
            Code.UNSUPPORTED,
            "init_lora_weights",
            "path_initial_model_for_weight_conversion",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            Code.UNSUPPORTED,
            "init_lora_weights",
            "path_initial_model_for_weight_conversion",
        ),
        ({"task_type": "CAUSAL_LM"}, Code.UNSUPPORTED, "task_type", "SEQ_CLS"),
        ({"task_type": "SEQ_2_SEQ_LM"}, Code.UNSUPPORTED, "task_type", "SEQ_CLS"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_asks_for_what_cannot_be_is_refused(
    changes: dict[str, Any], code: Code, key: str, named: str, adapter: Path, folders: dict[str, Path]
) -> None:
    rewrite(adapter, **changes)
    error = refusal(code, adapter, folders, key=key)
    assert error.file == adapter / "adapter_config.json"
    assert str(error.value) in ("None", str(changes[key]))
    assert named in str(error)


def test_a_head_that_neither_folder_holds_is_named(adapter: Path, folders: dict[str, Path]) -> None:
    rewrite(adapter, task_type=None, modules_to_save=None)
    error = refusal(Code.MISSING, adapter, folders)
    assert error.file == adapter
    assert "classifier.bias" in str(error)


def test_what_decides_nothing_is_passed_over(adapter: Path, folders: dict[str, Path]) -> None:
    rewrite(adapter, peft_version="9.9", auto_mapping={"a": "b"}, some_variant_to_come=False, lora_dropout=0.5)
    attached("bert", folders["bert"], adapter)


def test_an_adalora_with_a_broken_pattern_is_refused(adapter: Path, folders: dict[str, Path]) -> None:
    name = "bert.encoder.layer.0.attention.self.query.lora_E"
    for module, code in (("query.lora_E", Code.NO_MATCH), (name, Code.INVALID_VALUE)):
        rewrite(adapter, peft_type="ADALORA", init_r=4, rank_pattern={module: [True]})
        assert f"'{module}'" in str(refusal(code, adapter, folders, key="rank_pattern"))


def test_a_vera_without_its_projections_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4, save_projection=False)
    made_by_peft("bert", folders["bert"], tmp_path, config)
    error = refusal(Code.UNSUPPORTED, tmp_path, folders, key="save_projection")
    assert "save_projection=True" in str(error)


def test_an_adapter_of_another_backbone_is_refused(adapter: Path, folders: dict[str, Path]) -> None:
    assert "base_model.model.classifier.dense.weight" in str(refusal(Code.DAMAGED, adapter, folders, "roberta"))
    assert refusal(Code.UNSUPPORTED, adapter, folders, "t5", key="task_type").value == "SEQ_CLS"


LOST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[LOST]


def lose_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.classifier.bias"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.bert.embeddings.word_embeddings.weight"] = torch.zeros(8, 32)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LOST] = tensors[LOST][:2].clone()


def more_classes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.classifier.weight"] = torch.zeros(3, 32)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LOST][0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lose, "query.lora_A.weight"),
        (lose_head, "classifier.bias"),
        (add, "word_embeddings.weight"),
        (reshape, "query.lora_A.weight (2, 32)"),
        (more_classes, "classifier.weight (3, 32)"),
        (poison, "query.lora_A.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], named: str, adapter: Path, folders: dict[str, Path]
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = held(file)
    change(tensors)
    save_file(tensors, file)
    error = refusal(Code.DAMAGED, adapter, folders)
    assert error.file == file
    assert named in str(error)


def test_a_file_that_is_none_is_refused(adapter: Path, folders: dict[str, Path]) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert refusal(Code.DAMAGED, adapter, folders).file == file
    file.rename(adapter / "adapter_model.bin")
    assert refusal(Code.DAMAGED, adapter, folders).file == file


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with refuses(Code.NOT_FOUND) as caught:
        PeftConfig.read(tmp_path / "nowhere")
    assert caught.value.file == tmp_path / "nowhere/adapter_config.json"


# -- hostile files --

CATASTROPHE = r"([a-z0-9.]*)*([a-z0-9.]*)*([a-z0-9.]*)*!"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": CATASTROPHE},
        {"rank_pattern": {CATASTROPHE: 2}},
        {"alpha_pattern": {CATASTROPHE: 2}},
        {"exclude_modules": CATASTROPHE},
        {"modules_to_save": [CATASTROPHE]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_expression_that_takes_for_ever_is_given_up(
    changes: dict[str, Any], adapter: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.2)
    rewrite(adapter, **changes)
    error = refusal(Code.INVALID_VALUE, adapter, folders, key="adapter")
    assert error.file == adapter / "adapter_config.json"
    assert "0.2 seconds" in str(error)


@pytest.mark.parametrize("kind", [None, [], {}, 3, "", "../LORA", "PREFIX_TUNING"])
def test_an_odd_kind_is_refused(kind: Any, adapter: Path) -> None:
    rewrite(adapter, peft_type=kind)
    with refuses(Code.UNSUPPORTED, key="peft_type"):
        PeftConfig.read(adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_odd_types_are_refused(dtype: torch.dtype, adapter: Path, folders: dict[str, Path]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = held(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    error = refusal(Code.DAMAGED, adapter, folders)
    assert error.file == path
    assert f"{name} ({dtype})" in str(error)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_never_opened(name: str, adapter: Path, folders: dict[str, Path]) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    code = Code.UNREADABLE if name == "adapter_config.json" else Code.DAMAGED
    assert refusal(code, adapter, folders).file == adapter / name
