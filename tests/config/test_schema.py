"""`build()` returns settings with fields of the right type and range, or refuses them with the key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lora_bench.adapters.methods import method_class, method_names
from lora_bench.backbones.families.bert import BertFamily
from lora_bench.backbones.families.t5 import T5Family
from lora_bench.config import build, schema
from lora_bench.errors import Code, UserError
from lora_bench.run.settings import Experiment
from tests.command_line import refuses
from tests.helpers import composed


def defaults(group: str, *overrides: str) -> dict[str, Any]:
    """Return the values of a group of a composed config, with interpolations resolved."""
    values = OmegaConf.to_container(OmegaConf.to_container(composed(*overrides), resolve=True)[group])  # type: ignore[index, call-overload]
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def every_dataclass() -> list[tuple[type[Any], str, dict[str, Any]]]:
    """Return all dataclasses, each with its group and valid values."""
    classes: list[tuple[type[Any], str, dict[str, Any]]] = []
    configs = {
        choice: OmegaConf.to_container(composed(*choice.split()), resolve=True)
        for choice in ("data=toy", "data=qqp model=t5", "data=pairs data.path=x model=minilm metric=specificity")
    }
    toy, hub, files = configs.values()
    classes.append((schema.ToyData, "data", toy["data"]))  # type: ignore[index, call-overload]
    classes.append((schema.HubData, "data", hub["data"]))  # type: ignore[index, call-overload]
    classes.append((T5Family, "model", hub["model"]))  # type: ignore[index, call-overload]
    classes.append((schema.FileData, "data", files["data"]))  # type: ignore[index, call-overload]
    classes.append((BertFamily, "model", files["model"]))  # type: ignore[index, call-overload]
    metric = {"function": None, "args": {}, **files["metric"]["specificity"]}  # type: ignore[index, call-overload, dict-item]
    classes.append((schema.Metric, "metric.specificity", metric))
    classes.append((schema.Optimizer, "optimizer", toy["optimizer"]))  # type: ignore[index, call-overload]
    classes.append((schema.Head, "head", toy["head"]))  # type: ignore[index, call-overload]
    classes.append((schema.Packing, "pack", toy["pack"]))  # type: ignore[index, call-overload]
    classes.append((schema.Ensemble, "ensemble", toy["ensemble"]))  # type: ignore[index, call-overload]
    classes.append((schema.Trainer, "trainer", toy["trainer"]))  # type: ignore[index, call-overload]
    for name in method_names():
        values = OmegaConf.to_container(composed(f"adapter={name}").adapter)
        classes.append((method_class(name), "adapter", typing.cast("dict[str, Any]", values)))
    return classes


CLASSES = every_dataclass()
FIELDS = [(cls, group, values, field.name) for cls, group, values in CLASSES for field in dataclasses.fields(cls)]


def test_every_dataclass_of_the_schema_is_tested() -> None:
    declared = {
        cls for cls in vars(schema).values() if dataclasses.is_dataclass(cls) and cls.__module__ == schema.__name__
    }
    elsewhere = {schema.Annotations, schema.Search}  # in tests/records/test_run_names.py and of the search sweeper
    assert declared - {schema.Data, schema.Model} - elsewhere == {
        cls for cls, _, _ in CLASSES if cls.__module__ == schema.__name__
    }
    assert len(FIELDS) >= 85


@pytest.mark.parametrize(("cls", "group", "values"), CLASSES, ids=lambda value: getattr(value, "__name__", None))
def test_defaults_are_only_in_the_yaml(cls: type[Any], group: str, values: dict[str, Any]) -> None:
    for field in dataclasses.fields(cls) if cls is not schema.Metric else ():  # its keys stand below names of the user
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
    assert [field.name for field in dataclasses.fields(cls) if field.name not in values] == []
    assert set(values) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(("cls", "group", "values"), CLASSES, ids=lambda value: getattr(value, "__name__", None))
def test_build_returns_the_values_of_the_yaml(cls: type[Any], group: str, values: dict[str, Any]) -> None:
    built = build.build(cls, OmegaConf.create(values), group)
    assert type(built) is cls
    assert dataclasses.asdict(built) == values
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.anything = 1


def fits(value: object, hint: Any) -> bool:
    """Return whether a value has the type of an annotation; an int that equals a float does not."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item_hint,) = typing.get_args(hint)
        return isinstance(value, list) and all(fits(item, item_hint) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    return type(value) is (hint if hint is not None else type(None))


# a "$" begins an interpolation, which Hydra refuses before `build`
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=8) | st.sampled_from(
    ["1", "-1", "1e400", "nan", "???", "all", "top:2", "true", "null", "9" * 400]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**400, -(10**400), 2**63, math.inf, 5e-324])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "1"]), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_value_is_typed_or_refused(field: tuple[type[Any], str, dict[str, Any], str], value: object) -> None:
    cls, group, values, name = field
    node = OmegaConf.create({**values, name: value})
    built, error = None, UserError("was not refused", code=Code.INVALID_VALUE)
    try:
        built = build.build(cls, node, group)
    except UserError as refusal:
        error = refusal
    if built is None:
        # the key is that of the field, or of another one that conflicts with it
        assert str(error.key).startswith(f"{group}.")
        assert len(str(error).splitlines()) == 1
        return
    assert type(built) is cls
    hints = typing.get_type_hints(cls, {**vars(schema), "Any": Any})
    for typed_field in dataclasses.fields(cls):
        assert fits(getattr(built, typed_field.name), hints[typed_field.name]), typed_field.name
    numbers = [v for v in dataclasses.asdict(built).values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))


def test_numbers_of_400_digits_are_refused_with_the_key() -> None:
    """Every numeric field of every class refuses an integer of 400 digits as number and as text."""
    numeric = (int, int | None, float, float | None, int | float)
    failures, tried = [], 0
    for cls, group, values, name in FIELDS:
        if typing.get_type_hints(cls, {**vars(schema), "Any": Any})[name] not in numeric:
            continue
        for value in (10**400, -(10**400), "9" * 400, "-" + "9" * 400):
            tried += 1
            try:
                build.build(cls, OmegaConf.create({**values, name: value}), group)
            except UserError as error:
                outcome = error.key
            except Exception as error:
                outcome = repr(error)
            else:
                outcome = "accepted"
            if outcome != f"{group}.{name}":
                failures.append(f"{cls.__name__}.{name}, {str(value)[:3]}…: {outcome}")
    assert tried >= 200
    assert not failures, "\n".join(failures)


@settings(deadline=None, max_examples=50)
@given(ANYTHING)
def test_other_values_in_place_of_a_group_are_refused(node: Any) -> None:
    assume(node != "???")  # a missing value fails before `build`
    group = OmegaConf.create({"group": node}).group
    with pytest.raises(UserError):
        build.build(schema.Trainer, group, "trainer")


RANGES = [
    ("model", "allow_bin", [True, False], ["maybe", None]),
    ("model", "quantize", [None, "nf4", "int2"], ["int3", "fp4"]),
    ("model", "quantize_embeddings", [None, "int8"], ["nf4", "yes"]),
    ("adapter", "rank", [1, 128], [0, -1]),
    ("adapter", "alpha", [0.1, 16], [0, -1, math.inf]),
    ("adapter", "dropout", [0, 0.99], [1, -0.1, math.nan]),
    ("adapter", "default_lr", [1e-9], [0, math.nan]),
    ("adapter", "scaling", ["standard", "rank_stable"], ["alpha", None]),
    ("adapter", "init", ["kaiming", "gaussian", "pissa"], ["zero", "loftq", None]),
    ("adapter=lora_ga", "init_gamma", [16, 0.5], [0, -1, math.nan, None]),
    ("adapter", "allocation", ["uniform", "eva", [".*=3"]], ["adalora", "even", [3], None]),
    ("adapter", "calibration_batches", [1], [0]),
    ("adapter", "magnitude", [True, False], ["maybe", None]),
    ("adapter", "lr_ratio", [0.5, 16], [0, -1, math.inf]),
    ("adapter", "weight_decay_B", [None, 0, 1e3], [-1, math.inf]),
    ("adapter", "freeze_A", [True, False], ["maybe", None]),
    ("adapter", "quantize", [None, "nf4", "int2"], ["int3", "fp4"]),
    ("adapter=adalora", "init_rank", [None, 8, 12], [7, 0, -1]),
    ("adapter=adalora", "orthogonality", [0, 0.5], [-0.1, math.nan]),
    ("adapter=adalora", "warmup", [0, 0.5], [-0.1, 1.5]),
    ("adapter=adalora", "beta1", [0, 0.9], [1, -0.1]),
    ("adapter=adalora", "beta2", [0, 0.9], [1, -0.1]),
    ("adapter=adalora", "final", [0, 0.5], [-0.1, 0.85, 1.5]),
    ("adapter=adalora", "interval", [1, 100], [0]),
    ("adapter=vera", "d_initial", [0.1, 1], [0, math.inf]),
    ("optimizer", "lr", [1e-9, 10], [0, -1e-3, math.nan, math.inf]),
    ("optimizer", "weight_decay", [0, 1], [-0.1, math.inf]),
    ("optimizer", "beta1", [0, 0.9], [1, -0.1]),
    ("optimizer", "beta2", [0, 0.999], [1, math.nan]),
    ("optimizer", "eps", [1e-8, 1e-30], [0, 1e-300]),
    ("optimizer", "warmup", [0, 1], [1.01, -0.01]),
    ("optimizer", "schedule", ["linear", "cosine", "constant"], ["", "Linear"]),
    ("optimizer", "grad_clip_norm", [None, 0.5], [0, -1, math.inf]),
    ("trainer", "epochs", [0.5, 3], [0, -1, math.inf, math.nan, 1e300]),
    ("trainer", "max_steps", [None, 1], [0, -5]),
    ("trainer", "batch_size", [1], [0, None]),
    ("trainer", "micro_batch_size", [None, 1], [0]),
    ("ensemble", "members", [None, 2], [1, 0, -3, 101]),
    ("ensemble", "vary", [["init"], ["order", "init"]], [[], ["luck"], None]),
    ("pack", "size", [None, 1], [0]),
    ("pack", "memory_bytes", [None, 1], [0, 0.5]),
    ("trainer", "eval_batch_size", [None, 1], [0]),
    ("trainer", "eval_every", [None, 1], [0]),
    ("trainer", "early_stopping_patience", [None, 1], [0]),
    ("trainer", "quantization_kernels", ["auto", "torch"], ["triton", None]),
    ("trainer", "objective", ["cross_entropy", "order_consistency", None], ["margin", "dropout_consistency"]),
    ("trainer", "consistency_weight", [0, 2.5], [-1, math.nan]),
    ("trainer", "stop_at", [None, 0.5, 1], [0, -0.5, 1.1]),
    ("trainer", "score_both_orders", [True, False, None], ["maybe"]),
    ("trainer", "average", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    ("trainer", "checkpoint_every", [None, 1], [0]),
    ("trainer", "precision", ["auto", "fp32", "bf16"], ["fp16", "FP32", None]),
    ("trainer", "device", ["auto", "cpu", "cuda"], ["gpu", "cuda:0"]),
    ("trainer", "threads", [None, 1], [0, -1, 100_000]),
    ("data", "text_columns", [["a", "b"]], [[], ["a"], ["a", "b", "c"], ["a", "a"], ["a", "label"], None]),
    ("data", "label_threshold", [None, 4, -0.5], [math.nan, math.inf]),
    ("data", "type", ["classification"], ["ranking", None]),
    ("data", "label_names", [None, ["no", "yes"], ["a", "b", "c"]], [["no"], ["no", "no"], ["", "yes"]]),
    ("data", "positive_label", [None, "duplicate"], ["maybe"]),
    ("data", "relation", [None, "paraphrase", "entailment", "similarity", "form"], ["same"]),
    ("data", "max_length", [8], [7, 0]),
    ("data", "truncation", ["longest_first", "first", "second", "middle"], ["last", None]),
    ("data", "train_size", [None, 1], [0, -1]),
    ("data", "selection_size", [0.5, 2, 100.0], [0, 1, 1.5, -0.1, math.nan, math.inf, None]),
    ("data", "split_seed", [0, 7], [-1, None]),
    ("data", "perturb", [None, "all", ["typo", "word"]], ["tipo", [], 7, True, ["typo", 3], {}]),
    ("data", "report", [True, False], [None, "yes please"]),
    ("pack", "workers", [None, 1, 8], [0, -1]),
    ("pack", "halving", [True, False], [None, "yes please"]),
    ("trainer", "main_metric", [None, "mcc", "accuracy", "f1"], ["macro_f1", "spearman", "auroc"]),
    ("trainer", "class_weights", ["none", "balanced"], ["equal", None]),
    ("trainer", "prefix_cache_bytes", [0.0, 4e9], [-1.0, math.inf]),
    ("trainer", "cuda_graphs", [True, False], [None, "yes please"]),
    ("trainer", "activation_checkpointing", ["auto", True, False], ["always", 1, None]),
    ("trainer", "sharding", ["none", "fsdp"], ["ddp", True, None]),
    ("head", "pair_features", [True, False, None], ["yes please"]),
    ("head", "fit_batches", [0, 32], [-1, 0.5, 99_999_999_999]),
    ("head", "differences", ["absolute", "signed", None], ["both"]),
    ("adapter", "weight_decay_B", [None, 0, 100.0], [-1, math.inf]),
    ("ensemble", "members", [None, 2, 5], [1, 0, 101]),
    ("ensemble", "vary", [["init"], ["order", "dropout"]], [[], ["luck"]]),
    ("data", "perturb_seeds", [1, 1000], [0, 1001]),
    ("data", "augment", [None, "order", ["typo", "number"]], [7, ["typo", None]]),
    ("data", "augment_share", [0.1, 1], [0, 1.1, math.nan]),
    ("data", "intensity", [0.01, 1], [0, 1.1, math.nan]),
    ("data", "share", ["adapter"], ["head", "", None]),
    ("data", "temperature", [1], [0.5, 0, math.nan, math.inf]),
    ("data", "unseen", [True, False], ["maybe", None]),
    ("data", "train_rows", [8], [7]),
    ("data", "validation_rows", [8], [7]),
    ("data", "generator_seed", [0], [-1]),
    ("data", "source", ["toy"], ["Toy", "web", None]),
    ("model", "form", ["text_to_text", "encoder"], ["decoder", None]),
    ("model", "template", ["{fields}", "{task}: {fields}"], ["", "{task}"]),
    ("model", "label_words", [["no", "yes"]], [["no"], []]),
    ("model", "family", ["t5"], ["gpt", None]),
]


REFUSAL_CODES = {Code.MISSING, Code.INVALID_VALUE, Code.INVALID_SYNTAX, Code.UNKNOWN_CHOICE, Code.CONFLICT}


@pytest.fixture(scope="module")
def groups() -> DictConfig:
    return composed("model=tiny_t5", "data=toy")


@cache
def with_method(choice: str) -> DictConfig:
    return composed("model=tiny_t5", "data=toy", *([choice] if "=" in choice else []))


@pytest.mark.parametrize(("group", "name", "inside", "outside"), RANGES, ids=[f"{r[0]}.{r[1]}" for r in RANGES])
def test_ranges(group: str, name: str, inside: list[Any], outside: list[Any]) -> None:
    choice, group = group, group.partition("=")[0]

    def build(value: object) -> Any:
        cfg = with_method(choice).copy()
        cfg.model.label_words = ["no", "yes"]  # by default data.label_names
        cfg[group][name] = value
        return getattr(Experiment.build(cfg), group)

    for value in inside:
        assert getattr(build(value), name) == value
    for value in outside:
        with pytest.raises(UserError) as caught:
            build(value)
        error = caught.value
        assert error.key == f"{group}.{name}"
        assert error.code in REFUSAL_CODES
        assert value is None or str(error.value).startswith(str(value)) or isinstance(value, int)


def test_every_field_with_a_range_is_tested() -> None:
    """Every field except free text is in `RANGES`, as numbers and choices have a range."""
    free_text = {"method", "target_modules", "layers", "task", "label_column", "path", "tokenizer", "package", "sha256"}
    free_text |= {"tasks", "splits"}
    free_text |= {"folder", "hub_id", "hub_config", "revision", "random", "torchmetric", "direction", "init_from"}
    free_text |= {"function", "args", "peft_type", "fields", "settings"}
    assert {name for _, _, _, name in FIELDS} - free_text == {name for _, name, _, _ in RANGES}


TRAINER, TOY, T5 = (schema.Trainer, "trainer"), (schema.ToyData, "data"), (T5Family, "model")


@pytest.mark.parametrize(
    ("group_class", "changed", "code", "key", "detail"),
    [
        (TRAINER, {"batch_size": "x"}, Code.INVALID_VALUE, "batch_size", ""),
        (TRAINER, {"epochs": "x"}, Code.INVALID_VALUE, "epochs", ""),
        (TRAINER, {"batch_size": None}, Code.MISSING, "batch_size", ""),
        (TRAINER, {"batch_size": "???"}, Code.MISSING, "batch_size", ""),
        (TRAINER, {"batch_size": "${x}"}, Code.INVALID_VALUE, "batch_size", "'x'"),
        (TRAINER, {"batch_sise": 1}, Code.UNKNOWN_KEY, "batch_sise", "Did you mean batch_size?"),
        (TRAINER, {"epochs": 10**400}, Code.INVALID_VALUE, "epochs", ""),
        (TOY, {"text_columns": "a"}, Code.INVALID_VALUE, "text_columns", ""),
        (TOY, {"text_columns": ["a", None]}, Code.INVALID_VALUE, "text_columns", ""),
        (TOY, {"text_columns": ["a", "a"]}, Code.INVALID_VALUE, "text_columns", ""),
        (TOY, {"text_columns": ["a", "label"]}, Code.CONFLICT, "text_columns", "data.label_column"),
        (TOY, {"selection_size": "x"}, Code.INVALID_VALUE, "selection_size", ""),
        (T5, {"random": 3}, Code.INVALID_VALUE, "random", ""),
        (T5, {"family": "bert", "random": None}, Code.MISSING, "path", "model.path=DIR"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_values_of_wrong_types_are_refused(
    groups: DictConfig, group_class: tuple[type[Any], str], changed: dict[str, Any], code: Code, key: str, detail: str
) -> None:
    cls, group = group_class
    with refuses(code, key=f"{group}.{key}") as caught:
        build.build(cls, OmegaConf.create({group: {**groups[group], **changed}})[group], group)
    assert caught.value.value in (changed.get(key), None)
    assert detail in str(caught.value)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_a_seed_is_read(seed: int) -> None:
    assert Experiment.build(composed(f"seed={seed}")).seed == seed


@pytest.mark.parametrize("seed", ["-1", "abc", "null", "1.5", "true", "[1]"])
def test_an_invalid_seed_is_refused(seed: str) -> None:
    with refuses(Code.INVALID_VALUE, key="seed"):
        Experiment.build(composed(f"seed={seed}"))


@pytest.mark.parametrize("name", ["os", "../x", "__init__", "base", "pack", "targets", "peft_format", "", "lora.LoRA"])
def test_an_unknown_method_is_refused(name: str) -> None:
    with refuses(Code.UNKNOWN_CHOICE, key="adapter.method") as caught:
        method_class(name)
    assert caught.value.value == name
    assert "adalora, bitfit, full, head_only, hira, lora" in str(caught.value)


def test_a_config_without_a_required_key_is_refused() -> None:
    """An edited record can lack a key."""
    config = OmegaConf.to_container(composed())
    assert isinstance(config, dict)
    for key in config:
        config_without = OmegaConf.create({name: value for name, value in config.items() if name != key})
        if key in ("name", "tags", "notes", "resume", "tracking"):
            assert Experiment.build(config_without).seed == 0
            continue
        with pytest.raises(UserError) as refusal:
            Experiment.build(config_without)
        assert (refusal.value.code, refusal.value.key) == (Code.MISSING, key)
