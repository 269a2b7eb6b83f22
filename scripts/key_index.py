"""The index of all keys that help and shell completion read: `lora_bench/config/keys.json`.

`scripts/config_reference.py` writes and checks it together with the pages. Meanings and types come from the
dataclasses, defaults from `conf/`, options from the commands' parsers, and values from `require_one_of(…)` and from the
constants whose docstrings say "Values of `KEY`".
"""

from __future__ import annotations

import ast
import importlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import config_reference as reference
import yaml

from lora_bench.config.groups import COMMANDS, GROUPS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

INDEX = reference.PACKAGE / "config" / "keys.json"
CONFIG_PARSER = "lora_bench.config.compose"
"""The module whose `_parser` reads the options of every command that composes a config."""
OTHER_VALUES = {
    ("export", "format"): ("peft", "merged", "onnx", "torch"),
    ("eval", "device"): ("auto", "cpu", "cuda"),
    ("predict", "device"): ("auto", "cpu", "cuda"),
    ("predict", "threshold"): ("selection",),
    ("export", "threshold"): ("selection",),
}
"""Values of keys without a dataclass."""
Entry = dict[str, Any]


def build_index() -> str:
    """Return the content of the index: per command its options, the groups of its config and its keys."""
    lines = ["{"]
    commands = list(COMMANDS)
    for command in commands:
        lines.append(f" {json.dumps(command)}: {{")
        lines.append(f'  "options": {json.dumps(read_options(command), ensure_ascii=False)},')
        lines.append(f'  "groups": {json.dumps(read_groups(command))},')
        lines.append('  "keys": [')
        entries = [json.dumps(entry, ensure_ascii=False) for entry in read_keys(command)]
        lines.append(",\n".join(f"   {entry}" for entry in entries))
        lines.append("  ]")
        lines.append(" }," if command != commands[-1] else " }")
    return "\n".join([*lines, "}"]) + "\n"


def read_options(command: str) -> dict[str, str]:
    """Return the options of a command with their help; the last name of an option is its long one."""
    module = CONFIG_PARSER if has_config(command) else f"lora_bench.{command}"
    try:
        make_parser = getattr(importlib.import_module(module), "_parser", None)
    except ModuleNotFoundError:
        return {}
    if make_parser is None:
        return {}
    parser: argparse.ArgumentParser = make_parser()
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    if command != "train":
        actions = [action for action in actions if action.dest != "multirun"]
    return {", ".join(action.option_strings): reference.one_line(action.help) for action in actions}


def has_config(command: str) -> bool:
    """Return whether a command composes a config."""
    return command == "train" or (reference.CONF / f"{command}.yaml").is_file()


def read_groups(command: str) -> list[str]:
    """Return the groups whose choices a command takes, in the order of its config."""
    if command == "train":
        return [*GROUPS, "hydra/launcher"]
    if not has_config(command):
        return []
    defaults = read_config(command).get("defaults", [])
    names = [name for item in defaults if isinstance(item, dict) for name in item]
    return [name for name in names if name != "hydra"]


def read_config(command: str) -> dict[str, Any]:
    """Return the config of a command as its YAML file has it."""
    name = "config" if command == "train" else command
    content = yaml.safe_load((reference.CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def read_keys(command: str) -> list[Entry]:
    """Return the entries of all keys of a command; a key that several classes declare has several entries."""
    if not has_config(command):
        return []
    if command == "train":
        return [*top_keys(), *schema_keys(), *adapter_keys(), *hydra_keys()]
    entries = list(command_keys(command))
    names = {entry["key"] for entry in entries}
    groups = [group for group in read_groups(command) if group in ("data", "model")]
    return entries + [entry for entry in schema_keys() if entry["group"] in groups and entry["key"] not in names]


def entry_of(
    name: str, section: str, type_: str, defaults: dict[str, Any], text: str, values: tuple[str, ...] = ()
) -> Entry:
    """Return the entry of a key.

    Args:
        name: dotted, with its group.
        section: the settings that declare it.
        type_: in words.
        defaults: of its group, by the key's last part.
        text: its meaning.
        values: that it can have, if they are known.
    """
    default = defaults.get(name.rpartition(".")[2])
    is_known = name.rpartition(".")[2] in defaults and default != "???"
    words = [] if not is_known else [reference.value_in_words(default)]
    if "true or false" in type_ or isinstance(default, bool):
        values = ("true", "false", *values)
        values += tuple(words) if words and words[0].isidentifier() and words[0] not in (*values, "null") else ()
    if values and ("null" in type_ or words == ["null"]):
        values = (*values, "null")
    return {
        "key": name,
        "group": name.partition(".")[0] if "." in name else "",
        "section": section,
        "type": type_,
        "default": words[0] if words else None,
        "values": list(dict.fromkeys(values)),
        "text": text,
    }


def top_keys() -> Iterator[Entry]:
    """Yield the keys of `lora-bench train` that belong to no group."""
    path = reference.CONF / "config.yaml"
    values, comments = read_config("train"), reference.read_comments(path)
    for key, value in values.items():
        if not isinstance(value, dict | list):
            yield entry_of(key, "", "", values, comments.get(key, ""))


def schema_keys() -> Iterator[Entry]:
    """Yield the keys of the groups that have settings in the schema, and those that model families add."""
    for settings in reference.read_settings(reference.SCHEMA):
        if settings.name in reference.EXCLUDED:
            continue
        group, choice = reference.GROUP_OF_CLASS.get(settings.name, (settings.name.lower(), "default"))
        section = group if settings.base == "" else f"{group}={choice}"
        yield from class_keys(settings, reference.SCHEMA, group, choice, section)
        if settings.name == "Model":
            for path in sorted(reference.FAMILIES.glob("*.py")):
                for family in reference.read_settings(path):
                    has_choice = (reference.CONF / "model" / f"{path.stem}.yaml").is_file()
                    choice = path.stem if has_choice else f"_{path.stem}"
                    yield from class_keys(family, path, "model", choice, f"model.family={path.stem}")


def adapter_keys() -> Iterator[Entry]:
    """Yield the keys of adapters: those that all share, and those that each method adds."""
    shared = read_config("train").get("adapter") or {}
    sources = [(path, "adapter") for path in reference.BASES]
    methods = [path for path in sorted(reference.METHODS.glob("*.py")) if path.stem != "__init__"]
    methods.sort(key=lambda path: path.stem != "lora")
    sources += [(path, "adapter" if path.stem == "lora" else f"adapter={path.stem}") for path in methods]
    for path, section in sources:
        choice = path.stem if path in methods else "lora"
        for settings in reference.read_settings(path):
            yield from class_keys(settings, path, "adapter", choice, section, shared)


def class_keys(
    settings: reference.Settings,
    path: Path,
    group: str,
    choice: str,
    section: str,
    shared: dict[str, Any] | None = None,
) -> Iterator[Entry]:
    """Yield the entries of the keys that a class of settings declares in `path`."""
    values, comments = reference.read_defaults(group, choice)
    for key in settings.keys:
        name = f"{group}.{key.name}"
        text = key.text or comments.get(key.name, "")
        yield entry_of(name, section, key.type, (shared or {}) | values, text, values_of(path, name))


def command_keys(command: str) -> Iterator[Entry]:
    """Yield the keys of a command other than `train`, as its YAML file has them."""
    path = reference.CONF / f"{command}.yaml"
    comments = reference.read_comments(path)
    documented = {key.name: key for key in reference.read_settings(reference.PACKAGE / "llm" / "settings.py")[0].keys}
    for key, value in read_config(command).items():
        if key in ("defaults", "hydra") or value == {}:
            continue
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            full = f"{key}.{name}" if name else key
            known = documented.get(name) if key == "llm" else None
            text = known.text if known and known.text else comments.get(full, "")
            values = OTHER_VALUES.get((command, full), ())
            yield entry_of(full, key if name else "", known.type if known else "", {name or key: inner}, text, values)


def hydra_keys() -> Iterator[Entry]:
    """Yield the settings of Hydra that may be overridden, and those of the Slurm launcher."""
    texts = {
        "hydra.run.dir": "The folder of the run; it must not hold one.",
        "hydra.sweep.dir": "The folder of the sweep; it must not hold one.",
    }
    quiet = yaml.safe_load((reference.CONF / "hydra" / "quiet.yaml").read_text(encoding="utf-8"))
    for key, text in texts.items():
        defaults = {"dir": quiet[key.split(".")[1]]["dir"]}
        yield entry_of(key, "hydra", "text", defaults, text)
    path, folder = reference.PACKAGE / "sweeps" / "slurm.py", reference.CONF / "hydra" / "launcher"
    launcher = yaml.safe_load((folder / "slurm.yaml").read_text(encoding="utf-8"))
    comments = reference.read_comments(folder / "slurm.yaml")
    (settings,) = (settings for settings in reference.read_settings(path) if settings.name == "Slurm")
    for setting in settings.keys:
        name = f"hydra.launcher.{setting.name}"
        text = setting.text or comments.get(setting.name, "")
        yield entry_of(name, "hydra/launcher=slurm", setting.type, launcher, text, values_of(path, name))


# -- the values of a key, from the sources --


def values_of(path: Path, key: str) -> tuple[str, ...]:
    """Return the values that a key can have, as the module of its settings checks them; empty if they are open.

    Those of adapter methods are checked in a module of their own.
    """
    checked = _checked_values(path)
    if path.parent.name == "methods":
        checked = _checked_values(reference.PACKAGE / "config" / "adapter_values.py") | checked
    return checked.get(key) or checked.get(key.rpartition(".")[2]) or ()


@cache
def _checked_values(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the values of `require_one_of(KEY, …, VALUES)` and of constants with "Values of `KEY`" below, by key."""
    tree = _tree(path)
    checked = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "require_one_of":
            name = call.args[0]
            values = _evaluate(call.args[2], path)
            if isinstance(name, ast.Constant) and values is not None:
                checked[str(name.value)] = values
    for statement, follower in zip(tree.body, tree.body[1:], strict=False):
        text = follower.value if isinstance(follower, ast.Expr) else None
        if isinstance(statement, ast.Assign) and isinstance(text, ast.Constant):
            documented = str(text.value).removeprefix("Values of `").partition("`")
            values = _evaluate(statement.value, path)
            if str(text.value).startswith("Values of `") and values is not None:
                checked[documented[0]] = values
    return checked


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _evaluate(node: ast.expr, path: Path) -> tuple[str, ...] | None:
    """Return the texts of an expression: a tuple, a dictionary's keys, or a constant's name; None if it is another."""
    if isinstance(node, ast.Tuple):
        parts = [_evaluate(item.value if isinstance(item, ast.Starred) else item, path) for item in node.elts]
        return None if None in parts else tuple(text for part in parts if part for text in part)
    if isinstance(node, ast.Constant):
        return (str(node.value),)
    if isinstance(node, ast.Dict):
        return tuple(str(key.value) for key in node.keys if isinstance(key, ast.Constant))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tuple":
        return _evaluate(node.args[0], path)
    if isinstance(node, ast.Name):
        return _constant(node.id, path)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = _imported(node.value.id, path)
        return _constant(node.attr, module) if module and module.is_file() else None
    return None


def _constant(name: str, path: Path) -> tuple[str, ...] | None:
    """Return the texts of a constant of a module, or of the module that it is imported from."""
    for node in _tree(path).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            return _evaluate(node.value, path)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name and node.value is not None:
            return _evaluate(node.value, path)
    module = _imported(name, path)
    if module is not None and module.parent.name == "config":  # it may be computed, and is light to import
        return tuple(getattr(importlib.import_module(f"lora_bench.config.{module.stem}"), name))
    return _constant(name, module) if module and module.is_file() else None


def _imported(name: str, path: Path) -> Path | None:
    """Return the file of the module that a name is, or that it is imported from; None if it is not imported."""
    for node in _tree(path).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                folder = reference.ROOT.joinpath(*str(node.module).split("."))  # type: ignore[attr-defined]
                module = folder / f"{alias.name}.py"
                return module if module.is_file() else folder.with_suffix(".py")
    return None
