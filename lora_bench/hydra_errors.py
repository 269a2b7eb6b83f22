"""Hydra's and OmegaConf's errors in our words: a paragraph with the key, the nearest known one, the remedy."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOADS_CODE = re.compile(r"^[+~]*hydra[./](callbacks|job_logging|hydra_logging)\b")


def refuse_code(arguments: list[str]) -> None:
    """Refuse what would make Hydra import or call something that an argument names."""
    for argument in arguments:
        if "_target_" in argument or _LOADS_CODE.match(argument) or argument.startswith("--experimental-rerun"):
            raise UserError(
                f"{argument.split('=')[0]!r} names code to run, which a config may not do",
                remedy="Choose among the options of the groups; methods are looked up by name.",
            )


@contextmanager
def translated(conf: Path, config_name: str, arguments: list[str]) -> Iterator[None]:
    """Raise a `UserError` for whatever Hydra finds wrong with the arguments or a YAML file."""
    import yaml

    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(
            f"is not valid YAML: {error.problem}",
            file=mark.name if mark else None,
            row=mark.line + 1 if mark else None,
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, conf, config_name, arguments) from None


def _explain(error: Exception, conf: Path, config_name: str, arguments: list[str]) -> UserError:
    message = str(error)
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        key = found.group(1).split("@")[0]
        known = _known_keys(conf, config_name, arguments)
        remedy = nearest(key, known) or "lora-bench train --cfg job lists the keys."
        return UserError("is not a known key", key=key, remedy=remedy if len(remedy) < 300 else _LIST_KEYS)
    found = re.search(r"(?:In '[^']*': )?Could not find '([^']+)'", message)
    if found:
        group, _, option = found.group(1).rpartition("/")
        offered = message.partition("Available options")[2].partition("Config search path")[0]
        options = sorted(set(re.findall(r"^\t(\S+)", offered, re.MULTILINE)))
        hint = nearest(option, options) if options else "lora-bench train --help lists the groups."
        listed = f"Choices: {', '.join(options)}." if hint.startswith("Did") else ""
        return UserError("is not one of its choices", key=group, value=option, remedy=f"{hint} {listed}")
    found = re.search(r"Ambiguous value for argument '([^']+)'", message)
    if found:
        key, _, value = found.group(1).partition("=")
        remedy = f"Add -m to sweep over the values, or quote a list: '{key}=[{value}]'."
        return UserError("has several values", key=key, value=value, remedy=remedy)
    found = re.search(r"Missing mandatory value: (\S+)|MissingMandatoryValue.*'(\S+)'", message)
    if found:
        key = found.group(1) or found.group(2)
        return UserError("is needed", key=key, remedy=f"Give {key}=VALUE.")
    if isinstance(error, OverrideParseException):
        reason = "cannot be read as key=value"
        remedy = "Put a value with special characters in quotes inside quotes: 'key=\"a,b [c]\"'."
        return UserError(f"{error.override!r} {reason}", remedy=remedy)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return UserError("; ".join(lines[:2]).rstrip("."))


_LIST_KEYS = "lora-bench train --cfg job lists the keys there are."


def _known_keys(conf: Path, config_name: str, arguments: list[str]) -> set[str]:
    """All keys of the config that the same group choices compose, and the groups' names."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    groups = {path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml"))} - {"hydra"}
    chosen = [a for a in arguments if a.split("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        try:
            composed = compose(config_name, chosen)
        except Exception:  # one of the choices is wrong too
            composed = compose(config_name)
    return groups | set(_flatten(OmegaConf.to_container(composed, resolve=False)))


def _flatten(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
