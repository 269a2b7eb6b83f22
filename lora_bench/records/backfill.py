"""The config of a recorded run, as today's code takes it: keys that have come since have their defaults.

A record holds every key that there was when its run began. What it lacks is taken from the choice that it names, else
(a choice from a folder of the user's) from one of the same method, family or source.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

from lora_bench.config.groups import choices, conf_folder
from lora_bench.config.keys import flatten
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted
from lora_bench.records.prompted import is_prompted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

KINDS = {"model": "family", "adapter": "method", "data": "source"}
"""What tells which keys a group has."""
OPTIONS = {"auto": "deberta", "hub": "qqp", "files": "pairs"}
"""A choice of the kind, where it is not called like the kind."""


def filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's config with defaults for the keys of `train` that it lacks; what it has is as it was."""
    if is_prompted(record):
        return dict(record["config"])
    config, top, usual = dict(record["config"]), *_top()
    options = {group: _option(group, record, choice) for group, choice in usual.items()}
    today = _today(tuple((group, option) for group, option in options.items() if option))
    for group, defaults in today.items():
        own, kind = config.get(group, {}), KINDS.get(group)
        if isinstance(own, dict) and (kind is None or own.get(kind) == defaults[kind]):
            config[group] = own | {key: value for key, value in defaults.items() if key not in own}
    for key, value in top.items():
        own = config.get(key, value)
        config[key] = value | own if isinstance(value, dict) and isinstance(own, dict) else own
    return config


class ModelPlaces(TypedDict):
    """Where a finished run's backbone and tokenizer lie now; None where its record says."""

    model_path: str | None
    tokenizer: str | None


def model_places(node: Mapping[str, Any]) -> ModelPlaces:
    """Return `model.path` and `model.tokenizer` of a command that takes a finished run."""
    path, tokenizer = (None if node[key] is None else str(node[key]) for key in ("path", "tokenizer"))
    return ModelPlaces(model_path=path, tokenizer=tokenizer)


def relocated(config: dict[str, Any], path: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Return a recorded config with its backbone and its tokenizer where they lie now.

    Args:
        config: as `filled` gives it.
        path, tokenizer: the new places; None where they are those of the config.

    Raises:
        UserError: the backbone is neither where the record says nor is another place given.
    """
    if not isinstance(config.get("model"), dict):
        return config
    given = {"path": path, "tokenizer": tokenizer}
    places = {key: os.path.abspath(place) for key, place in given.items() if place and os.path.exists(place)}
    model = config["model"] | {key: place for key, place in given.items() if place} | places
    for key in ("path", "tokenizer"):
        place = model.get(key)
        moved = isinstance(place, str) and os.path.isabs(place) and not os.path.isdir(place)
        if moved and given[key] is None:
            remedy = f"If it was moved, give model.{key}=DIR, its new place: that it is the same is checked."
            raise UserError(
                "the folder that this run was trained with is gone",
                key=f"model.{key}",
                value=place,
                remedy=remedy,
                code=Code.NOT_FOUND,
            )
    return config | {"model": model}


def differences(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the keys whose values differ between a record's config and an earlier copy of it, with both values.

    Keys that either lacks have their defaults. Places of files are left out: what lies there is checked by its hash.

    Args:
        record: as it is read now.
        config: the copy.
    """
    before, now = (dict(flatten(filled({**record, "config": dict(each)}))) for each in (config, record["config"]))
    return _differing(before | now, before, now)


def refuse_edited(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a run whose record's config was edited by hand since it began, as far as its copy can be read.

    Args:
        folder: the run's.
        record: as it is read now.

    Raises:
        UserError: a key of both has another value; it is named with both.
    """
    before, now = dict(flatten(_copy(folder / ".hydra" / "config.yaml"))), dict(flatten(record["config"]))
    for difference in _differing([key for key in before if key in now], before, now):
        raise edited(folder, *difference)


def edited(folder: Path, key: str, before: object, now: object) -> UserError:
    """Return the refusal of a run whose record was edited."""
    reason = f"{key} was changed to {now} after the run began with {before}"
    remedy = "The run was trained as it began: change it back, or train another."
    return UserError(reason, file=folder / "run.json", remedy=remedy, code=Code.DAMAGED)


def _differing(keys: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [key for key in keys if key.rpartition(".")[2] not in ("path", "init_from")]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


_COPY_BYTES = 100_000


def _copy(path: Path) -> dict[str, Any]:
    """Read the copy of a config that lies beside the record; empty where it is absent, damaged or none of ours."""
    import yaml

    from lora_bench.config.overrides import MAX_DEPTH, yaml_nesting

    try:
        text = untrusted.read_bytes(path, _COPY_BYTES).decode("ascii")
        if yaml_nesting(text) > MAX_DEPTH or any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)
        ):
            return {}
        found = yaml.safe_load(text)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a record with defaults for later keys, after a check of what it asks for.

    Raises:
        UserError: it cannot be read, or asks for what only a user may ask for (`overrides.check_config`).
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lora_bench.config.overrides import check_config

    try:
        content = filled(record)
        config = OmegaConf.create(content)
        check_config(config)
        for group in ("data", "model", "adapter", "optimizer", "trainer"):
            if not isinstance(config.get(group), DictConfig):
                raise TypeError(f"{group} is not a group of keys")
    except UserError:
        raise
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"is damaged: its config cannot be read ({reason})", code=Code.DAMAGED) from None
    return content


def restored(folder: Path, record: Mapping[str, Any], places: ModelPlaces) -> DictConfig:
    """Return the config of a run to resume from its record, which is untrusted.

    Args:
        folder: the run's.
        record: as it is read.
        places: where its backbone and tokenizer lie now.

    Raises:
        UserError: the record's config is damaged, or asks for what only a user may ask for; the backbone is gone.
    """
    from omegaconf import OmegaConf

    try:
        content = checked(record)
    except UserError as error:
        error.file = error.file or folder / "run.json"
        raise
    return OmegaConf.create(relocated(content, places["model_path"], places["tokenizer"]))


def with_equal_keys(found: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Runs by folder and record, with defaults for what they lack if runs of the same choices have unlike keys."""
    keys: dict[str, set[str]] = {}
    for _, record in found:
        own = {key: node.keys() if isinstance(node, dict) else 0 for key, node in record["config"].items()}
        keys.setdefault(str(record["choices"]), set()).add(str(own))
    if all(len(each) == 1 for each in keys.values()):
        return list(found)
    return [(folder, record | {"config": filled(record)}) for folder, record in found]


def _option(group: str, record: Mapping[str, Any], usual: str) -> str | None:
    asked = record["choices"].get(group)
    if asked is None and group not in KINDS:
        return usual
    node = record["config"].get(group)
    kind = str(node.get(KINDS[group])) if group in KINDS and isinstance(node, dict) else usual
    tried = (asked, OPTIONS.get(kind, kind))
    return next((option for option in tried if option in choices(group)), None)


@cache
def _top() -> tuple[dict[str, Any], dict[str, str]]:
    """Top-level keys with their defaults, and the usual choice of each group that has keys.

    Which seed a run had is never guessed.
    """
    import yaml

    top = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    del top["seed"]
    usual = {group: choice for each in top.pop("defaults") if isinstance(each, dict) for group, choice in each.items()}
    return top, {group: choice for group, choice in usual.items() if group != "hydra" and isinstance(choice, str)}


@cache
def _today(options: tuple[tuple[str, str], ...]) -> dict[str, dict[str, Any]]:
    """The keys of these choices with their defaults, group by group."""
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose

    composed: Any = compose(conf_folder(), None, [f"+{group}={option}" for group, option in options])
    return {group: OmegaConf.to_container(composed[group], resolve=False) for group, _ in options}  # type: ignore[misc]
