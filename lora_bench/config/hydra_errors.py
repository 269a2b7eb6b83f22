"""Translation of Hydra's errors into `UserError`, with key and remedy."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config.compose import _LIST_GROUPS, Arguments, compose
from lora_bench.config.foreign_keys import foreign_key_note
from lora_bench.config.groups import all_choices
from lora_bench.config.keys import key_of, split_override
from lora_bench.config.overrides import (
    parse_override,
    unreadable_override,
)
from lora_bench.config.removed import removal_note
from lora_bench.errors import Code, UserError, nearest, shell_argument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def translate_errors(conf: Path, config_name: str, arguments: Arguments) -> Iterator[None]:
    """Translate errors of Hydra, OmegaConf and YAML within the context into `UserError`, with key and remedy.

    They concern the arguments or a YAML file. An `OSError` that names a file counts as one of Hydra's, which could not
    create the folder of the run or sweep. `BrokenPipeError`, an `OSError` without a file, most `ValueError`s and all
    other exceptions pass unchanged.

    Args:
        conf: the folder with the groups.
        config_name: the config at its top.
        arguments: as typed; configs are composed of them to find similar keys and choices.
    """
    import yaml

    try:
        yield
    except BrokenPipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(
            f"is not valid YAML: {error.problem}",
            file=mark.name if mark else None,
            row=mark.line + 1 if mark else None,
            code=Code.INVALID_SYNTAX,
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, conf, config_name, arguments) from None
    except OSError as error:  # jobs keep their own errors: this one is Hydra's, as it makes the folder
        if error.filename is None:
            raise
        key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
        reason = f"cannot be written: {error.strerror}"
        raise UserError(
            reason, key=key, value=error.filename, remedy="Give a folder where you may write.", code=Code.UNWRITABLE
        ) from None
    except ValueError as error:
        if "null byte" in str(error):
            key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
            raise UserError("holds a NUL, which no path can", key=key, value="…", code=Code.INVALID_VALUE) from None
        if "Config group override" not in str(error):
            raise
        wrong = (o for o in arguments.overrides if re.fullmatch(r"[+]?[\w/]*=(null|true|false|[\d.+-]*)(,.*)?", o))
        reason = f"{next(wrong, 'a group')!r} does not name one of the group's choices"
        raise UserError(reason, remedy=_LIST_GROUPS, code=Code.UNKNOWN_CHOICE) from None


def _explain(error: Exception, conf: Path, config_name: str, arguments: Arguments) -> UserError:
    """Return the `UserError` for an error of Hydra or OmegaConf, which is recognised by its message.

    The first two lines of an unknown message become the reason.
    """
    message = str(error)
    match = re.search(r"Could not override '([^']+)'", message)
    if match:
        key = match.group(1).split("@")[0]
        remedy = (
            removal_note(key)
            or foreign_key_note(key)
            or nearest(key, _all_keys(conf, config_name, arguments))
            or _LIST_KEYS
        )
        return UserError(
            "is not a known key", key=key, remedy=remedy if len(remedy) < 300 else _LIST_KEYS, code=Code.UNKNOWN_KEY
        )
    match = re.search(r"Could not (?:find|load) '([^']+)'", message)
    if match:
        group, _, option = match.group(1).rpartition("/")
        return _no_such_choice(group, option, all_choices(group, arguments.config_dir), arguments.config_dir)
    if "Ambiguous value for argument" in message or "requires --multirun" in message:
        several = next((text for text in arguments.overrides if parse_override(text).is_sweep_override()), "")
        key, value = split_override(several)
        remedy = _for_several_values(key, value, conf, config_name, arguments)
        return UserError("has several values", key=key, value=value, remedy=remedy, code=Code.INVALID_VALUE)
    match = re.search(r"Missing mandatory value: (\S+)|MissingMandatoryValue.*'(\S+)'", message)
    if match:
        key = match.group(1) or match.group(2)
        return UserError("is missing", key=key, remedy=f"Give {key}=VALUE.", code=Code.MISSING)
    match = re.search(r"Key '(\w+)' is not in struct|Could not delete '(\w+)'", message)
    if match:
        return UserError(
            "is missing", key=match.group(1) or match.group(2), remedy="It cannot be left out.", code=Code.MISSING
        )
    if isinstance(error, OverrideParseException):
        return unreadable_override(str(error.override))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return UserError("; ".join(lines[:2]).rstrip("."), code=Code.INVALID_SYNTAX)


def _for_several_values(key: str, value: str, conf: Path, config_name: str, arguments: Arguments) -> str:
    """Return what to type instead of `key=a,b`; empty if nothing fits.

    It is a sweep, if the command is `train`, and a list or one text, depending on the default of the key.
    """
    default = OmegaConf.select(_composed_as_chosen(conf, config_name, arguments), key, throw_on_missing=False)
    is_group = (conf / key).is_dir()
    advice = ["Add -m to sweep over the values."] if config_name == "config" else []
    if isinstance(default, ListConfig) or key in ("metric", "tracking"):
        advice.append(f"For a list, type {shlex.quote(f'{key}=[{value}]')}")
    elif not is_group and not isinstance(default, bool | int | float) and re.search("[^0-9.,eE+-]", value):
        advice.append(f"For one text, type {shell_argument(key, value)}")
    return " ".join(advice)


_LIST_KEYS = "lora-bench train --cfg job lists the keys there are."


def _no_such_choice(group: str, option: str, options: list[str], config_dir: str | None) -> UserError:
    """Return the error for a choice that a group does not have; it suggests the nearest one and lists all.

    If `config_dir` holds `<group>/<option>.yml`, the error is that this ending is not read instead.

    Args:
        group: the config group.
        option: the choice as typed.
        options: the choices of the group; may be empty.
        config_dir: the folder of `--config-dir`; None without one.
    """
    misnamed = os.path.join(config_dir or "", group, f"{option}.yml")
    if config_dir and os.path.isfile(misnamed):
        return UserError(
            "ends in .yml, which is not read",
            file=misnamed,
            remedy="Rename it so that it ends in .yaml.",
            code=Code.UNKNOWN_CHOICE,
        )
    hint = nearest(option, options) if options else _LIST_GROUPS
    listed = f"Choices: {', '.join(options)}." if hint.startswith("Did") else ""
    return UserError(
        "is not one of its choices", key=group, value=option, remedy=f"{hint} {listed}", code=Code.UNKNOWN_CHOICE
    )


def _all_keys(conf: Path, config_name: str, arguments: Arguments) -> set[str]:
    """Return all dotted keys, except `hydra`, of the config that the same choices of groups compose, and all groups."""
    composed = _composed_as_chosen(conf, config_name, arguments)
    config = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(config, dict)
    del config["hydra"]
    return _groups(conf) | set(_prefixes(config))


def _groups(conf: Path) -> set[str]:
    """Return the names of the groups at the top of `conf`."""
    return {path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml"))} - {"hydra"}


def _composed_as_chosen(conf: Path, config_name: str, arguments: Arguments) -> DictConfig:
    """Return the config of the same choices of groups, without the other overrides.

    Deleted groups and choices with a comma are left out too. If one of the choices cannot be composed, all are left
    out.
    """
    choices = [text for text in arguments.overrides if key_of(text) in _groups(conf)]
    chosen = [text for text in choices if "," not in text and not text.startswith("~")]
    try:
        return compose(conf, config_name, chosen, arguments.config_dir)
    except Exception:  # one of the choices is wrong too
        return compose(conf, config_name, [])


def _prefixes(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all nodes and values, a node before those in it; lists are values."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _prefixes(value, f"{prefix}{key}.")
