"""Typed settings from a composed configuration, with checks of types, ranges and unknown keys."""

from __future__ import annotations

import copy
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config.keys import RENAMED, renamed_key
from lora_bench.config.removed import removal_note
from lora_bench.config.schema import DATA, OPTIONAL, Annotations, Data, Metric
from lora_bench.errors import Code, UserError, nearest, require

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

T = TypeVar("T")


def check_top(cfg: DictConfig, keys: Collection[str]) -> None:
    """Check the top level of a run's config: its keys, `seed` and `dry_run`. Groups are checked by `build`.

    Args:
        cfg: the composed config.
        keys: the keys that it may have, `seed` and `dry_run` among them.

    Raises:
        UserError: a key is not among `keys`, one of these is missing (unless it is `OPTIONAL`), `seed` is not an
            integer in [0, 2**63), or `dry_run` is not true or false.
    """
    check_names(cfg, keys)
    for name in keys:
        is_there = name in cfg or name in OPTIONAL
        require(is_there, name, None, "is missing", "It cannot be left out.", code=Code.MISSING)
    is_seed = type(cfg.seed) is int and 0 <= cfg.seed < 2**63
    require(is_seed, "seed", cfg.seed, "must be a whole number from 0 to 2**63 - 1")
    require(type(cfg.dry_run) is bool, "dry_run", cfg.dry_run, "must be true or false")


def build(cls: type[T], node: DictConfig, key: str) -> T:
    """Build the dataclass `cls` from a config node, whose interpolations are resolved.

    A value is converted to the type of its field as OmegaConf does it: 1 and "1" become 1.0 for a float. Ranges are
    checked by `__post_init__` of `cls`.

    Args:
        cls: its fields are the keys of the node.
        node: the config node.
        key: the dotted key of the node, for messages; empty for keys at the top level.

    Raises:
        UserError: the node is not a group, a key is unknown or missing, or a value is of a wrong type or out of range.
            It is the first such error, with the full key.
    """
    require(isinstance(node, DictConfig), key, node, "is not a group of keys")
    prefix = f"{key}." if key else ""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    check_names(node, names, prefix)
    values = resolved(node, key)
    settings = copy.deepcopy(_structured(cls))  # type: ignore[arg-type]
    for name, value in values.items():
        try:
            settings[name] = value
        except (OmegaConfBaseException, OverflowError) as error:
            reason = next((words for sign, words in _TYPES.items() if sign in str(error)), str(error).splitlines()[0])
            require(value is not None, f"{prefix}{name!s}", None, "must have a value, not null", code=Code.MISSING)
            raise UserError(reason, key=f"{prefix}{name!s}", value=value, code=Code.INVALID_VALUE) from None
    try:
        result = OmegaConf.to_object(settings)
    except UserError as error:
        raise error.under(key) from None
    except OmegaConfBaseException as error:
        raise UserError(
            "is missing", key=f"{prefix}{error.full_key}", remedy="Give it a value.", code=Code.MISSING
        ) from None
    assert isinstance(result, cls)
    return result


@cache
def _structured(cls: type) -> DictConfig:
    """Return OmegaConf's config of a dataclass, to be copied: reading the type hints takes four times as long."""
    settings: DictConfig = OmegaConf.structured(cls)
    OmegaConf.set_readonly(settings, False)  # the finished dataclass is frozen
    return settings


def resolved(node: DictConfig, key: str) -> dict[str, Any]:
    """Return the values of a config node, with its interpolations resolved; raises like `build`."""
    try:
        values = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            str(error).splitlines()[0].rstrip("."), key=error.full_key or key, code=Code.INVALID_VALUE
        ) from None
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def check_names(node: DictConfig, names: Collection[str], prefix: str = "") -> None:
    """Refuse a node with a key that is not among `names`.

    Args:
        node: a config node.
        names: its known keys.
        prefix: of the node's keys in messages, with its dot: `adapter.`.

    Raises:
        UserError: for the first such key, or for a renamed one with its present name. The remedy says why the key was
            removed, or gives the nearest known key.
    """
    for name in map(str, node):
        key = prefix + name
        if key in RENAMED:
            raise renamed_key(key)
        if name not in names:  # only then: the search for a similar name is slow
            remedy = removal_note(key) or nearest(name, names)
            raise UserError("is not a known key", key=key, remedy=remedy, code=Code.UNKNOWN_KEY)


_TYPES = {
    "too large": "is too large",
    "to Integer": "is not a whole number",
    "to Float": "is not a number",
    "Union[int, float]": "is not a number",
    "Union[bool, str]": "is neither true, false nor text",
    "to String": "is not text",
    "is not a ListConfig": "is not a list",
    "subclass of str": "is not a list of texts",
    "to string": "is not text",
    "to Dict": "is not a group of keys",
    "to dict": "is not a group of keys",
}
"""Parts of OmegaConf's messages about a wrong type, with the reason that a `UserError` gives instead."""


def build_variant(class_of: Callable[[str], type[T]], node: DictConfig, group: str, key: str) -> T:
    """Return the settings of a group whose dataclass depends on the value of one of its keys.

    Args:
        class_of: returns the dataclass for a value of that key, or raises a UserError; it gets the text `None` if the
            key is missing.
        node: the group in the config.
        group: the group's name.
        key: the key's name.

    Raises:
        UserError: the node is not a group, or as `class_of` and `build`.
    """
    require(isinstance(node, DictConfig), group, node, "is not a group of keys")
    return build(class_of(str(node.get(key))), node, group)


def build_annotations(cfg: DictConfig) -> Annotations:
    """Return name, tags and notes of a run from the top level of its config; a key that it lacks has no value.

    Raises like `build`.
    """
    try:
        values = {"name": cfg.get("name"), "tags": cfg.get("tags") or [], "notes": cfg.get("notes")}
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0].rstrip("."), key=error.full_key, code=Code.INVALID_VALUE) from None
    tags = values["tags"]
    require(not isinstance(tags, str), "tags", tags, "is not a list", f"Put it in brackets: tags=[{tags}].")
    return build(Annotations, OmegaConf.create(values), "")


def build_data(node: DictConfig) -> Data:
    """Return the settings of the source of data that `data.source` names; raises like `build`."""
    return build_variant(_data_class, node, "data", "source")


def build_metrics(node: DictConfig) -> dict[str, Metric]:
    """Build the settings of the metrics beside the standard ones, by the names under which they are reported.

    Raises like `build`; whether torchmetrics has a metric is not checked here.
    """
    return {str(name): build(Metric, metric, f"metric.{name!s}") for name, metric in node.items()}


def _data_class(source: str) -> type[Data]:
    """Return the dataclass of a value of `data.source`; a `UserError` if there is no such source."""
    if source not in DATA:
        raise UserError(
            f"is not one of {', '.join(DATA)}",
            key="data.source",
            value=source,
            remedy=nearest(source, DATA),
            code=Code.UNKNOWN_CHOICE,
        )
    return DATA[source]
