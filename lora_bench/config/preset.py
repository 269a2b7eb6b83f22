"""Presets: the choices of the configuration groups and the values in which a config differs from their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from lora_bench.config.compose import compose
from lora_bench.config.groups import conf_folder
from lora_bench.config.keys import flatten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GROUPS = ("model", "adapter", "data", "optimizer", "trainer")
"""Groups whose choices a preset names."""
SECTIONS = (*GROUPS, "head")
"""Sections of the config that a preset sets; `head` has no choices."""


def preset_text(
    config: Mapping[str, Any], chosen: Mapping[str, str], config_dir: str | None, comments: Sequence[str]
) -> str:
    """Return the YAML text of a preset with which `train` composes the sections of `config` again.

    Args:
        config: resolved, as in a record.
        chosen: the option of each of `GROUPS`.
        config_dir: a folder with further options; None: there are only the shipped ones.
        comments: lines above the settings, without characters that end a line.

    Raises:
        UserError: the options cannot be composed.
    """
    lines = ["# @package _global_", *(f"# {comment}" for comment in comments), "defaults:"]
    lines += [f"  - override /{group}: {option}" for group, option in chosen.items()]
    values = _differing_values(config, chosen, config_dir)
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=False) if values else ""
    return "\n".join(lines) + "\n" + body


def _differing_values(config: Mapping[str, Any], chosen: Mapping[str, str], config_dir: str | None) -> dict[str, Any]:
    """Return the values of `SECTIONS` that are not the defaults of the chosen options, nested by group."""
    composed = compose(conf_folder(), "config", [f"{group}={option}" for group, option in chosen.items()], config_dir)
    sections = {name: OmegaConf.to_container(composed[name], resolve=True) for name in SECTIONS if name in composed}
    defaults = dict(flatten(sections))
    values: dict[str, Any] = {}
    for key, value in flatten({name: config[name] for name in SECTIONS if name in config}):
        if key not in defaults or defaults[key] != value:
            *groups, name = key.split(".")
            node = values
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
    return values
