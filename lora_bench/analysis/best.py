"""The recommended setting as a preset: written by `compare --best DIR`, used as `--config-dir DIR experiment=best`."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from lora_bench.config.groups import all_choices
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
    from lora_bench.config.preset import GROUPS, preset_text  # late: Hydra

    record = _recommended_record(table)
    chosen = {group: _choice(record, group, folder) for group in GROUPS}
    sentences = next(decision.sentences for decision in table.decisions if decision.recommended is not None)
    command = f"  lora-bench train --config-dir {shlex.quote(str(folder))} experiment={PRESET}"
    comments = [to_single_line(line) for line in (*sentences, command)]
    config_dir = str(folder) if folder.is_dir() else None
    text = preset_text(load_config(record), chosen, config_dir, comments)
    file = folder / "experiment" / f"{PRESET}.yaml"
    check_output(file, OPTION, make_folders=True)
    write_output(file, text.encode(), OPTION, make_folders=True)
    return file


def _recommended_record(table: Table) -> dict[str, Any]:
    """Return the record of the recommended setting's first run, which is one that `train` can repeat."""
    recommended = [decision.recommended for decision in table.decisions if decision.recommended is not None]
    if not recommended:
        remedy = " ".join(table.advice[:2]) or "Train a run first."
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
    is_local = re.fullmatch(r"\w[\w-]*", choice) is not None and (folder / group / f"{choice}.yaml").is_file()
    if choice not in all_choices(group) and not is_local:
        remedy = f"Give {OPTION} the folder that has {group}/{to_single_line(choice)}.yaml."
        raise UserError(
            "is no choice that ships with lora-bench", key=group, value=choice, remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    return choice
