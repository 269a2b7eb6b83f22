"""Equal settings have equal hashes, and different settings have different hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.config.build import build_data
from lora_bench.config.canonical import settings_hash
from lora_bench.run.settings import Experiment
from tests.helpers import composed


@dataclass
class Settings:
    rank: float
    layers: list[int] | None = None


@dataclass
class OtherSettings(Settings):
    pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, 2.0]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def with_types(value: Any) -> Any:
    """Return the value in a form in which Python's `==` distinguishes true from 1."""
    if isinstance(value, dict):
        return {key: with_types(item) for key, item in value.items()}
    return [with_types(item) for item in value] if isinstance(value, list) else (isinstance(value, bool), value)


@given(JSON, JSON)
def test_hashes_are_equal_if_and_only_if_the_values_are(first: Any, second: Any) -> None:
    assert (settings_hash(first) == settings_hash(second)) == (with_types(first) == with_types(second))


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert settings_hash(dict(reversed(value.items()))) == settings_hash(value)
    assert settings_hash(json.loads(json.dumps(value))) == settings_hash(value)


def test_hashes_of_dataclasses() -> None:
    assert settings_hash(Settings(16.0)) == settings_hash(Settings(16))
    different = [Settings(8), Settings(16, []), Settings(16, [1]), OtherSettings(16), {"rank": 16, "layers": None}]
    assert len({settings_hash(value) for value in [Settings(16), *different]}) == 6


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        settings_hash(object())


def test_identity_of_a_run() -> None:
    """The identity depends on the settings that change what is learned, and not on how it is computed."""

    def identity(*overrides: str) -> str:
        return Experiment.build(composed(*overrides)).identity

    assert identity() == identity("pack.size=1", "tracking=tensorboard") == identity("adapter.alpha=16")
    different = ["seed=1", "adapter.rank=4", "adapter=dora", "data=mrpc", "optimizer.lr=0.5"]
    assert len({identity(), *(identity(override) for override in different)}) == len(different) + 1


def test_hash_of_data_settings_depends_on_a_field() -> None:
    data = build_data(composed("data=toy").data)
    assert settings_hash(data) != settings_hash(replace(data, train_size=9))
