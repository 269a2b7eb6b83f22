"""Overrides and config files, checked before Hydra composes them, wherever they come from.

Hydra imports and calls what a config names: callbacks, logging factories, `pkg://` search paths, nested `_target_`. It
also reads environment variables into values (`${oc.env:NAME}`). Every override passes `check_overrides` first, whether
it was typed, stands in the record of a sweep, or belongs to one job. The check reads what Hydra's own parser makes of
an override, so the spelling does not matter. Of Hydra's settings only those in `SETTINGS` may be set.

A record is untrusted. What only a user may ask for (an environment variable, a package with weights, lines of shell for
Slurm) counts if it was typed on this command line; `typed_by` notes what was.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config.groups import conf_folder
from lora_bench.errors import Code, UserError, shell_argument

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hydra.plugins.config_source import ConfigResult
    from omegaconf import DictConfig

SETTINGS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir", "hydra.mode")
"""Settings of Hydra that may be given."""
OPEN_SETTINGS = ("hydra.launcher.", "hydra.sweeper.", "hydra.job.config.override_dirname.")
"""Nodes of Hydra whose settings may be given; `refuse_code` checks what they compose to."""
PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
JOB_FOLDER = "hydra.sweep.subdir"
"""The one setting of Hydra that a single job of a sweep may have."""

MAX_OVERRIDE_LENGTH = 50_000
MAX_FILE_BYTES = 500_000
MAX_NODES = 50_000
MAX_DEPTH = 40

_RUNS_CODE = ("callbacks", "job_logging", "hydra_logging", "searchpath", "_target_")
_SAFE_RESOLVERS = {"now", "run_id"}
_MARKER = re.compile(r"_[a-z]+_")


@dataclass(frozen=True)
class _Typed:
    """What the user typed on this command line."""

    keys: frozenset[str]
    strings: frozenset[str]
    """All texts in the values."""
    config_dir: str | None


_typed: _Typed | None = None
"""None: not a command line's process, so that overrides come from the caller and count as typed."""


@contextmanager
def typed_by(overrides: Sequence[str], config_dir: str | None) -> Iterator[None]:
    """Note what the user typed: within this context, anything else that reaches Hydra comes from a record."""
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
    """Return whether the user gave this value on the command line."""
    return _typed is None or text in _typed.strings


# -- overrides --


def parse_override(text: str) -> Override:
    """Return the override as Hydra's own parser reads it.

    Raises:
        UserError: it is none.
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
        return OverridesParser.create().parse_override(text)
    except HydraException:
        reason = "cannot be read as key=value"
    except RecursionError:
        reason = "is nested too deeply"
    except (ValueError, ArithmeticError) as error:  # Python reads no number of more than 4,300 digits
        reason = f"holds a value that cannot be read ({str(error).split(';')[0][:80]})"
    raise unreadable_override(text, reason) from None


def unreadable_override(text: str, reason: str = "cannot be read as key=value") -> UserError:
    """Return the refusal of an override that cannot be read, with what to type instead."""
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    return UserError(f"{shown!r} {reason}", remedy=_advice(text), code=Code.INVALID_SYNTAX)


def _advice(text: str) -> str:
    """Return what to type instead of an override that cannot be read."""
    key, equals, value = text.partition("=")
    if equals and len(text) <= 500 and re.fullmatch(r"[+~]{0,2}[A-Za-z_$][\w./@$-]*", key, re.ASCII):
        return f"If this is a text, type {shell_argument(key, value)}"
    return "Each override is key=value or group=choice."


def check_overrides(texts: Iterable[str]) -> list[Override]:
    """Return the parsed overrides, or refuse what would make Hydra run code, or what a record may not ask for."""
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
    """Refuse overrides of a sweep's job that lead out of its sweep, or change how Hydra itself behaves."""
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
    """Refuse settings of Hydra other than those that are listed above."""
    key, package = override.key_or_group, override.package or ""
    parts = re.split(r"[./]", key)
    if not key:
        raise UserError(
            f"{override.input_line!r} names no key",
            remedy="Each override is key=value or group=choice.",
            code=Code.INVALID_SYNTAX,
        )
    if any(part in _RUNS_CODE for part in parts[1:]) and parts[0] == "hydra":
        raise code_refusal(key)
    if re.split(r"[./]", package)[0] == "hydra":
        raise code_refusal(f"{key}@{package}")
    if parts[0] != "hydra":
        return
    if override.is_delete():
        raise UserError("cannot be deleted", key=key, code=Code.FORBIDDEN)
    if key == "hydra" and any(name in _RUNS_CODE for name in _names(override._value)):
        raise code_refusal("hydra")
    if "env_set" in (*parts, *_names(override._value)) or "env_copy" in parts:
        raise UserError("sets environment variables", key=key, remedy="Set them in the shell.", code=Code.FORBIDDEN)
    if key not in (*SETTINGS, *PLUGIN_GROUPS) and not key.startswith(OPEN_SETTINGS):
        known = ", ".join((*SETTINGS, *PLUGIN_GROUPS, *(f"{name}*" for name in OPEN_SETTINGS)))
        raise UserError("is not a known key of Hydra's here", key=key, remedy=f"Known: {known}.", code=Code.UNKNOWN_KEY)


def code_refusal(key: str) -> UserError:
    """Return the refusal of a key whose value Hydra would import or call."""
    remedy = "Choose among the options of the groups; methods are looked up by name."
    return UserError(f"{key!r} names code to run, which a config may not do", remedy=remedy, code=Code.FORBIDDEN)


def _is_deep(value: Any) -> bool:
    """Return whether lists and dictionaries in a parsed value are nested more deeply than a config is."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else _items(item))]
        depth += 1
    return bool(level)


def _names(value: Any) -> list[str]:
    """Return the keys of all dictionaries in a parsed value."""
    if isinstance(value, dict):
        return [*(_text(key) for key in value), *(name for item in value.values() for name in _names(item))]
    return [name for item in _items(value) for name in _names(item)]


def _strings(override: Override) -> list[str]:
    """Return all strings in an override's value, keys of dictionaries included."""

    def collect(value: Any) -> Iterator[str]:
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
    if isinstance(value, Glob):
        return [*value.include, *value.exclude]
    return value if isinstance(value, list) else list(getattr(value, "list", [])) if isinstance(value, Sweep) else []


def _text(value: Any) -> str:
    return value.text if isinstance(value, QuotedString) else str(value)


# -- what only the user may ask for --


@cache
def _resolvers(text: str) -> tuple[str, ...]:
    """Return the resolvers that OmegaConf would call to make this text's value, apart from harmless ones."""
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
    if _resolvers(text):
        reason = f"a record may not read {text!r} from this machine"
        raise UserError(
            reason, key=key, remedy=f"If that is meant, type it too: {shell_argument(key, text)}", code=Code.FORBIDDEN
        )


@cache
def shipped_packages() -> frozenset[str]:
    """Return the Python packages with weights that the models of lora-bench itself name."""
    models = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (conf_folder() / "model").glob("*.yaml")]
    return frozenset(model["package"] for model in models if model.get("package"))


def _check_package(name: str) -> None:
    if name not in shipped_packages():
        reason = f"a record may name no package but {', '.join(sorted(shipped_packages()))}"
        typed = shell_argument("model.package", name)
        remedy = f"If that one is meant, type it too: {typed} , or the folder: model.path=DIR."
        raise UserError(reason, key="model.package", value=name, remedy=remedy, code=Code.FORBIDDEN)


def check_config(config: DictConfig) -> None:
    """Refuse what a record, or a folder of choices that a record names, asks for and the user did not type.

    Args:
        config: composed or restored, nothing in it resolved yet.
    """
    keys, strings = (_typed.keys, _typed.strings) if _typed else (frozenset(), frozenset())
    for key, text in _leaves(OmegaConf.to_container(config, resolve=False)):
        if text in strings:
            continue
        _refuse_resolvers(text, key)
        if key == "model.package" and "model.path" not in keys:  # a folder that is named comes before a package
            _check_package(text)


def is_typed_folder(config_dir: str | None) -> bool:
    """Return whether the folder with further choices is the one that the user named on the command line."""
    return _typed is None or config_dir is None or os.path.realpath(config_dir) == _typed.config_dir


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
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
    """Hydra's reader of YAML files, which refuses what would take too long, or lies outside its folder."""

    def is_config(self, config_path: str) -> bool:
        self._refuse_outside(config_path)
        return bool(super().is_config(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        self._refuse_outside(config_path)
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        check_yaml(path)
        try:
            return super().load_config(config_path)
        except (ValueError, ArithmeticError, RecursionError, TypeError, OmegaConfBaseException) as error:
            raise UserError(
                f"cannot be read: {str(error).splitlines()[0][:200]}", file=path, code=Code.INVALID_SYNTAX
            ) from None

    @staticmethod
    def _refuse_outside(config_path: str) -> None:
        if os.path.isabs(config_path) or ".." in config_path.split("/"):
            raise UserError(f"the choice {config_path!r} leads out of the folder of its group", code=Code.FORBIDDEN)


def check_yaml(path: str) -> None:
    """Refuse a YAML file that is too large, nested too deeply, or refers to itself; aliases count as what they repeat.

    Raises:
        yaml.MarkedYAMLError: it is no valid YAML.
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
    """Return how deeply brackets and nested list items of a YAML text lie in one another, at least.

    The time that a YAML parser takes for these is quadratic in their depth: look before it is called.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    items = max((len(run) // 2 for run in re.findall(r"(?:[-?][ \t]++)++", text)), default=0)
    return max(deepest, items)


def _count_nodes(node: yaml.Node, counted: dict[int, int], above: set[int], path: str) -> int:
    """Return how many nodes there are below this one when aliases are written out."""
    if id(node) in counted:
        return counted[id(node)]
    if id(node) in above:
        raise UserError("refers to itself", file=path, row=node.start_mark.line + 1, code=Code.INVALID_SYNTAX)
    if len(above) > MAX_DEPTH:
        raise UserError("is nested too deeply", file=path, row=node.start_mark.line + 1, code=Code.TOO_LARGE)
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    count = 1
    for part in below:
        count += _count_nodes(part, counted, above | {id(node)}, path)
        if count > MAX_NODES:
            raise UserError(
                f"has more than {MAX_NODES:,} values", file=path, row=part.start_mark.line + 1, code=Code.TOO_LARGE
            )
    counted[id(node)] = count
    return count
