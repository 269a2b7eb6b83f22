"""What `resume=` means: a run to go on with, or a sweep of which to run what it lacks."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config import keys
from lora_bench.console.redaction import hides_secret, is_identifier, leaves, redact_value
from lora_bench.errors import Code, UserError, quoted, shell_argument
from lora_bench.records import sweep_folder
from lora_bench.records.prompted import ASKS_THE_REST, is_prompted
from lora_bench.records.run_folder import find

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from lora_bench.config.compose import Arguments


def place(resume: str, top: Path) -> Path:
    """Return the folder that `resume` names; for `last` that of the newest unfinished run or sweep below `top`.

    A record without a date, or with one in the future, is never the newest.
    """
    if resume != "last":
        return Path(resume)
    runs = find([top])[0] if top.exists() else []
    dated = [
        *sweep_folder.unfinished(top),
        *(
            (record["created"], folder)
            for folder, record in runs
            if record["status"] not in sweep_folder.ENDED
            and not is_prompted(record)
            and not any(sweep_folder.is_sweep(above) for above in folder.parents)
        ),
    ]
    if not dated:
        raise UserError(f"there is no unfinished run below {top}", key="resume", value="last", code=Code.NOT_FOUND)
    moments = {folder: moment for created, folder in dated if (moment := _moment(created))}
    if not moments:
        reason = "has no date, or one in the future, so it cannot be said which is the last"
        remedy = f"Name the folder: {shell_argument('resume', dated[0][1])}"
        raise UserError(reason, key="resume", value="last", file=dated[0][1], remedy=remedy, code=Code.NOT_FOUND)
    return max(moments, key=lambda folder: (moments[folder], str(folder)))


def _moment(created: object) -> datetime | None:
    """Return when a record says that it was made; None if it does not say, or names a time that is yet to come."""
    try:
        moment = datetime.fromisoformat(str(created)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return moment if moment <= datetime.now(UTC) else None


def arguments_of_sweep(arguments: Arguments, folder: Path) -> Arguments:
    """The arguments that the sweep in `folder` was begun with, to run what it lacks.

    Raises:
        UserError: more is asked for than to go on; what the sweep was begun with may be repeated.
    """
    begun = sweep_folder.read(folder)
    typed = [override for override in arguments.overrides if keys.key_of(override) != "resume"]
    more = [override for override in typed if override not in begun.overrides]
    if more or (arguments.config_dir and os.path.abspath(arguments.config_dir) != begun.config_dir):
        asked = more[0] if more else "--config-dir"
        raise UserError(
            f"goes on as it began, so {asked!r} cannot be given", key="resume", value=folder, code=Code.NOT_RESUMABLE
        )
    refuse_hidden(folder, begun.overrides)
    overrides = [*begun.overrides, f"hydra.sweep.dir={quoted(folder)}", f"resume={quoted(folder)}"]
    again = type(arguments).read([])
    again.overrides, again.multirun, again.config_dir = overrides, True, begun.config_dir
    return again


def refuse_prompted(folder: Path, record: Mapping[str, Any]) -> None:
    """A prompted run trains nothing that could be gone on with."""
    if is_prompted(record):
        raise UserError(
            "is a run of lora-bench prompt", key="resume", value=folder, remedy=ASKS_THE_REST, code=Code.NOT_RESUMABLE
        )


def refuse_hidden(folder: Path, asked: Any) -> None:
    """What a record hides cannot be gone on with."""
    if hides_secret(asked):
        remedy = "Begin it anew, with the key in an environment variable: '${oc.env:NAME}'."
        reason = "was begun with a key, or what looks like one, and keys are not kept"
        raise UserError(reason, key="resume", value=folder, remedy=remedy, code=Code.NOT_RESUMABLE)


def refuse_unloadable(cfg: DictConfig) -> None:
    """Refuse a new run whose record would hide what loading the run needs: a path, a name or a column.

    Raises:
        UserError: such a value is a secret, or looks like one.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # whoever builds the settings names the key
        return
    for key, value in leaves(content):
        if is_identifier(key) and hides_secret(redact_value(value, key)) and not hides_secret(value):
            reason = (
                "holds a secret, or what looks like one; records hide it, so that the run could not be loaded again"
            )
            raise UserError(reason, key=key, remedy="Rename it, or use a link of another name.", code=Code.FORBIDDEN)


def refuse_difference(
    choices: Mapping[str, Any], began: DictConfig, cfg: DictConfig, overrides: Sequence[str], groups: Sequence[str]
) -> None:
    """A run goes on as it began: refuse overrides that would have made another one.

    Args:
        choices: of the run that began, by group.
        began: its config.
        cfg: what the overrides compose now.
        overrides: as typed.
        groups: names of the config's groups.
    """
    for override in overrides:
        key, value = keys.split_override(str(override))
        if key in ("resume", "model.path", "model.tokenizer"):  # the same files at another place are checked by hash
            continue
        if key in groups:
            before, differs = choices.get(key), choices.get(key) != value
        else:
            before = OmegaConf.select(began, key)
            differs = before != OmegaConf.select(cfg, key)
        if differs:
            raise UserError(
                f"the run began with {before}",
                key=key,
                value=value,
                remedy="It goes on as it began.",
                code=Code.NOT_RESUMABLE,
            )
