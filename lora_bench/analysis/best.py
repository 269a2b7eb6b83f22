"""The recommended setting as a preset: written by `compare --best DIR`, used as `--config-dir DIR experiment=best`."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from lora_bench.config.groups import all_choices, conf_folder
from lora_bench.config.keys import flatten
from lora_bench.console.format import to_single_line
from lora_bench.errors import Code, UserError
from lora_bench.files.paths import check_output, write_output
from lora_bench.records.backfill import load_config
from lora_bench.records.run_folder import is_prompted

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table

OPTION = "--best"
PRESET = "best"
GROUPS = ("model", "adapter", "data", "optimizer", "trainer")
"""Groups whose choices the preset names; `head` and `tasks` have no choices."""
SECTIONS = (*GROUPS, "head")
"""Sections of the config that the preset sets."""


def save_best(table: Table, folder: Path) -> Path:
    """Write the recommended setting to `<folder>/experiment/best.yaml` and return its path.

    The preset names the choices of the configuration groups, and sets each key whose value is not the default.

    Args:
        table: with its decisions.
        folder: a folder for `--config-dir`; choices of the groups may lie in it.

    Raises:
        UserError: nothing is recommended, or for several data sets; the setting cannot be trained; or the file cannot
            be written.
    """
    record = _recommended_record(table)
    config = load_config(record)
    chosen = {group: _choice(record, group, folder) for group in GROUPS}
    values = _differing_values(config, chosen, folder)
    decision = next(decision for decision in table.decisions if decision.recommended is not None)
    file = folder / "experiment" / f"{PRESET}.yaml"
    check_output(file, OPTION, make_folders=True)
    write_output(file, _preset(decision.sentences, folder, chosen, values).encode(), OPTION, make_folders=True)
    return file


def _recommended_record(table: Table) -> dict[str, Any]:
    """Return the record of the recommended setting's first run, which is one that `train` can repeat."""
    recommended = [decision.recommended for decision in table.decisions if decision.recommended is not None]
    if not recommended:
        remedy = "Train more runs first: none of these learned the task."
        raise UserError("no setting is recommended", key=OPTION, remedy=remedy, code=Code.UNSUPPORTED)
    if len(recommended) > 1:
        remedy = "Choose one: --where 'data=qqp', or give the folder of its runs."
        raise UserError("the runs are on several data sets", key=OPTION, remedy=remedy, code=Code.CONFLICT)
    folder = recommended[0].folders[0]
    record = table.records[folder]
    if is_prompted(record) or "predictions" in record["config"]:
        reason = "the recommended setting is a language model that was prompted, which cannot be trained"
        raise UserError(reason, key=OPTION, value=folder, code=Code.UNSUPPORTED)
    if folder.parent.name == "tasks":
        reason = "the recommended setting is one of several tasks (data.tasks)"
        raise UserError(reason, key=OPTION, value=folder, code=Code.UNSUPPORTED)
    return record


def _choice(record: dict[str, Any], group: str, folder: Path) -> str:
    """Return the choice of a group that a run was made with, which ships with the package or lies in `folder`."""
    choice = str(record["choices"].get(group))
    own = re.fullmatch(r"\w[\w-]*", choice) is not None and (folder / group / f"{choice}.yaml").is_file()
    if choice not in all_choices(group) and not own:
        remedy = f"Give {OPTION} the folder that has {group}/{to_single_line(choice)}.yaml."
        raise UserError(
            "is no choice that ships with lora-bench", key=group, value=choice, remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    return choice


def _differing_values(config: dict[str, Any], chosen: dict[str, str], folder: Path) -> dict[str, Any]:
    """Return the nested values in which a config differs from the defaults of its choices."""
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose

    overrides = [f"{group}={choice}" for group, choice in chosen.items()]
    config_dir = str(folder) if folder.is_dir() else None
    composed = compose(conf_folder(), "config", overrides, config_dir)
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


def _preset(sentences: list[str], folder: Path, chosen: dict[str, str], values: dict[str, Any]) -> str:
    """Return the text of the preset."""
    import yaml

    command = f"  lora-bench train --config-dir {shlex.quote(str(folder))} experiment={PRESET}"
    lines = ["# @package _global_", *(f"# {to_single_line(line)}" for line in (*sentences, command)), "defaults:"]
    lines += [f"  - override /{group}: {choice}" for group, choice in chosen.items()]
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=False) if values else ""
    return "\n".join(lines) + "\n" + body
