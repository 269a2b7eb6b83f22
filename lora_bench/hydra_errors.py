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
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.errors import Code, UserError, argument, nearest
from lora_bench.overrides import (
    CheckedFileSource,
    check_config,
    check_job,
    check_overrides,
    is_typed,
    is_typed_folder,
    names_code,
    parse_override,
    unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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
                raise UserError(
                    "a key is given in no config and on no command line",
                    key="llm",
                    remedy=remedy,
                    code=Code.FORBIDDEN,
                )
        check_overrides(parsed.overrides)
        if parsed.config_dir is not None and not os.path.isdir(parsed.config_dir):
            code = Code.NOT_A_FILE if os.path.exists(parsed.config_dir) else Code.NOT_FOUND
            raise UserError("is not a folder", key="--config-dir", value=parsed.config_dir, code=code)
        if (parsed.resolve or parsed.package) and not parsed.cfg:
            raise UserError("--resolve and --package say how --cfg prints", remedy="Add --cfg job.", code=Code.CONFLICT)
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
        raise UserError(message, remedy="lora-bench COMMAND --help lists the options.", code=Code.INVALID_SYNTAX)


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
    """Refuse a composed `hydra` node that would make Hydra import, call or write something that a YAML file names.

    Its launcher and sweeper are ours, nothing below them names code, and lines of shell for Slurm were typed.
    """
    if OmegaConf.is_interpolation(hydra, "callbacks") or hydra.callbacks:
        raise names_code("hydra.callbacks")
    if hydra.job.env_set or hydra.job.env_copy:
        raise UserError(
            "sets environment variables", key="hydra.job.env_set", remedy="Set them in the shell.", code=Code.FORBIDDEN
        )
    if hydra.output_subdir is not None:
        raise UserError("is not a known key of Hydra's here", key="hydra.output_subdir", code=Code.UNKNOWN_KEY)
    for name in ("hydra_logging", "job_logging"):
        if OmegaConf.to_container(hydra, resolve=False)[name] != _NO_LOGGING:  # type: ignore[index, call-overload]
            raise names_code(f"hydra.{name}")
    for name in ("launcher", "sweeper"):
        written, resolved = (OmegaConf.to_container(hydra[name], resolve=resolve) for resolve in (False, True))
        assert isinstance(written, dict)
        assert isinstance(resolved, dict)
        if written.pop("_target_", None) not in _PLUGINS[name]:
            raise names_code(f"hydra.{name}")
        del resolved["_target_"]
        if _names_target(written) or _names_target(resolved):
            raise names_code(f"hydra.{name}")
        lines = resolved.get("setup") or []
        untyped = next((line for line in lines if not is_typed(str(line))), None) if isinstance(lines, list) else lines
        if untyped is not None:
            reason = f"{untyped!r} is run in a shell, so it counts only if it is typed on the command line"
            remedy = "If it is meant, type hydra.launcher.setup=[…] too."
            raise UserError(reason, key="hydra.launcher.setup", remedy=remedy, code=Code.FORBIDDEN)


_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_PLUGINS = {
    "launcher": (
        "hydra_plugins.lora_bench_packed.PackedLauncher",
        "hydra_plugins.lora_bench_slurm.SlurmLauncher",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    ),
    "sweeper": (
        "hydra_plugins.lora_bench_grid.GridSweeper",
        "hydra_plugins.lora_bench_tuned.TunedSweeper",
        "hydra_plugins.lora_bench_transfer.TransferSweeper",
    ),
}
"""What Hydra may instantiate. Its own sweeper would launch jobs that `compose_job` has not checked."""


def _names_target(node: Any) -> bool:
    """Return whether a key in this node is one that Hydra's `instantiate` acts upon."""
    if isinstance(node, dict):
        return any(re.fullmatch("_[a-z]+_", str(key)) or _names_target(value) for key, value in node.items())
    return isinstance(node, list) and any(_names_target(value) for value in node)


def register_with_hydra() -> None:
    """Register what Hydra looks for: our sweepers and launchers, our reader of files, the resolver of a folder's id."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    try:
        plugins: Any = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        plugins = type(sys)("hydra_plugins")
        plugins.__path__ = []
        sys.modules["hydra_plugins"] = plugins
    folder = str(Path(__file__).parent / "plugin")
    if folder not in plugins.__path__:
        plugins.__path__.append(folder)
    Plugins.instance()  # registers Hydra's own reader first
    SourcesRegistry.instance().types["file"] = CheckedFileSource
    OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def compose(conf: Path, config_name: str | None, overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """Compose the config, `hydra` node included, before a sweep is split; nothing of it is carried out.

    Raises:
        UserError: the overrides or a YAML file would make Hydra run code, or a record asks for what only a user may.
    """
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    check_overrides(overrides)
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
        if config_name is not None:
            refuse_code(composed.hydra)
        if not is_typed_folder(config_dir):
            check_config(composed)
        return composed
    except RecursionError:  # choices or references that lead back to themselves
        raise UserError("the config refers to itself, or is nested too deeply", code=Code.INVALID_SYNTAX) from None
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError):  # Hydra took for granted what is not so
        reason = f"Hydra makes no config of {' '.join(map(repr, overrides))}"
        raise UserError(
            reason,
            remedy=f"Each is key=value, or group=choice with one choice. {_LIST_GROUPS}",
            code=Code.INVALID_SYNTAX,
        ) from None
    finally:
        GlobalHydra.instance().hydra = outer


def compose_job(loader: Any, sweep: DictConfig, overrides: Sequence[str], resume: Sequence[str] = ()) -> DictConfig:
    """Compose the config of a sweep's job.

    Args:
        loader: Hydra's, of the sweep.
        sweep: the config of the sweep.
        overrides: of this job, maybe from a record.
        resume: a further override, ours, if the job resumes its run.

    Raises:
        UserError: as in `compose`; or the job would be written elsewhere than below its sweep.
    """
    check_job(overrides)
    composed: DictConfig = loader.load_sweep_config(sweep, [*overrides, *resume])
    refuse_code(composed.hydra)
    places = [source.path for source in composed.hydra.runtime.config_sources if source.provider == "command-line"]
    if places and not is_typed_folder(places[0]):
        check_config(composed)
    return composed


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
    message = str(error)
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        key = found.group(1).split("@")[0]
        known = _known_keys(conf, config_name, arguments)
        remedy = nearest(key, known) or _LIST_KEYS
        return UserError(
            "is not a known key", key=key, remedy=remedy if len(remedy) < 300 else _LIST_KEYS, code=Code.UNKNOWN_KEY
        )
    found = re.search(r"Could not (?:find|load) '([^']+)'", message)
    if found:
        group, _, option = found.group(1).rpartition("/")
        return _no_such_choice(group, option, _options(conf, arguments.config_dir, group), arguments.config_dir)
    if "Ambiguous value for argument" in message or "requires --multirun" in message:
        several = next((text for text in arguments.overrides if parse_override(text).is_sweep_override()), "")
        key, _, value = several.partition("=")
        remedy = _for_several_values(key.lstrip("+"), value, conf, config_name, arguments)
        return UserError("has several values", key=key, value=value, remedy=remedy, code=Code.INVALID_VALUE)
    found = re.search(r"Missing mandatory value: (\S+)|MissingMandatoryValue.*'(\S+)'", message)
    if found:
        key = found.group(1) or found.group(2)
        return UserError("is needed", key=key, remedy=f"Give {key}=VALUE.", code=Code.MISSING)
    found = re.search(r"Key '(\w+)' is not in struct|Could not delete '(\w+)'", message)
    if found:
        return UserError(
            "is missing", key=found.group(1) or found.group(2), remedy="It cannot be left out.", code=Code.MISSING
        )
    if isinstance(error, OverrideParseException):
        return unreadable(str(error.override))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return UserError("; ".join(lines[:2]).rstrip("."), code=Code.INVALID_SYNTAX)


def _for_several_values(key: str, value: str, conf: Path, config_name: str, arguments: Arguments) -> str:
    """Return what to type instead of `key=a,b`: one text, a list, or a sweep, by what the key holds otherwise."""
    default = OmegaConf.select(_composed_as_chosen(conf, config_name, arguments), key, throw_on_missing=False)
    is_group = (conf / key).is_dir()
    advice = ["Add -m to sweep over the values."] if config_name == "config" else []
    if isinstance(default, ListConfig) or key in ("metric", "tracking"):
        advice.append(f"If it is a list, type {shlex.quote(f'{key}=[{value}]')}")
    elif not is_group and not isinstance(default, bool | int | float) and re.search("[^0-9.,eE+-]", value):
        advice.append(f"If it is one text, type {argument(key, value)}")
    return " ".join(advice)


_LIST_KEYS = "lora-bench train --cfg job lists the keys there are."
_LIST_GROUPS = "lora-bench train --help lists the groups and their choices."


def _no_such_choice(group: str, option: str, options: list[str], config_dir: str | None) -> UserError:
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


def _options(conf: Path, config_dir: str | None, group: str) -> list[str]:
    folders = [str(conf), *([config_dir] if config_dir else [])]
    listed = [name for folder in folders if os.path.isdir(at := os.path.join(folder, group)) for name in os.listdir(at)]
    return sorted({name.removesuffix(".yaml") for name in listed if name.endswith(".yaml")})


def _known_keys(conf: Path, config_name: str, arguments: Arguments) -> set[str]:
    """All keys of the config that the same group choices compose, and the groups' names."""
    composed = _composed_as_chosen(conf, config_name, arguments)
    found = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(found, dict)
    del found["hydra"]
    return _groups(conf) | set(_flatten(found))


def _groups(conf: Path) -> set[str]:
    return {path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml"))} - {"hydra"}


def _composed_as_chosen(conf: Path, config_name: str, arguments: Arguments) -> DictConfig:
    """Return the config of the same group choices without any other override."""
    chosen = [a for a in arguments.overrides if a.split("=")[0] in _groups(conf) and "," not in a]
    try:
        return compose(conf, config_name, chosen, arguments.config_dir)
    except Exception:  # one of the choices is wrong too
        return compose(conf, config_name, [])


def _flatten(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
