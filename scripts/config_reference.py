#!/usr/bin/env python3
"""Write docs/configuration.md and docs/errors.md from the sources.

    scripts/config_reference.py            write both pages
    scripts/config_reference.py --check    exit with 1 if a page is not up to date

A key's meaning and type come from the dataclass that declares it, its default and the choices of a group from `conf/`.
The sources are parsed, not imported, so torch is not needed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_bench"
CONF = ROOT / "conf"

SCHEMA = PACKAGE / "config" / "schema.py"
METHODS = PACKAGE / "adapters" / "methods"
FAMILIES = PACKAGE / "backbones" / "families"
BASES = (PACKAGE / "adapters" / "base.py", PACKAGE / "adapters" / "targets.py")
GROUP_OF_CLASS = {
    "T5Model": ("model", "t5"),
    "Model": ("model", "bert"),
    "HubData": ("data", "qqp"),
    "FileData": ("data", "pairs"),
    "ToyData": ("data", "toy"),
    "Data": ("data", "qqp"),
    "Optimizer": ("optimizer", "adamw"),
    "Packing": ("pack", "default"),
}
"""The configuration group of each settings class, and the choice that its defaults are read from. A class that is not
listed belongs to the group that has its name in lower case."""
EXCLUDED = {"Metric"}  # described by hand below: its keys stand under a name that the user gives
COMMANDS = ("eval", "predict", "export", "prompt")
TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "None": "null",
    "Any": "text or list",
    "list[str]": "list of texts",
    "list[int]": "list of integers",
    "dict[str, Any]": "keys",
}


@dataclass
class Key:
    name: str
    type: str
    text: str


@dataclass
class Settings:
    """A dataclass of settings: its docstring and the keys that it adds to those of its base."""

    name: str
    text: str
    base: str
    keys: list[Key] = field(default_factory=list)


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def type_in_words(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.BinOp):
        return f"{type_in_words(annotation.left)} or {type_in_words(annotation.right)}"
    source = ast.unparse(annotation)
    return TYPES.get(source, source)


def read_settings(path: Path) -> list[Settings]:
    """Return the dataclasses of a module with the docstrings of their attributes."""
    classes = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            continue
        base = next((ast.unparse(b) for b in node.bases if ast.unparse(b) != "ABC"), "")
        settings = Settings(node.name, one_line(ast.get_docstring(node)), base)
        for statement, follower in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                is_text = isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant)
                text = one_line(str(follower.value.value)) if is_text else ""
                settings.keys.append(Key(statement.target.id, type_in_words(statement.annotation), text))
        classes.append(settings)
    return classes


def read_yaml(group: str, choice: str) -> dict[str, Any]:
    """Return the keys of a choice, those that it inherits through `defaults` included."""
    content = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for parent in content.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_" and (CONF / group / f"{parent}.yaml").is_file():
            merged |= read_yaml(group, parent)
    return merged | content


def read_comments(path: Path) -> dict[str, str]:
    """Return the comment of each key of a YAML file, with the lines that continue it."""
    comments: dict[str, str] = {}
    path_of_key: list[tuple[int, str]] = []
    current = None
    for line in path.read_text(encoding="utf-8").splitlines():
        continued = re.match(r"^ {20,}# (.*)", line)
        if continued and current:
            comments[current] += f" {continued[1].strip()}"
            continue
        matched = re.match(r"^( *)([\w.]+):(?:\s[^#]*?)?(?:\s+# (.*))?$", line)
        current = None
        if matched:
            indent = len(matched[1])
            path_of_key = [(i, name) for i, name in path_of_key if i < indent] + [(indent, matched[2])]
            current = ".".join(name for _, name in path_of_key)
            comments[current] = (matched[3] or "").strip()
    return comments


def introduction(path: Path) -> str:
    """Return the comment that opens a YAML file, without its example commands."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("# "):
            break
        if line.startswith("#   "):
            continue
        lines.append(line.removeprefix("# "))
    return one_line(" ".join(lines))


def value_in_words(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(value_in_words, value))}]"
    return "`???` (required)" if value == "???" else str(value)


def entry(name: str, type_: str, defaults: dict[str, Any], text: str, comment: str = "") -> str:
    """Return the list item of one key."""
    key = name.rsplit(".", 1)[-1]
    given = value_in_words(defaults[key]) if key in defaults else ""
    default = "required" if given.startswith("`???`") else f"default `{given}`" if given else "no default"
    head = ", ".join(filter(None, (type_, default)))
    body = text or comment
    body = f"{body[0].upper()}{body[1:]}" if re.match("[a-z]+ ", body) else body
    if body and not body.endswith((".", "!", "?", "…")):
        body += "."
    return f"- **`{name}`** ({head})" + (f": {body}" if body else "")


def file_link(group: str) -> str:
    choices = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
    return f"`{group}=` {' '.join(f'`{choice}`' for choice in choices)}"


def defaults_and_comments(group: str, choice: str) -> tuple[dict[str, Any], dict[str, str]]:
    if (CONF / group / f"{choice}.yaml").is_file():
        values = read_yaml(group, choice)
        comments: dict[str, str] = {}
        for path in (CONF / group).glob("*.yaml"):
            comments = read_comments(path) | comments
        return values, comments | read_comments(CONF / group / f"{choice}.yaml")
    values = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8")).get(group) or {}
    prefix = f"{group}."
    comments = read_comments(CONF / "config.yaml")
    return values, {k.removeprefix(prefix): v for k, v in comments.items() if k.startswith(prefix)}


def section(settings: Settings, group: str, choice: str, title: str) -> list[str]:
    values, comments = defaults_and_comments(group, choice)
    lines = ["", f"### {title}", "", *([settings.text, ""] if settings.text else [])]
    lines += [
        entry(f"{group}.{key.name}", key.type, values, key.text, comments.get(key.name, "")) for key in settings.keys
    ]
    return lines


def schema_sections() -> list[str]:
    lines: list[str] = []
    last_group = None
    for settings in read_settings(SCHEMA):
        if settings.name in EXCLUDED:
            continue
        group, choice = GROUP_OF_CLASS.get(settings.name, (settings.name.lower(), "default"))
        if group != last_group:
            lines += ["", f"## `{group}`"]
            if (CONF / group).is_dir():
                lines += ["", f"Choices: {file_link(group)}."]
            last_group = group
        lines += section(settings, group, choice, settings.name)
        if settings.name == "Model":
            lines += family_sections()
    return lines


def family_sections() -> list[str]:
    """Keys that single model families add."""
    return [
        line
        for path in sorted(FAMILIES.glob("*.py"))
        for settings in read_settings(path)
        if settings.keys
        for line in section(settings, "model", path.stem, f"{settings.name} (`model.family={path.stem}`)")
    ]


def adapter_sections() -> list[str]:
    main = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8")).get("adapter") or {}
    lines = ["", "## `adapter`", "", f"Choices: {file_link('adapter')}."]
    for path in BASES:
        for settings in read_settings(path):
            lines += ["", f"### {settings.name}", "", settings.text, ""]
            values = main | read_yaml("adapter", "lora")
            lines += [entry(f"adapter.{key.name}", key.type, values, key.text) for key in settings.keys]
    for path in sorted(METHODS.glob("*.py")):
        for settings in read_settings(path):
            lines += section(settings, "adapter", path.stem, f"{settings.name} (`adapter={path.stem}`)")
            if len(settings.keys) == 0:
                lines += ["It adds no key."]
    lines += ["", "### Choices with other defaults", "", "These choices change defaults and add no key."]
    lines += [""]
    for path in sorted((CONF / "adapter").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        parents = [parent for parent in content.pop("defaults", []) if parent != "_self_"]
        if parents:
            changed = ", ".join(f"`{key}: {value_in_words(value)}`" for key, value in content.items())
            lines.append(f"- **`adapter={path.stem}`** (from `{parents[0]}`): {changed}.")
    return lines


def top_section() -> list[str]:
    path = CONF / "config.yaml"
    values, comments = yaml.safe_load(path.read_text(encoding="utf-8")), read_comments(path)
    plain = [key for key, value in values.items() if not isinstance(value, dict | list) and key != "defaults"]
    return ["", "## Top level", "", *(entry(key, "", values, comments.get(key, "")) for key in plain)]


def group_sections() -> list[str]:
    """Groups whose choices are presets or have no dataclass in the schema."""
    lines: list[str] = []
    for group in ("metric", "tracking", "experiment", "sweep", "hydra/launcher"):
        lines += ["", f"## `{group}`", ""]
        for path in sorted((CONF / group).glob("*.yaml")):
            lines.append(f"- **`{group}={path.stem}`**: {introduction(path)}")
    return lines


def command_sections() -> list[str]:
    """Keys of the commands besides `train`."""
    lines: list[str] = []
    by_name = {settings.name: settings for settings in read_settings(PACKAGE / "llm" / "settings.py")}
    settings = {"llm": by_name["LLM"]}
    for command in COMMANDS:
        path = CONF / f"{command}.yaml"
        values, comments = yaml.safe_load(path.read_text(encoding="utf-8")), read_comments(path)
        lines += ["", f"## `lora-bench {command}`", ""]
        for key, value in values.items():
            if key in ("defaults", "hydra") or value == {}:
                continue
            documented = {k.name: k for k in settings[key].keys} if key in settings else {}
            for name, inner in value.items() if isinstance(value, dict) else [(None, value)]:
                full = key if name is None else f"{key}.{name}"
                known = documented.get(name or "")
                defaults = {(name or key): inner}
                text = known.text if known else ""
                lines.append(entry(full, known.type if known else "", defaults, text, comments.get(full, "")))
    return lines


def configuration() -> str:
    opening = [
        "<!-- Generated by scripts/config_reference.py. Do not edit. -->",
        "",
        "# Configuration reference",
        "",
        "This page lists every key. It is generated from the sources.",
        "",
        "```bash",
        "lora-bench train --cfg job adapter=dora adapter.rank=4 optimizer.lr=1e-3",
        "```",
        "",
        "A group is chosen with `group=choice` and a key is set with `group.key=value`. `--cfg job` prints",
        "the composed configuration and trains nothing. An unknown key is refused.",
    ]
    lines = [
        *opening,
        *top_section(),
        *schema_sections(),
        *adapter_sections(),
        *group_sections(),
        *command_sections(),
    ]
    return "\n".join(lines).strip() + "\n"


def errors() -> str:
    """Return the page of error codes, from the attributes of `Code`."""
    body = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8")).body
    (codes,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "Code")
    lines = [
        "<!-- Generated by scripts/config_reference.py. Do not edit. -->",
        "",
        "# Error codes",
        "",
        "A wrong request ends with exit code 2 and one paragraph: what is wrong, where, and what to do.",
        "In Python it is a `lora_bench.errors.UserError`. Its `code` is stable from version to version; the",
        "wording of the message is not. `key`, `value`, `file` and `row` name the cause if there is one.",
        "",
        "| code | meaning |",
        "| --- | --- |",
    ]
    for statement, follower in zip(codes.body, [*codes.body[1:], None], strict=True):
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            text = follower.value.value if isinstance(follower, ast.Expr) else ""  # type: ignore[attr-defined]
            lines.append(f"| `{statement.value.value}` | {one_line(text)} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    return {ROOT / "docs" / "configuration.md": configuration(), ROOT / "docs" / "errors.md": errors()}


def cli() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    options = parser.parse_args()
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.relative_to(ROOT)} is not up to date: run scripts/config_reference.py", file=sys.stderr)
        else:
            path.write_text(pages()[path], encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(cli())
