"""The config of a recorded run, as today's code takes it: keys that have come since have their defaults.

A record holds every key that there was when its run began. What it lacks is taken from the choice that it names, else
(a choice from a folder of the user's) from one of the same method, family or source.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from lora_bench.errors import UserError
from lora_bench.help import choices, conf_folder
from lora_bench.prompted import is_prompted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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


def restored(folder: Path, record: Mapping[str, Any]) -> DictConfig:
    """Return the config of a run from its record, which is untrusted: see `overrides.check_config`.

    Raises:
        UserError: the record's config is damaged, or asks for what only a user may ask for.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lora_bench.overrides import check_config

    try:
        config = OmegaConf.create(filled(record))
        check_config(config)
        for group in ("data", "model", "adapter", "optimizer", "trainer"):
            if not isinstance(config.get(group), DictConfig):
                raise TypeError(f"{group} is not a group of keys")
    except UserError as error:
        error.file = error.file or folder / "run.json"
        raise
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"is damaged: its config cannot be read ({reason})", file=folder / "run.json") from None
    return config


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

    from lora_bench.hydra_errors import compose

    composed: Any = compose(conf_folder(), None, [f"+{group}={option}" for group, option in options])
    return {group: OmegaConf.to_container(composed[group], resolve=False) for group, _ in options}  # type: ignore[misc]
