"""Composition of configurations by Hydra: arguments are parsed and checked, then the config is composed once.

Hydra by itself imports and calls code that a config names: callbacks, logging factories, nested `_target_`, a pickled
config, packages on its search path. None of it is needed here, so all of it is refused before Hydra runs anything.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from lora_bench.config.foreign_keys import foreign_key_note
from lora_bench.config.groups import choices
from lora_bench.config.keys import key_of, split_override, with_open_groups
from lora_bench.config.overrides import (
    CheckedFileSource,
    check_config,
    check_job,
    check_overrides,
    code_refusal,
    is_typed,
    is_typed_folder,
    parse_override,
)
from lora_bench.errors import Code, UserError, quoted
from lora_bench.extensions.entry_points import conf_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hydra.core.config_search_path import ConfigSearchPath


NEVER_EMPTY = ("resume", "adapter.init_from", "model.path", "model.tokenizer")
"""Keys whose empty text, as of a shell variable that is not set, would count as no value."""


class Arguments(argparse.Namespace):
    """Parsed arguments of a command that composes a config; options may come before, between and after overrides."""

    overrides: list[str]
    """As typed."""
    multirun: bool
    """`-m`: run a sweep."""
    cfg: str | None
    """`--cfg`: print the `job`, `hydra` or `all` of the config, and run nothing."""
    resolve: bool
    """`--resolve`: print interpolations as their values."""
    package: str | None
    """`--package`: print only this node."""
    config_dir: str | None
    """`--config-dir`: a folder with further choices of the groups."""
    record: Path | None = None
    """The record of a sweep that these arguments were read from."""

    @classmethod
    def read(cls, arguments: list[str], positional: Sequence[str] = ()) -> Arguments:
        """Parse and check the arguments of a command, its name left out; nothing is composed.

        Args:
            arguments: as typed.
            positional: keys that arguments without a key stand for, in this order: `RUN` becomes `run='RUN'`.

        Raises:
            UserError: an option is unknown, abbreviated or conflicts with another; `--config-dir` is not a folder; or
                an override holds an API key, is refused by `check_overrides`, or gives a key of `NEVER_EMPTY` the empty
                text.
        """
        parsed = _parser().parse_intermixed_args(arguments, cls())
        keys = iter(positional)
        for i, override in enumerate(parsed.overrides):
            if not re.match(r"~|\+*[\w./@]+=", override) and (key := next(keys, None)):
                parsed.overrides[i] = f"{key}={quoted(override)}"
        for override in parsed.overrides:
            if re.search(r"(^|[.{,])api_?key[=:]", _bare_key(override), re.IGNORECASE):  # its value is not repeated
                remedy = "Put it into the environment variable that llm.api_key_env names."
                raise UserError(
                    "an API key must not be given in a config or on the command line",
                    key="llm",
                    remedy=remedy,
                    code=Code.FORBIDDEN,
                )
        for typed in check_overrides(parsed.overrides):
            if typed.key_or_group in NEVER_EMPTY and typed.value() == "":
                remedy = f"Give it a value, or leave it out: {typed.key_or_group}=null is no value."
                raise UserError("is empty", key=typed.key_or_group, value="", remedy=remedy, code=Code.INVALID_VALUE)
        if parsed.config_dir is not None and not os.path.isdir(parsed.config_dir):
            code = Code.NOT_A_FILE if os.path.exists(parsed.config_dir) else Code.NOT_FOUND
            raise UserError("is not a folder", key="--config-dir", value=parsed.config_dir, code=code)
        if (parsed.resolve or parsed.package) and not parsed.cfg:
            raise UserError("--resolve and --package need --cfg", remedy="Add --cfg job.", code=Code.CONFLICT)
        return parsed

    def resume(self) -> str | None:
        """Return the last typed value of `resume`.

        None if there is none, or if it is neither a text without interpolations nor a number, as the id of a run may
        be: null, several values. The composed config has it then.
        """
        typed = [text for text in self.overrides if key_of(text) == "resume"]
        value = parse_override(typed[-1]).value() if typed else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return split_override(typed[-1])[1]
        return value if isinstance(value, str) and "${" not in value else None

    def repeated(self) -> list[str]:
        """Return the overrides that are cancelled by a later one of the same key with another value, in their order."""
        last = {key_of(override): override for override in self.overrides}
        return [override for override in self.overrides if last[key_of(override)] != override]


def _bare_key(override: str) -> str:
    """Return an override without white space, quotation marks, `+` and `~`."""
    return re.sub(r"[\s'\"]", "", override).lstrip("+~")


class _Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        remedy = "lora-bench COMMAND --help lists the options."
        if unknown := re.match(r"unrecognized arguments: --([\w.-]+)", message):
            note = foreign_key_note(unknown[1])
            remedy = f"{note} Settings are typed as key=value, without dashes." if note else remedy
        raise UserError(message, remedy=remedy, code=Code.INVALID_SYNTAX)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `Arguments`: no abbreviations, no `--help`, and either `-m` or `-c`."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("-m", "--multirun", action="store_true", help="train every combination of the values: a sweep")
    mode.add_argument(
        "-c", "--cfg", choices=["job", "hydra", "all"], help="print the composed config and stop: --cfg job"
    )
    parser.add_argument("--resolve", action="store_true", help="with --cfg: print interpolations as their values")
    parser.add_argument("-p", "--package", help="with --cfg: print only this part: --package adapter")
    parser.add_argument("-cd", "--config-dir", help="a folder with further choices of the groups")
    return parser


def refuse_code(hydra: Any) -> None:
    """Refuse a composed `hydra` node that would make Hydra import, call or write something that a YAML file names.

    Raises:
        UserError: a callback or logging is configured, an environment variable is set, Hydra would write files of its
            own, the launcher or sweeper is not one of `_PLUGINS` or has a key that names code, or a line of shell for
            Slurm was not typed.
    """
    if OmegaConf.is_interpolation(hydra, "callbacks") or hydra.callbacks:
        raise code_refusal("hydra.callbacks")
    if hydra.job.env_set or hydra.job.env_copy:
        raise UserError(
            "sets environment variables", key="hydra.job.env_set", remedy="Set them in the shell.", code=Code.FORBIDDEN
        )
    if hydra.output_subdir is not None:
        raise UserError("must be null: Hydra writes no files here", key="hydra.output_subdir", code=Code.UNKNOWN_KEY)
    for name in ("hydra_logging", "job_logging"):
        if OmegaConf.to_container(hydra, resolve=False)[name] != _NO_LOGGING:  # type: ignore[index, call-overload]
            raise code_refusal(f"hydra.{name}")
    for name in ("launcher", "sweeper"):
        written, resolved = (OmegaConf.to_container(hydra[name], resolve=resolve) for resolve in (False, True))
        assert isinstance(written, dict)
        assert isinstance(resolved, dict)
        if written.pop("_target_", None) not in _PLUGINS[name]:
            raise code_refusal(f"hydra.{name}")
        del resolved["_target_"]
        if _names_target(written) or _names_target(resolved):
            raise code_refusal(f"hydra.{name}")
        lines = resolved.get("setup") or []
        untyped = next((line for line in lines if not is_typed(str(line))), None) if isinstance(lines, list) else lines
        if untyped is not None:
            reason = f"{untyped!r} is run in a shell, so it must be typed on the command line"
            remedy = "If you trust it, type hydra.launcher.setup=[…] too."
            raise UserError(reason, key="hydra.launcher.setup", remedy=remedy, code=Code.FORBIDDEN)


_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
"""The only logging configuration that is allowed: none."""


_PLUGINS = {
    "launcher": (
        "hydra_plugins.lora_bench_pack_launcher.PackedLauncher",
        "hydra_plugins.lora_bench_slurm_launcher.SlurmLauncher",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    ),
    "sweeper": (
        "hydra_plugins.lora_bench_grid_sweeper.GridSweeper",
        "hydra_plugins.lora_bench_tuning_sweeper.TunedSweeper",
        "hydra_plugins.lora_bench_transfer_sweeper.TransferSweeper",
        "hydra_plugins.lora_bench_search_sweeper.SearchSweeper",
    ),
}
"""Classes that Hydra may instantiate. Hydra's own sweeper is not one: its jobs would not pass `compose_job`."""


def _names_target(node: Any) -> bool:
    """Return whether nested dicts and lists have a key of the form `_name_`, which has a meaning for `instantiate`."""
    if isinstance(node, dict):
        return any(re.fullmatch("_[a-z]+_", str(key)) or _names_target(value) for key, value in node.items())
    return isinstance(node, list) and any(_names_target(value) for value in node)


def register_with_hydra() -> None:
    """Register our sweepers and launchers, our reader of YAML files and the resolver `run_id` with Hydra.

    The registration holds for the process and may be repeated. `${run_id:}` gives six random hexadecimal digits, the
    same ones throughout a config.
    """
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    try:
        plugins: Any = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        plugins = type(sys)("hydra_plugins")
        plugins.__path__ = []
        sys.modules["hydra_plugins"] = plugins
    folder = str(Path(__file__).parent.parent / "hydra_plugins")
    if folder not in plugins.__path__:
        plugins.__path__.append(folder)
    Plugins.instance()  # registers Hydra's own reader first
    SourcesRegistry.instance().types["file"] = CheckedFileSource
    OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


class JobLoader(ConfigLoaderImpl):  # type: ignore[misc]
    """Hydra's loader of configs, which composes the config of a sweep's job once.

    The sweeper composes and checks all jobs before the first one starts (`keep`); the launcher then gets the same
    configs (`load_sweep_config`). A kept config takes 0.15 MB until the launcher takes it.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._checked: dict[tuple[str, ...], DictConfig] = {}
        """Checked configs by the overrides of their jobs."""

    def keep(self, overrides: Sequence[str], config: DictConfig) -> None:
        """Keep a copy of a job's config until it is loaded again."""
        self._checked[tuple(overrides)] = copy.deepcopy(config)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """Return the config of a job: the kept one, which is then no longer kept, else one composed without checks.

        `resume=DIR` among the overrides comes from the sweeper. It is set in the config, but is no override of the job.
        """
        overrides = [text for text in sweep_overrides if key_of(text) != "resume"]
        config = self._checked.pop(tuple(overrides), None)
        if config is None:
            config = super().load_sweep_config(master_config, list(map(with_open_groups, overrides)))
        for text in sweep_overrides:
            if key_of(text) == "resume":
                config.resume = parse_override(text).value()
        return config


class ComposedHydra(Hydra):  # type: ignore[misc]
    """Hydra with one config, composed and checked: it runs, sweeps over or prints this one and composes no other."""

    config: DictConfig
    """With its `hydra` node."""

    def compose_config(self, *_: Any, **__: Any) -> DictConfig:
        """Return the config; Hydra's own methods call this."""
        return self.config

    def execute(self, arguments: Arguments, task: Callable[[DictConfig], None]) -> None:
        """Print the config (`--cfg`), or call the task with it, or have it called with that of each job of a sweep.

        It is a sweep with `-m` or `hydra.mode=MULTIRUN`.

        Raises:
            HydraException: a single run is given several values for a key, or a setting of Hydra's is swept over.
        """
        node, overrides = self.config.hydra, [parse_override(text) for text in arguments.overrides]
        is_sweep = arguments.cfg is None and (arguments.multirun or node.mode == RunMode.MULTIRUN)
        mode = RunMode.MULTIRUN if is_sweep else RunMode.RUN
        self.config_loader.validate_sweep_overrides_legal(overrides, mode, from_shell=True)
        name = node.job.config_name
        if arguments.cfg is not None:
            self.show_cfg(name, arguments.overrides, arguments.cfg, arguments.package, arguments.resolve)
            return
        if is_sweep and node.mode != mode:
            node.overrides.hydra.append(f"hydra.mode={mode.name}")  # for its jobs, and for its record
        node.mode = mode
        (self.multirun if is_sweep else self.run)(name, task, arguments.overrides)


def compose(conf: Path, config_name: str | None, overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """Return the composed config, `hydra` node included, of a run, or of a sweep before it is split into jobs.

    Interpolations are not resolved, and values are not checked.

    Args:
        conf: the folder with the groups.
        config_name: the config at its top, as `config`; None: only the `hydra` node and the overrides.
        overrides: checked here.
        config_dir: a folder with further choices of the groups.

    Raises:
        UserError: an override or a YAML file is refused (`check_overrides`, `check_yaml`, `refuse_code`), an untyped
            value is one that only a user may give, or the config refers to itself.
        yaml.MarkedYAMLError: a file is not valid YAML.
        HydraException: Hydra cannot compose them, for example because a key or choice is unknown.
    """
    return compose_hydra(conf, config_name, overrides, config_dir).config


def compose_hydra(
    conf: Path, config_name: str | None, overrides: list[str], config_dir: str | None = None
) -> ComposedHydra:
    """Compose a config as `compose` does, with the same errors, and return it ready to be executed."""
    check_overrides(overrides)
    register_with_hydra()
    version.setbase("1.3")
    search_path = create_config_search_path(str(conf.absolute()))
    if config_dir is not None:
        folder = f"file://{os.path.abspath(config_dir)}"
        search_path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    for installed in conf_folders():
        search_path.prepend("installed", f"file://{installed.path}", anchor=SearchPathQuery(provider="schema"))
    hydra = ComposedHydra("lora-bench", JobLoader(search_path))
    try:
        hydra.config = hydra.config_loader.load_configuration(
            config_name,
            list(map(with_open_groups, overrides)),
            run_mode=RunMode.MULTIRUN,
            validate_sweep_overrides=False,
        )
        if config_name is not None:
            refuse_code(hydra.config.hydra)
            _refuse_ambiguous_choices(hydra.config.hydra)
        if not is_typed_folder(config_dir):
            check_config(hydra.config)
        return hydra
    except RecursionError:  # choices or references that lead back to themselves
        raise UserError("the config refers to itself, or is nested too deeply", code=Code.INVALID_SYNTAX) from None
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError):  # an assumption of Hydra's does not hold
        reason = f"Hydra cannot compose a config of {' '.join(map(repr, overrides))}"
        raise UserError(
            reason,
            remedy=f"Each is key=value, or group=choice with one choice. {_LIST_GROUPS}",
            code=Code.INVALID_SYNTAX,
        ) from None


def compose_job(
    loader: JobLoader, sweep: DictConfig, overrides: Sequence[str], resume: Sequence[str] = (), *, keep: bool = False
) -> DictConfig:
    """Return the config of a sweep's job, composed or kept, after the checks of `compose`, without a node `search`.

    Args:
        loader: that of the sweep.
        sweep: the config of the sweep.
        overrides: of this job, maybe from a record.
        resume: a further override `resume=DIR`, if the job resumes its run.
        keep: keep a copy for the launcher, which calls this function again.

    Raises:
        UserError: as in `compose`; or an override is not allowed for a single job (`check_job`).
        HydraException: as in `compose`.
    """
    check_job(overrides)
    composed = loader.load_sweep_config(sweep, [*overrides, *resume])
    refuse_code(composed.hydra)
    _refuse_ambiguous_choices(composed.hydra)
    folders = [source.path for source in composed.hydra.runtime.config_sources if source.provider == "command-line"]
    if folders and not is_typed_folder(folders[0]):
        check_config(composed)
    with open_dict(composed):
        composed.pop("search", None)  # settings of the whole sweep
    if keep:
        loader.keep(overrides, composed)
    return composed


def _refuse_ambiguous_choices(hydra: Any) -> None:
    """Refuse a choice that an installed distribution adds and that lora-bench or another distribution has, too.

    Args:
        hydra: the composed `hydra` node, with the choices of all groups.

    Raises:
        UserError: naming the distribution.
    """
    folders = conf_folders()
    if not folders:
        return
    for group, chosen in hydra.runtime.choices.items():
        for choice in chosen if isinstance(chosen, ListConfig | list) else [chosen]:
            having = [folder.distribution for folder in folders if folder.has(group, str(choice))]
            is_own = str(choice) in choices(group)
            if not having or (len(having) == 1 and not is_own):
                continue
            owner = "is part of lora-bench" if is_own else f"is added by {having.pop(0)}"
            raise UserError(
                f"{owner}, and {having[0]} adds another choice of this name",
                key=group,
                value=choice,
                remedy="Rename the file in the folder of choices of that distribution, or uninstall it.",
                code=Code.EXTENSION,
            )


_LIST_GROUPS = "lora-bench train --help lists the groups and their choices."
