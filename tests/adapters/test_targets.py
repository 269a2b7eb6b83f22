"""Which linears are adapted: what the words mean, and that every wrong request is told in one paragraph."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.adapters.methods import method_class
from lora_bench.adapters.targets import match_targets, unmatched_alternatives
from lora_bench.config.build import build
from lora_bench.errors import Code, UserError
from tests.adapters.tools import adapter
from tests.backbones.tools import FORMS, make
from tests.command_line import refuses
from tests.helpers import composed

BACKBONES = {form: make(*names) for form, names in FORMS.items()}
BERT = BACKBONES["bert"]
NAMES = list(BERT.linears())


def no_match(target_modules: str, backbone: Any = BERT) -> str:
    """Return the text of the refusal of an expression that matches nothing."""
    with refuses(Code.NO_MATCH, key="target_modules") as caught:
        match_targets(backbone, target_modules, "all")
    assert caught.value.value == target_modules
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
        no_match(head, BACKBONES[form])


def test_what_matches_nothing_is_shown_the_names_there_are() -> None:
    message = no_match(".*qkv.*")
    assert "bert.encoder.layer.*.attention.self.query, " in message
    assert message.count("query") == 1  # not once per layer


@pytest.mark.parametrize("part", ["query", "query|value", "attention", "self.(key|value)"])
def test_what_matches_a_part_is_told_so_and_the_suggestion_works(part: str) -> None:
    message = no_match(part)
    assert "bert.encoder.layer.0.attention." in message
    (suggestion,) = re.findall("'(.*)'", message)
    assert match_targets(BERT, suggestion, "all")


@pytest.mark.parametrize("broken", ["(", "*query", "[a", "a{3,1}", "a{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_refused(broken: str) -> None:
    with pytest.raises(UserError) as caught:  # the text is long, and partly Python's
        match_targets(BERT, broken, "all")
    assert (caught.value.code, caught.value.key) == (Code.INVALID_SYNTAX, "target_modules")
    assert caught.value.value == broken


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # of `re`, about strings such as "[[": not ours
@settings(deadline=None)
@given(st.one_of(st.text(), st.text(st.sampled_from("[](){}|.*+?\\^$queryal01,-"))))
def test_any_string_gives_names_or_a_refusal(text: str) -> None:
    try:
        chosen = match_targets(BERT, text, "all")
    except UserError:
        with pytest.raises(UserError) as caught:
            match_targets(BERT, text, "all")
        assert caught.value.key == "target_modules"
        assert "\n" not in str(caught.value)
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
    ("layers", "expected"),
    [
        ("encoder", {0, 1}),
        ("decoder", {2, 3}),
        ("encoder:top:1", {1}),
        ("decoder:top:2", {2, 3}),
        ("all", {0, 1, 2, 3}),
    ],
)
def test_layers_of_encoder_and_decoder_are_told_apart(layers: str, expected: set[int]) -> None:
    t5 = BACKBONES["t5"]
    assert {t5.layer_of(name) for name in match_targets(t5, "all", layers)} == expected
    with refuses(Code.INVALID_VALUE, key="layers") as caught:
        match_targets(t5, "all", "decoder:top:3")
    assert "encoder 0 to 1, decoder 2 to 3" in str(caught.value)
    with refuses(Code.INVALID_VALUE, key="layers"):
        match_targets(BERT, "all", "encoder")


@pytest.mark.parametrize(
    "layers",
    ["top:0", "top:3", "top:-1", "top:", "top", "1", "", 1, -1, None, True, [], [2], [-1], [0.0], ["0"], [None]],
)
def test_layers_that_are_not_there_are_refused(layers: Any) -> None:
    with refuses(Code.INVALID_VALUE, key="layers") as caught:
        match_targets(BERT, "all", layers)
    assert caught.value.value == layers
    for bounds in ("1 to 2", "0 to 1"):
        assert bounds in str(caught.value)


def test_layers_that_hold_nothing_of_what_is_asked_for_are_refused() -> None:
    with refuses(Code.NO_MATCH, key="layers") as caught:
        match_targets(BERT, r".*layer\.0\..*", "top:1")
    assert caught.value.value == "top:1"
    assert r"target_modules=.*layer\.0\..*" in str(caught.value)


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
    with refuses(Code.INVALID_VALUE, key="adapter.layers"):
        build(method_class("vera"), node, "adapter")
