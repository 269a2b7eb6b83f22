"""Which linears are adapted: what the words mean, and that every wrong request is told in one paragraph."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.adapters import method_class
from lora_bench.adapters.targets import match_targets, unmatched_alternatives
from lora_bench.config import build
from lora_bench.errors import UserError
from tests.adapters.tools import adapter
from tests.backbones.tools import FORMS, make
from tests.helpers import composed

BACKBONES = {form: make(*names) for form, names in FORMS.items()}
BERT = BACKBONES["bert"]
NAMES = list(BERT.linears())


def refusal(target_modules: str, layers: Any = "all", backbone: Any = BERT) -> str:
    with pytest.raises(UserError) as caught:
        match_targets(backbone, target_modules, layers)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_all_means_every_linear_of_the_layers(form: str) -> None:
    assert match_targets(BACKBONES[form], "all", "all") == list(BACKBONES[form].linears())


@pytest.mark.parametrize(
    ("form", "count", "kinds"),
    [
        ("bert", 4, {"query", "value"}),
        ("roberta", 4, {"query", "value"}),
        ("t5", 10, {"q", "v"}),
        ("t5_encoder", 4, {"q", "v"}),
    ],
)
def test_qv_means_query_and_value_in_every_family(form: str, count: int, kinds: set[str]) -> None:
    chosen = match_targets(BACKBONES[form], "qv", "all")
    assert len(chosen) == count
    assert {name.rpartition(".")[2] for name in chosen} == kinds


def test_an_expression_must_match_the_whole_name() -> None:
    assert match_targets(BERT, r".*\.output\.dense", "all") == [n for n in NAMES if n.endswith(".output.dense")]
    assert match_targets(BERT, NAMES[3], "all") == [NAMES[3]]
    assert match_targets(BERT, r".*1.*(query|key)", "all") == [n for n in NAMES if ".1." in n and n.endswith("y")]


def test_names_come_in_the_order_of_computation() -> None:
    assert match_targets(BERT, ".*(value|query)", [1, 0]) == [n for n in NAMES if n.endswith(("query", "value"))]


@pytest.mark.parametrize("form", FORMS)
def test_the_head_cannot_be_had(form: str) -> None:
    for head in (r"classifier.*", r".*pooler.*", r"lm_head"):
        assert "matches no linear of the backbone" in refusal(head, backbone=BACKBONES[form])


def test_what_matches_nothing_is_shown_the_names_there_are() -> None:
    told = refusal(".*qkv.*")
    assert told.startswith("target_modules=.*qkv.*: matches no linear of the backbone. Names there are: bert.encoder.")
    assert "bert.encoder.layer.*.attention.self.query, " in told
    assert told.count("query") == 1  # not once per layer


@pytest.mark.parametrize("part", ["query", "query|value", "attention", "self.(key|value)"])
def test_what_matches_a_part_is_told_so_and_the_suggestion_works(part: str) -> None:
    told = refusal(part)
    assert "It matches a part of bert.encoder.layer.0.attention." in told
    suggested = told.partition("so try '")[2].partition("'")[0]
    assert match_targets(BERT, suggested, "all")


@pytest.mark.parametrize("broken", ["(", "*query", "[a", "a{3,1}", "a{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_refused(broken: str) -> None:
    assert refusal(broken).startswith(f"target_modules={broken}: is not a regular expression")


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # of `re`, about strings such as "[[": not ours
@settings(deadline=None)
@given(st.one_of(st.text(), st.text(st.sampled_from("[](){}|.*+?\\^$queryal01,-"))))
def test_any_string_gives_names_or_a_refusal(text: str) -> None:
    try:
        chosen = match_targets(BERT, text, "all")
    except UserError:
        assert "\n" not in refusal(text)
    else:
        assert [name for name in NAMES if name in chosen] == chosen != []
        assert set(unmatched_alternatives(text, chosen)) <= {text, *text.replace("(", "|").replace(")", "|").split("|")}


# -- layers --


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", {0, 1}), ("top:1", {1}), ("top:2", {0, 1}), ([0], {0}), ([1, 0, 1], {0, 1})]
)
def test_layers_are_counted_in_the_order_of_computation(layers: Any, expected: set[int]) -> None:
    chosen = match_targets(BERT, "qv", layers)
    assert {BERT.layer_of(name) for name in chosen} == expected
    assert len(chosen) == 2 * len(expected)


def test_the_top_layers_of_t5_are_those_of_the_decoder() -> None:
    assert all(name.startswith("decoder.") for name in match_targets(BACKBONES["t5"], "all", "top:2"))
    assert {BACKBONES["t5"].layer_of(name) for name in match_targets(BACKBONES["t5"], "all", [1, 2])} == {1, 2}


@pytest.mark.parametrize(
    "layers",
    ["top:0", "top:3", "top:-1", "top:", "top", "1", "", 1, -1, None, True, [], [2], [-1], [0.0], ["0"], [None]],
)
def test_layers_that_are_not_there_are_refused(layers: Any) -> None:
    told = refusal("all", layers)
    assert told.startswith("layers")
    assert "is neither all, nor top:n with n from 1 to 2, nor a list of layers from 0 to 1" in told


def test_layers_that_hold_nothing_of_what_is_asked_for_are_refused() -> None:
    told = refusal(r".*layer\.0\..*", "top:1")
    assert told.startswith(r"layers=top:1: leaves no linear that target_modules=.*layer\.0\..* matches")


def test_layers_are_written_in_the_shell_as_they_are_meant() -> None:
    for setting, layers in (("all", "all"), ("top:2", "top:2"), ("[0,1]", [0, 1])):
        made = adapter("lora", f"layers={setting}")
        assert made.layers == layers
        assert made.targets(BERT) == NAMES


# -- alternatives that match nothing --


@pytest.mark.parametrize(
    ("expression", "left"),
    [
        (".*(query|value)", []),
        (".*(query|qurey|value)", ["qurey"]),
        (r".*self\.(?:query|vlaue)", ["vlaue"]),
        (".*query|.*vlaue", [".*vlaue"]),
        (".*query", []),
        ("all", []),
        ("qv", []),
        # Bars where we do not understand them are nobody's typing error.
        (r".*(self\.query|value)", []),
        (".*[q|v].*", []),
        (r".*(query|value)(.*)\2", []),
        (".*(?=query|value).*", []),
        (".*(?P<which>query|value)", []),
    ],
)
def test_an_alternative_that_matches_nothing_is_named(expression: str, left: list[str]) -> None:
    assert unmatched_alternatives(expression, match_targets(BERT, expression, "all")) == left


@pytest.mark.parametrize("layers", [2, math.inf, None, True, [0.5], [True], {"a": 1}], ids=repr)
def test_layers_of_another_kind_are_refused_before_there_is_a_backbone(layers: object) -> None:
    node = composed("adapter=vera").adapter
    node.layers = layers
    with pytest.raises(UserError, match=r"adapter\.layers.*is neither all, nor top:n, nor a list of layer numbers"):
        build(method_class("vera"), node, "adapter")
