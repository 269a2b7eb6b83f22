"""Checks of overrides and of YAML files, before Hydra composes them.

Hydra imports and calls what a config names: callbacks, logging factories, `pkg://` search paths, nested `_target_`. It
also reads environment variables into values (`${oc.env:NAME}`). Every override passes `check_overrides` first, whether
it was typed, comes from the record of a sweep, or belongs to one job. The check works on the result of Hydra's own
parser, so the spelling does not matter. Of Hydra's settings, only those in `SETTINGS` and `OPEN_SETTINGS` may be set.

A record is untrusted. Some values are allowed only if the user typed them on this command line: an environment
variable, a package with weights, lines of shell for Slurm. `typed_by` holds the typed values.
"""

from __future__ import annotations

import copy
import io
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config.groups import conf_folder
from lora_bench.config.keys import RENAMED, renamed_key
from lora_bench.errors import Code, UserError, shell_argument

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hydra.plugins.config_source import ConfigResult
    from omegaconf import DictConfig

SETTINGS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir", "hydra.mode")
"""Settings of Hydra that may be overridden."""
OPEN_SETTINGS = ("hydra.launcher.", "hydra.sweeper.", "hydra.job.config.override_dirname.")
"""Prefixes of settings of Hydra that may be overridden; `refuse_code` checks what they compose to."""
PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
"""Groups of Hydra whose choice may be overridden."""
JOB_FOLDER = "hydra.sweep.subdir"
"""The only setting of Hydra that a single job of a sweep may have."""

MAX_OVERRIDE_LENGTH = 50_000
MAX_FILE_BYTES = 500_000
MAX_NODES = 50_000
MAX_DEPTH = 40
"""Limits of an override in characters, of a YAML file in bytes and values, and of nesting."""

_RUNS_CODE = ("callbacks", "job_logging", "hydra_logging", "searchpath", "_target_")
_SAFE_RESOLVERS = {"now", "run_id"}
_MARKER = re.compile(r"_[a-z]+_")


@dataclass(frozen=True)
class _Typed:
    """The command line of the user."""

    keys: frozenset[str]
    """Keys and groups of the overrides."""
    strings: frozenset[str]
    """All texts in their values."""
    config_dir: str | None
    """The folder of `--config-dir`, without links."""


_typed: _Typed | None = None
"""None outside a command: overrides come from a caller in Python and count as typed."""


@contextmanager
def typed_by(overrides: Sequence[str], config_dir: str | None) -> Iterator[None]:
    """Take these overrides as typed by the user; within the context, all others that reach Hydra are from a record.

    Outside of any context all of them count as typed. A nested context replaces the outer one until it ends.

    Raises:
        UserError: an override cannot be parsed.
    """
    global _typed
    before = _typed
    parsed = [parse_override(text) for text in overrides]
    keys = frozenset(override.key_or_group for override in parsed)
    strings = frozenset(text for override in parsed for text in _strings(override))
    _typed = _Typed(keys, strings, config_dir and os.path.realpath(config_dir))
    try:
        yield
    finally:
        _typed = before


def is_typed(text: str) -> bool:
    """Return whether the user gave this value on the command line; True for every value outside of `typed_by`."""
    return _typed is None or text in _typed.strings


# -- overrides --


@cache
def _parser() -> OverridesParser:
    """Return Hydra's parser; it keeps no state, and registers its functions anew when it is made."""
    return OverridesParser.create()


def parse_override(text: str) -> Override:
    """Parse an override with Hydra's own parser.

    Raises:
        UserError: it cannot be parsed, or is too long.
    """
    if len(text) > MAX_OVERRIDE_LENGTH:
        reason = f"has {len(text):,} characters, more than the {MAX_OVERRIDE_LENGTH:,} that an override may have"
        raise UserError(
            f"{text[:40]!r}… {reason}",
            remedy="Put the values into a YAML file: --config-dir=DIR.",
            code=Code.TOO_LARGE,
        )
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # JSON can write half a character
        raise UserError(f"{text[:200]!r} holds half of a surrogate pair", code=Code.INVALID_SYNTAX) from None
    try:
        return _parser().parse_override(text)
    except HydraException:
        reason = "cannot be read as key=value"
    except RecursionError:
        reason = "is nested too deeply"
    except (ValueError, ArithmeticError) as error:  # Python reads no number of more than 4,300 digits
        reason = f"holds a value that cannot be read ({str(error).split(';')[0][:80]})"
    raise unreadable_override(text, reason) from None


def unreadable_override(text: str, reason: str = "cannot be read as key=value") -> UserError:
    """Return the error for an override that cannot be parsed, with advice on what to type instead."""
    start = text if len(text) <= 200 else f"{text[:200]}…"
    return UserError(f"{start!r} {reason}", remedy=_advice(text), code=Code.INVALID_SYNTAX)


def _advice(text: str) -> str:
    """Return what to type instead of an override that cannot be parsed.

    It is the override with its value in quotation marks if there is a `=` after a valid key, else the general form.
    """
    key, equals, value = text.partition("=")
    if equals and len(text) <= 500 and re.fullmatch(r"[+~]{0,2}[A-Za-z_$][\w./@$-]*", key, re.ASCII):
        return f"If this is a text, type {shell_argument(key, value)}"
    return "Each override is key=value or group=choice."


def check_overrides(texts: Iterable[str]) -> list[Override]:
    """Parse overrides, refuse the forbidden ones, and return the parsed ones in their order.

    Raises:
        UserError: one cannot be parsed, is nested too deeply, names no key or a renamed one, would make Hydra run code,
            is a setting of Hydra that may not be overridden, or is allowed only if typed and comes from a record.
    """
    overrides = [parse_override(text) for text in texts]
    for override in overrides:
        _check_key(override)
        if _is_deep(override._value):
            raise unreadable_override(str(override.input_line), "is nested too deeply")
        names = _names(override._value)
        if any(_MARKER.fullmatch(name) for name in (*names, *re.split(r"[./]", override.key_or_group))):
            raise code_refusal(override.key_or_group)
        key = override.key_or_group
        is_package = key == "model.package" or (key == "model" and "package" in names)
        for text in _strings(override):
            if is_package and text != "package" and not is_typed(text):
                _check_package(text)
            if not is_typed(text):
                _refuse_resolvers(text, key)
    return overrides


def check_job(texts: Iterable[str]) -> None:
    """Refuse overrides of a sweep's job that `check_overrides` refuses, and `resume` and settings of Hydra.

    The only setting of Hydra that a job may have is `JOB_FOLDER`.

    Raises:
        UserError: for the first that is refused.
    """
    for override in check_overrides(texts):
        key = override.key_or_group
        if key == "resume" or (key.split(".")[0].split("/")[0] == "hydra" and key != JOB_FOLDER):
            raise UserError(
                "cannot be set for a single job of a sweep",
                key=key,
                remedy="Set it for the whole sweep.",
                code=Code.FORBIDDEN,
            )


def _check_key(override: Override) -> None:
    """Refuse an override without a key, of a renamed key, or of a setting of Hydra that may not be overridden.

    Allowed are `SETTINGS`, `OPEN_SETTINGS` and `PLUGIN_GROUPS`, unless they are deleted, name code or set environment
    variables. A package in `hydra` (`key@hydra.x`) is refused too.

    Raises:
        UserError: with the reason.
    """
    key, package = override.key_or_group, override.package or ""
    names = re.split(r"[./]", key)
    if not key:
        raise UserError(
            f"{override.input_line!r} names no key",
            remedy="Each override is key=value or group=choice.",
            code=Code.INVALID_SYNTAX,
        )
    if key in RENAMED:
        raise renamed_key(key)
    if names[0] == "hydra" and any(name in _RUNS_CODE for name in names[1:]):
        raise code_refusal(key)
    if re.split(r"[./]", package)[0] == "hydra":
        raise code_refusal(f"{key}@{package}")
    if names[0] != "hydra":
        return
    if override.is_delete():
        raise UserError("cannot be deleted", key=key, code=Code.FORBIDDEN)
    if key == "hydra" and any(name in _RUNS_CODE for name in _names(override._value)):
        raise code_refusal("hydra")
    if "env_set" in (*names, *_names(override._value)) or "env_copy" in names:
        raise UserError("sets environment variables", key=key, remedy="Set them in the shell.", code=Code.FORBIDDEN)
    if key not in (*SETTINGS, *PLUGIN_GROUPS) and not key.startswith(OPEN_SETTINGS):
        allowed = ", ".join((*SETTINGS, *PLUGIN_GROUPS, *(f"{name}*" for name in OPEN_SETTINGS)))
        raise UserError(
            "is not a setting of Hydra that can be overridden here",
            key=key,
            remedy=f"Allowed: {allowed}.",
            code=Code.UNKNOWN_KEY,
        )


def code_refusal(key: str) -> UserError:
    """Return the error for a key whose value Hydra would import or call."""
    remedy = "Choose among the options of the groups; methods are looked up by name."
    return UserError(f"{key!r} names code to run, which a config may not do", remedy=remedy, code=Code.FORBIDDEN)


def _is_deep(value: Any) -> bool:
    """Return whether a parsed value is nested in more than `MAX_DEPTH` lists and dictionaries."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [below for item in level for below in (item.values() if isinstance(item, dict) else _items(item))]
        depth += 1
    return bool(level)


def _names(value: Any) -> list[str]:
    """Return the keys, as text, of all dictionaries at any depth of a parsed value."""
    if isinstance(value, dict):
        return [*(_text(key) for key in value), *(name for item in value.values() for name in _names(item))]
    return [name for item in _items(value) for name in _names(item)]


def _strings(override: Override) -> list[str]:
    """Return all strings in an override's value, without quotation marks, keys of dictionaries included."""

    def collect(value: Any) -> Iterator[str]:
        """Yield the strings of a parsed value, keys of dictionaries included."""
        if isinstance(value, str | QuotedString):
            yield _text(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from collect(key)
                yield from collect(item)
        else:
            for item in _items(value):
                yield from collect(item)

    return list(collect(override._value))


def _items(value: Any) -> list[Any]:
    """Return the elements of a parsed list, sweep or glob; none for any other value."""
    if isinstance(value, Glob):
        return [*value.include, *value.exclude]
    return value if isinstance(value, list) else list(getattr(value, "list", [])) if isinstance(value, Sweep) else []


def _text(value: Any) -> str:
    """Return a parsed text without its quotation marks."""
    return value.text if isinstance(value, QuotedString) else str(value)


# -- values that count only if the user typed them --


@cache
def _resolvers(text: str) -> tuple[str, ...]:
    """Return the names of the resolvers that OmegaConf would call in this text, except the harmless ones.

    A reference to another key (`${seed}`) calls none. A text with `${` that cannot be parsed gives `("unreadable",)`.
    """
    if "${" not in text:
        return ()
    try:
        tree = grammar_parser.parse(text)
    except (OmegaConfBaseException, RecursionError):
        return ("unreadable",)
    resolvers: list[str] = []
    nodes: list[Any] = [tree]
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "InterpolationResolverContext":
            resolvers.append(str(node.resolverName().getText()))
        nodes += list(getattr(node, "children", None) or [])
    return tuple(name for name in resolvers if name not in _SAFE_RESOLVERS)


def _refuse_resolvers(text: str, key: str) -> None:
    """Refuse a value that calls a resolver, such as `oc.env`; the caller has checked that it is untyped.

    Raises:
        UserError: the remedy is to type the value.
    """
    if _resolvers(text):
        reason = f"a record must not read {text!r} from this machine"
        raise UserError(
            reason, key=key, remedy=f"If you trust it, type it too: {shell_argument(key, text)}", code=Code.FORBIDDEN
        )


@cache
def shipped_packages() -> frozenset[str]:
    """Return the Python packages with weights that `conf/model/*.yaml` name, read once per process."""
    models = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (conf_folder() / "model").glob("*.yaml")]
    return frozenset(model["package"] for model in models if model.get("package"))


def _check_package(name: str) -> None:
    """Refuse a `model.package` that no model of lora-bench names; the caller has checked that it is untyped.

    Raises:
        UserError: the remedy is to type the package, or to give `model.path`.
    """
    if name not in shipped_packages():
        reason = f"a record must name no package except {', '.join(sorted(shipped_packages()))}"
        typed = shell_argument("model.package", name)
        remedy = f"If you trust it, type it too: {typed} , or give the folder: model.path=DIR."
        raise UserError(reason, key="model.package", value=name, remedy=remedy, code=Code.FORBIDDEN)


def check_config(config: DictConfig) -> None:
    """Refuse values that only a user may give, where a record or a folder of choices named by a record gives them.

    A text that is also in a typed override passes, and so does a package beside a typed `model.path`. Outside of
    `typed_by` nothing counts as typed here.

    Args:
        config: composed or restored, with nothing in it resolved yet.

    Raises:
        UserError: a value calls a resolver, or names a package with weights, and was not typed.
    """
    keys, strings = (_typed.keys, _typed.strings) if _typed else (frozenset(), frozenset())
    for key, text in _leaves(OmegaConf.to_container(config, resolve=False)):
        if text in strings:
            continue
        _refuse_resolvers(text, key)
        if key == "model.package" and "model.path" not in keys:  # model.path takes precedence
            _check_package(text)


def is_typed_folder(config_dir: str | None) -> bool:
    """Return whether `--config-dir` was typed by the user; None, no such folder, counts as typed."""
    return _typed is None or config_dir is None or os.path.realpath(config_dir) == _typed.config_dir


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every string value in a config; a string in a list has the key of the list."""
    if isinstance(node, dict):
        for name, item in node.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for item in node:
            yield from _leaves(item, key)
    elif isinstance(node, str):
        yield key, node


# -- files --


class CheckedFileSource(FileConfigSource):  # type: ignore[misc]
    """Hydra's reader of YAML files, which refuses files outside its folder and files that are too large to parse."""

    def is_config(self, config_path: str) -> bool:
        """Return whether the file of a choice exists; a `UserError` if it leads out of its folder."""
        self._refuse_outside(config_path)
        return bool(super().is_config(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a YAML file after `check_yaml`.

        Raises:
            UserError: it leads out of its folder, is refused by `check_yaml`, or cannot be read as a config.
            yaml.MarkedYAMLError: it is not valid YAML.
        """
        self._refuse_outside(config_path)
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        return copy.deepcopy(_load_config(self.provider, self.path, config_path, path, _file_version(path)))

    @staticmethod
    def _refuse_outside(config_path: str) -> None:
        """Raise a `UserError` for a path that is absolute or contains `..`."""
        if os.path.isabs(config_path) or ".." in config_path.split("/"):
            raise UserError(f"the choice {config_path!r} leads out of the folder of its group", code=Code.FORBIDDEN)


def _file_version(path: str) -> tuple[int, int, int] | None:
    """Return inode, time and size of a file, which change with its content; None if it cannot be reached."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=1024)  # a sweep composes each job; parsing would be a third of the time
def _load_config(
    provider: str, folder: str, config_path: str, path: str, version: tuple[int, int, int] | None
) -> ConfigResult:
    """Check the file `path`, whose version is given, and load it as Hydra loads `config_path` from a folder."""
    check_yaml(path)
    try:
        return FileConfigSource(provider, folder).load_config(config_path)
    except (ValueError, ArithmeticError, RecursionError, TypeError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"cannot be read: {reason}", file=path, code=Code.INVALID_SYNTAX) from None


def check_yaml(path: str) -> None:
    """Refuse a YAML file that is too large, nested too deeply or refers to itself; an alias counts as a copy.

    Raises:
        UserError: it is such a file, or cannot be read.
        yaml.MarkedYAMLError: it is not valid YAML.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            raise UserError(f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}", file=path, code=Code.TOO_LARGE)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if yaml_nesting(text) > MAX_DEPTH:
            raise UserError("is nested too deeply", file=path, code=Code.TOO_LARGE)
        stream = io.StringIO(text)
        stream.name = path  # for the parser's messages
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
        if root is not None:
            _count_nodes(root, {}, set(), path)
    except yaml.MarkedYAMLError:
        raise
    except RecursionError:
        raise UserError("is nested too deeply", file=path, code=Code.TOO_LARGE) from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # bytes that are no text, control characters
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        code = Code.UNREADABLE if isinstance(error, OSError) else Code.INVALID_SYNTAX
        raise UserError(f"cannot be read: {reason}", file=path, code=code) from None


def yaml_nesting(text: str) -> int:
    """Estimate the nesting depth of a YAML text from its brackets, and from list items on one line (`- - -`).

    Brackets in texts and comments count, indentation does not. The time of a YAML parser is quadratic in this depth, so
    it is checked before the parser is called.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    items = max((len(run) // 2 for run in re.findall(r"(?:[-?][ \t]++)++", text)), default=0)
    return max(deepest, items)


def _count_nodes(node: yaml.Node, counted: dict[int, int], above: set[int], path: str) -> int:
    """Return the number of nodes of a YAML tree, an alias counted as a copy.

    Args:
        node: the root of the tree.
        counted: counts by the id of the node, filled here.
        above: ids of the nodes above this one.
        path: the file, for messages.

    Raises:
        UserError: the tree refers to itself, is deeper than `MAX_DEPTH`, or has more than `MAX_NODES` nodes.
    """
    if id(node) in counted:
        return counted[id(node)]
    if id(node) in above:
        raise UserError("refers to itself", file=path, row=node.start_mark.line + 1, code=Code.INVALID_SYNTAX)
    if len(above) > MAX_DEPTH:
        raise UserError("is nested too deeply", file=path, row=node.start_mark.line + 1, code=Code.TOO_LARGE)
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    count = 1
    for child in below:
        count += _count_nodes(child, counted, above | {id(node)}, path)
        if count > MAX_NODES:
            raise UserError(
                f"has more than {MAX_NODES:,} values", file=path, row=child.start_mark.line + 1, code=Code.TOO_LARGE
            )
    counted[id(node)] = count
    return count
