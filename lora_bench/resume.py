"""What `resume=` means: a run to go on with, or a sweep of which to run what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lora_bench import sweep
from lora_bench.errors import UserError
from lora_bench.prompted import ASKS_THE_REST, is_prompted
from lora_bench.record import find
from lora_bench.secrets import hides_secret, is_identifier, leaves, redacted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from lora_bench.hydra_errors import Arguments


def place(resume: str, top: Path) -> Path:
    """The folder that `resume` names; for `last` that of the newest unfinished run or sweep below `top`."""
    if resume != "last":
        return Path(resume)
    sweeps = list(sweep.unfinished(top))
    runs = find([top])[0] if top.exists() else []
    alone = [
        (record["created"] or "", folder)
        for folder, record in runs
        if record["status"] not in sweep.ENDED
        and not is_prompted(record)
        and not any(sweep.is_sweep(above) for above in folder.parents)
    ]
    if not sweeps and not alone:
        raise UserError(f"there is no unfinished run below {top}", key="resume", value="last")
    return max([*sweeps, *alone])[1]


def arguments_of_sweep(arguments: Arguments, folder: Path) -> Arguments:
    """The arguments that the sweep in `folder` was begun with, to run what it lacks.

    Raises:
        UserError: more is asked for than to go on.
    """
    more = [override for override in arguments.overrides if sweep.key_of(override) != "resume"]
    if more or arguments.config_dir is not None:
        asked = more[0] if more else "--config-dir"
        raise UserError(f"goes on as it began, so {asked!r} cannot be given", key="resume", value=folder)
    begun = sweep.read(folder)
    refuse_hidden(folder, begun.overrides)
    overrides = [*begun.overrides, f"hydra.sweep.dir={quoted(folder)}", f"resume={quoted(folder)}"]
    again = type(arguments).read([])
    again.overrides, again.multirun, again.config_dir = overrides, True, begun.config_dir
    return again


def refuse_prompted(folder: Path, record: Mapping[str, Any]) -> None:
    """A prompted run trains nothing that could be gone on with."""
    if is_prompted(record):
        raise UserError("is a run of lora-bench prompt", key="resume", value=folder, remedy=ASKS_THE_REST)


def refuse_hidden(folder: Path, asked: Any) -> None:
    """What a record hides cannot be gone on with."""
    if hides_secret(asked):
        remedy = "Begin it anew, with the key in an environment variable: '${oc.env:NAME}'."
        reason = "was begun with a key, or what looks like one, and keys are not kept"
        raise UserError(reason, key="resume", value=folder, remedy=remedy)


def refuse_unloadable(cfg: DictConfig) -> None:
    """Refuse a new run whose record would hide what loading the run needs: a path, a name or a column.

    Raises:
        UserError: such a value is a secret, or looks like one.
    """
    for key, value in leaves(OmegaConf.to_container(cfg, resolve=True)):
        if is_identifier(key) and hides_secret(redacted(value, key)) and not hides_secret(value):
            reason = (
                "holds a secret, or what looks like one; records hide it, so that the run could not be loaded again"
            )
            raise UserError(reason, key=key, remedy="Rename it, or use a link of another name.")


def quoted(value: object) -> str:
    """A value as Hydra's grammar reads it back, whatever is in it."""
    text = str(value).replace("'", "\\'")
    return f"'{text}'"


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
        key, _, value = str(override).lstrip("+~").partition("=")
        if key == "resume":
            continue
        if key in groups:
            before, differs = choices.get(key), choices.get(key) != value
        else:
            before = OmegaConf.select(began, key)
            differs = before != OmegaConf.select(cfg, key)
        if differs:
            raise UserError(f"the run began with {before}", key=key, value=value, remedy="It goes on as it began.")
