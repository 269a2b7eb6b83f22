"""The option `resume=DIR`: resume a run, or run the unfinished jobs of a sweep."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config import keys
from lora_bench.config.removed import REMOVAL, removal_note
from lora_bench.config.schema import LAST
from lora_bench.console.redaction import hides_secret, is_identifier, leaves, redact_value
from lora_bench.errors import Code, UserError, quoted, shell_argument
from lora_bench.records import sweep_folder
from lora_bench.records.run_folder import PROMPT_AGAIN, find_runs, is_prompted
from lora_bench.records.run_names import TOP, find_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

    from lora_bench.config.compose import Arguments


def resolve_folder(resume: str, top: Path = TOP) -> Path:
    """Return the folder that `resume` names; for `last` the newest unfinished run or sweep below `top`.

    Any other reference is resolved as `find_folder` does. For `last`, runs of a sweep and of `lora-bench prompt` do not
    count. A record without a date, or with one in the future, is never the newest.

    Raises:
        UserError: there is no unfinished run or sweep, or none has a valid date; or as `find_folder`.
    """
    if resume != LAST:
        return find_folder(resume, "resume")
    runs = find_runs([top])[0] if top.exists() else []
    dated = [
        *sweep_folder.unfinished_sweeps(top),
        *(
            (record["created"], folder)
            for folder, record in runs
            if record["status"] not in sweep_folder.FINAL_STATUSES
            and not is_prompted(record)
            and not any(sweep_folder.is_sweep(above) for above in folder.parents)
        ),
    ]
    if not dated:
        raise UserError(f"there is no unfinished run below {top}", key="resume", value="last", code=Code.NOT_FOUND)
    moments = {folder: moment for created, folder in dated if (moment := _moment(created))}
    if not moments:
        reason = "has no date, or one in the future, so the newest run cannot be determined"
        remedy = f"Name the folder: {shell_argument('resume', dated[0][1])}"
        raise UserError(reason, key="resume", value="last", file=dated[0][1], remedy=remedy, code=Code.NOT_FOUND)
    return max(moments, key=lambda folder: (moments[folder], str(folder)))


def _moment(created: object) -> datetime | None:
    """Return the time (UTC) at which a record says it was created; None if it has no valid time or one in the future.

    A time without a zone is local.
    """
    try:
        moment = datetime.fromisoformat(str(created)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return moment if moment <= datetime.now(UTC) else None


def sweep_arguments(arguments: Arguments, folder: Path) -> Arguments:
    """Return the arguments that the sweep in `folder` was started with, to run its unfinished jobs.

    They are multirun, with `hydra.sweep.dir` and `resume` set to the folder.

    Args:
        arguments: as typed now; they may repeat arguments of the sweep.
        folder: of the sweep.

    Raises:
        UserError: an argument is new, the sweep was started with a secret or a key that was removed since, or its
            record is missing or damaged.
    """
    sweep = sweep_folder.read(folder)
    typed = [override for override in arguments.overrides if keys.key_of(override) != "resume"]
    new = [override for override in typed if override not in sweep.overrides]
    if new or (arguments.config_dir and os.path.abspath(arguments.config_dir) != sweep.config_dir):
        argument_text = new[0] if new else "--config-dir"
        raise UserError(
            f"a sweep is resumed with its own settings, so {argument_text!r} cannot be given",
            key="resume",
            value=folder,
            remedy="Leave it out, or start a new sweep.",
            code=Code.NOT_RESUMABLE,
        )
    refuse_hidden(folder, sweep.overrides)
    _refuse_removed(folder, sweep.overrides)
    recorded = type(arguments).read([])
    recorded.overrides = [*sweep.overrides, f"hydra.sweep.dir={quoted(folder)}", f"resume={quoted(folder)}"]
    recorded.multirun, recorded.config_dir = True, sweep.config_dir
    return recorded


def refuse_prompted(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse to resume a run of `lora-bench prompt`, which trains nothing, with a `UserError`; other runs pass."""
    if is_prompted(record):
        raise UserError(
            "is a run of lora-bench prompt", key="resume", value=folder, remedy=PROMPT_AGAIN, code=Code.NOT_RESUMABLE
        )


def refuse_hidden(folder: Path, recorded: Any) -> None:
    """Refuse to resume a run or sweep whose recorded config or overrides hide a secret, so that they are incomplete.

    Raises:
        UserError: naming the folder, not the key.
    """
    if hides_secret(recorded):
        remedy = "Start a new one, with the secret in an environment variable: '${oc.env:NAME}'."
        reason = "was started with a secret, or text that looks like one, and records do not keep secrets"
        raise UserError(reason, key="resume", value=folder, remedy=remedy, code=Code.NOT_RESUMABLE)


def _refuse_removed(folder: Path, overrides: Sequence[str]) -> None:
    """Refuse to resume a sweep that was started with a key that was removed since, whatever its value.

    A removed choice of a key that still exists is refused as well.

    Raises:
        UserError: naming the override.
    """
    for override in overrides:
        key, (_, _, value) = keys.key_of(override), override.partition("=")
        if any(removal_note(key, choice) for choice in value.split(",")):
            reason = f"the sweep was started with {override}, which was {REMOVAL}"
            remedy = "Resume it with version 0.1, or start a new sweep without it."
            raise UserError(reason, key="resume", value=folder, remedy=remedy, code=Code.NOT_RESUMABLE)


def refuse_unloadable(cfg: DictConfig) -> None:
    """Refuse a new run whose record would hide a value that loading the run needs: a path, a name or a column.

    A config that cannot be resolved passes.

    Raises:
        UserError: such a value is a secret, or looks like one; it is named by its key.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # building the settings will name the key
        return
    for key, value in leaves(content):
        if is_identifier(key) and hides_secret(redact_value(value, key)) and not hides_secret(value):
            reason = "holds a secret, or text that looks like one; records hide secrets, so the run could not load"
            raise UserError(
                reason, key=key, remedy="Rename it, or use a symbolic link of another name.", code=Code.FORBIDDEN
            )


def refuse_difference(
    record: Mapping[str, Any], recorded: DictConfig, cfg: DictConfig, overrides: Sequence[str], groups: Sequence[str]
) -> None:
    """Refuse overrides that would change a resumed run; overrides that repeat its config, or those typed then, pass.

    So do `resume`, `model.path` and `model.tokenizer`, whatever their values.

    Args:
        record: of the run, with its option of each group, and its overrides as typed.
        recorded: its config.
        cfg: the config that the overrides compose now.
        overrides: as typed now.
        groups: names of the config groups.

    Raises:
        UserError: an override has another value than the record.
    """
    for override in overrides:
        key, _, value = str(override).lstrip("+~").partition("=")
        if key in ("resume", "model.path", "model.tokenizer"):  # moved files are checked by their hash
            continue
        if override in record["overrides"]:  # a name of a run was replaced by its folder then
            continue
        if key in groups:
            before, differs = record["choices"].get(key), record["choices"].get(key) != value
        else:
            before = OmegaConf.select(recorded, key)
            differs = before != OmegaConf.select(cfg, key)
        if differs:
            raise UserError(
                f"the run to resume was started with {before}",
                key=key,
                value=value,
                remedy="Leave it out: a run is resumed with its own settings.",
                code=Code.NOT_RESUMABLE,
            )
