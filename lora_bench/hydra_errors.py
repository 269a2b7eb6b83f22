"""What stands between the shell and Hydra: arguments read and checked, code refused, errors told in our words.

Hydra by itself imports and calls what a config names: callbacks, logging factories, nested `_target_`, a pickled
config, packages on its search path. None of that is needed here, so all of it is refused before Hydra starts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import secrets
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOADS_CODE = re.compile(r"^[+~]*hydra[./](callbacks|job_logging|hydra_logging|searchpath|job\.env_set)\b")


class Arguments(argparse.Namespace):
    """What the command line says to Hydra; options may stand before, between and behind the overrides."""

    overrides: list[str]
    multirun: bool
    cfg: str | None
    resolve: bool
    package: str | None
    config_dir: str | None

    @classmethod
    def read(cls, arguments: list[str]) -> Arguments:
        """Parse the arguments, and refuse what would make Hydra import or call something that one of them names."""
        parsed = _parser().parse_intermixed_args(arguments, cls())
        for override in parsed.overrides:
            if re.search(r"(^|[.{,])api_?key[=:]", _plain_key(override), re.IGNORECASE):  # its value is not repeated
                remedy = "Put it into the environment variable that llm.api_key_env names."
                raise UserError("a key is given in no config and on no command line", key="llm", remedy=remedy)
            if "_target_" in override or _LOADS_CODE.match(override):
                raise _names_code(override.split("=")[0])
        if parsed.config_dir is not None and not os.path.isdir(parsed.config_dir):
            raise UserError("is not a folder", key="--config-dir", value=parsed.config_dir)
        if (parsed.resolve or parsed.package) and not parsed.cfg:
            raise UserError("--resolve and --package say how --cfg prints", remedy="Add --cfg job.")
        return parsed

    def for_hydra(self) -> list[str]:
        """The same in the order in which Hydra's own parser takes them."""
        options = ["--multirun"] * self.multirun + ["--resolve"] * self.resolve
        for option in ("cfg", "package", "config_dir"):
            value = getattr(self, option)
            options += [f"--{option.replace('_', '-')}={value}"] if value is not None else []
        return [*options, *self.overrides]

    def repeated(self) -> list[str]:
        """Overrides that a later one with another value cancels."""
        last = {_key(override): override for override in self.overrides}
        return [override for override in self.overrides if last[_key(override)] != override]


def _plain_key(override: str) -> str:
    return re.sub(r"[\s'\"]", "", override).lstrip("+~")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy="lora-bench COMMAND --help lists the options.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("-m", "--multirun", action="store_true")
    mode.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("-cd", "--config-dir")
    return parser


def refuse_code(hydra: Any) -> None:
    """Refuse a composed `hydra` node that would make Hydra import or call something that a YAML file names.

    Its launcher and sweeper are looked up among installed plugins, and nothing below them may name code.
    """
    if OmegaConf.is_interpolation(hydra, "callbacks") or hydra.callbacks:
        raise _names_code("hydra.callbacks")
    if hydra.job.env_set:
        raise UserError("sets environment variables", key="hydra.job.env_set", remedy="Set them in the shell.")
    for name in ("hydra_logging", "job_logging"):
        if OmegaConf.to_container(hydra, resolve=False)[name] != _NO_LOGGING:  # type: ignore[index, call-overload]
            raise _names_code(f"hydra.{name}")
    for name in ("launcher", "sweeper"):
        plugin = OmegaConf.to_container(hydra[name], resolve=True)
        assert isinstance(plugin, dict)
        known = str(plugin.get("_target_")).startswith(("hydra_plugins.", "hydra._internal.core_plugins."))
        if not known or any(_names_target(value) for value in plugin.values()):
            raise _names_code(f"hydra.{name}")


_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}


def _names_target(node: Any) -> bool:
    if isinstance(node, dict):
        return "_target_" in node or any(_names_target(value) for value in node.values())
    return isinstance(node, list) and any(_names_target(value) for value in node)


def _names_code(key: str) -> UserError:
    return UserError(
        f"{key!r} names code to run, which a config may not do",
        remedy="Choose among the options of the groups; methods are looked up by name.",
    )


def register_with_hydra() -> None:
    """Our sweepers and launcher, where Hydra looks for them once a process, and the resolver for a run folder's id."""
    try:
        plugins: Any = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        plugins = type(sys)("hydra_plugins")
        plugins.__path__ = []
        sys.modules["hydra_plugins"] = plugins
    folder = str(Path(__file__).parent / "plugin")
    if folder not in plugins.__path__:
        plugins.__path__.append(folder)
    OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def compose(conf: Path, config_name: str | None, overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The config, `hydra` node included, as Hydra composes it before a sweep is split; nothing of it is carried out."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    register_with_hydra()
    version.setbase("1.3")
    places = create_config_search_path(str(conf.absolute()))
    if config_dir is not None:
        folder = f"file://{os.path.abspath(config_dir)}"
        places.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    outer = GlobalHydra.instance().hydra  # of a command that is under way
    GlobalHydra.instance().clear()
    try:
        composed: DictConfig = Hydra.create_main_hydra2("lora-bench", places).compose_config(
            config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        return composed
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError):  # Hydra took for granted what is not so
        reason = f"Hydra makes no config of {' '.join(map(repr, overrides))}"
        raise UserError(reason, remedy=f"Each is key=value, or group=choice with one choice. {_LIST_GROUPS}") from None
    finally:
        GlobalHydra.instance().hydra = outer


@contextmanager
def translated(conf: Path, config_name: str, arguments: Arguments) -> Iterator[None]:
    """Raise a `UserError` for whatever Hydra finds wrong with the arguments, a YAML file or the folder to write to."""
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
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, conf, config_name, arguments) from None
    except OSError as error:  # jobs keep their own errors: this one is Hydra's, as it makes the folder
        if error.filename is None:
            raise
        key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
        reason = f"cannot be written: {error.strerror}"
        raise UserError(reason, key=key, value=error.filename, remedy="Give a folder where you may write.") from None
    except ValueError as error:
        if "null byte" in str(error):
            key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
            raise UserError("holds a NUL, which no path can", key=key, value="…") from None
        if "Config group override" not in str(error):
            raise
        wrong = (o for o in arguments.overrides if re.fullmatch(r"[+]?[\w/]*=(null|true|false|[\d.+-]*)(,.*)?", o))
        reason = f"{next(wrong, 'a group')!r} does not name one of the group's choices"
        raise UserError(reason, remedy=_LIST_GROUPS) from None


def _explain(error: Exception, conf: Path, config_name: str, arguments: Arguments) -> UserError:
    message = str(error)
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        key = found.group(1).split("@")[0]
        known = _known_keys(conf, config_name, arguments)
        remedy = nearest(key, known) or _LIST_KEYS
        return UserError("is not a known key", key=key, remedy=remedy if len(remedy) < 300 else _LIST_KEYS)
    found = re.search(r"Could not (?:find|load) '([^']+)'", message)
    if found:
        group, _, option = found.group(1).rpartition("/")
        return _no_such_choice(group, option, _options(conf, arguments.config_dir, group), arguments.config_dir)
    found = re.search(r"Ambiguous value for argument '([^']+)'", message)
    if found:
        key, _, value = found.group(1).partition("=")
        remedy = f"Add -m to sweep over the values, or quote a list: '{key}=[{value}]'."
        return UserError("has several values", key=key, value=value, remedy=remedy)
    found = re.search(r"Missing mandatory value: (\S+)|MissingMandatoryValue.*'(\S+)'", message)
    if found:
        key = found.group(1) or found.group(2)
        return UserError("is needed", key=key, remedy=f"Give {key}=VALUE.")
    found = re.search(r"Key '(\w+)' is not in struct|Could not delete '(\w+)'", message)
    if found:
        return UserError("is missing", key=found.group(1) or found.group(2), remedy="It cannot be left out.")
    if isinstance(error, OverrideParseException):
        reason = "cannot be read as key=value"
        remedy = "Put a value with special characters in quotes inside quotes: 'key=\"a,b [c]\"'."
        return UserError(f"{error.override!r} {reason}", remedy=remedy)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return UserError("; ".join(lines[:2]).rstrip("."))


_LIST_KEYS = "lora-bench train --cfg job lists the keys there are."
_LIST_GROUPS = "lora-bench train --help lists the groups and their choices."


def _no_such_choice(group: str, option: str, options: list[str], config_dir: str | None) -> UserError:
    misnamed = os.path.join(config_dir or "", group, f"{option}.yml")
    if config_dir and os.path.isfile(misnamed):
        return UserError("ends in .yml, which is not read", file=misnamed, remedy="Rename it so that it ends in .yaml.")
    hint = nearest(option, options) if options else _LIST_GROUPS
    listed = f"Choices: {', '.join(options)}." if hint.startswith("Did") else ""
    return UserError("is not one of its choices", key=group, value=option, remedy=f"{hint} {listed}")


def _options(conf: Path, config_dir: str | None, group: str) -> list[str]:
    folders = [str(conf), *([config_dir] if config_dir else [])]
    listed = [name for folder in folders if os.path.isdir(at := os.path.join(folder, group)) for name in os.listdir(at)]
    return sorted({name.removesuffix(".yaml") for name in listed if name.endswith(".yaml")})


def _known_keys(conf: Path, config_name: str, arguments: Arguments) -> set[str]:
    """All keys of the config that the same group choices compose, and the groups' names."""
    groups = {path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml"))} - {"hydra"}
    chosen = [a for a in arguments.overrides if a.split("=")[0] in groups and "," not in a]
    try:
        composed = compose(conf, config_name, chosen, arguments.config_dir)
    except Exception:  # one of the choices is wrong too
        composed = compose(conf, config_name, [])
    found = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(found, dict)
    del found["hydra"]
    return groups | set(_flatten(found))


def _flatten(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
