"""The texts of `--help` and of `lora-bench help`: commands, groups with their choices, and keys with their meanings."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import TYPE_CHECKING

from lora_bench.config.foreign_keys import foreign_key_note
from lora_bench.config.groups import COMMANDS, GROUPS, all_choices, conf_folder
from lora_bench.config.key_index import read_index
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.config.key_index import KeyEntry

MIN_WIDTH, MAX_WIDTH = 60, 100
"""Columns of the text, whatever the terminal has."""
_MAX_DEFAULT = 14
"""Characters of a default that is shown beside its key."""


def format_overview() -> str:
    """Return the text of `lora-bench --help`."""
    return "\n".join(
        [
            "lora-bench: which low-rank adapter is best for a text classifier, at what cost,",
            "and is the difference real?",
            "",
            "  lora-bench train experiment=quickstart",
            "  lora-bench train model=roberta adapter.rank=8",
            "  lora-bench train -m adapter=lora,full 'seed=range(5)'",
            "  lora-bench compare outputs/",
            "",
            "Commands (lora-bench help COMMAND explains one):",
            *_two_columns(list(COMMANDS.items())),
            "",
            "  --version",
        ]
    )


def format_help(command: str, config_dir: str | None = None) -> str:
    """Return the text of `lora-bench COMMAND --help`, which begins with the command's one-line help.

    For `train` it has every group and key. For `eval`, `predict`, `export`, `push` and `prompt` it is the command's
    YAML file. An unknown command is a KeyError.

    Args:
        command: its name.
        config_dir: a folder whose choices are listed, too.
    """
    lines = [f"lora-bench {command}: {COMMANDS[command]}", ""]
    if command == "train":
        lines += _train_help(config_dir)
    elif command in _USAGE:
        lines += [f"  {line}".rstrip() for line in _USAGE[command].splitlines()]
    elif command in ("eval", "predict", "export", "push", "prompt"):
        text = (conf_folder() / f"{command}.yaml").read_text(encoding="utf-8")
        lines += [f"  {line}" for line in text.splitlines()]
    return "\n".join(lines)


_USAGE = {
    "search": """\
lora-bench search [group=choice] [key=values] … search.trials=N

adapter=lora,dora adapter.rank=2,4,8          choices to search over
adapter.dropout=interval(0,0.3)               numbers to search over
optimizer.lr=tag(log,interval(1e-4,1e-2))     the same by orders of magnitude
search.trials, search.flops, search.minutes   budgets; one is required
search.repeats=2                              best trials that get a second seed
search.final_seeds=3                          seeds that train the best again
pack.size=6                                   trials that train together
pack.halving=false                            eliminate no trial early
resume=DIR                                    resume a search

Parentheses need quotation marks in a shell. Keys with one value are fixed.
Groups and keys are those of lora-bench train. Rank and learning rate vary by
default. Trials are scored on the selection split alone.""",
    "clean": """\
lora-bench clean [tokens] [prefix] [checkpoints] [--dry-run]

tokens        tokenised texts
prefix        outputs of frozen layers
checkpoints   of the runs below outputs/ that are not running
--dry-run     list all with their sizes and remove nothing

Without a name, tokens and prefix are removed; the next run computes what it
needs again. Without its checkpoints an unfinished run can only be resumed from
its start. Answers of language models (lora-bench prompt) are listed and kept.
The caches lie in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench). Their sizes
are bounded by trainer.prefix_cache_bytes and by $LORA_BENCH_TOKEN_CACHE_BYTES
(4e9 by default; 0: no token cache).""",
    "completion": """\
eval "$(lora-bench completion bash)"      in ~/.bashrc
eval "$(lora-bench completion zsh)"       in ~/.zshrc, below compinit
lora-bench completion fish > ~/.config/fish/completions/lora-bench.fish

The tab key then completes commands, options, groups, choices, keys, values and
folders.""",
    "help": """\
lora-bench help train          the arguments of a command
lora-bench help adapter        the choices and keys of a group
lora-bench help adapter.rank   all about a key""",
}
"""The text of `--help` of commands that compose no config."""


def explain(arguments: Sequence[str]) -> str:
    """Return the text of `lora-bench help TOPIC` about a group or a key; without a topic the overview.

    Raises:
        UserError: there is no such topic, or more than one is given.
    """
    if not arguments:
        return format_overview()
    topic = arguments[0]
    if len(arguments) > 1:
        remedy = f"Ask for one: lora-bench help {topic}."
        raise UserError("explains one topic", key="help", value=" ".join(arguments), remedy=remedy, code=Code.CONFLICT)
    name = topic.partition("=")[0].rstrip(".")
    keys = read_index()["train"].keys
    if entries := [entry for entry in keys if entry.key == name]:
        return "\n\n".join(_explain_key(entry) for entry in entries)
    if name in {entry.group for entry in keys} | {*read_index()["train"].groups}:
        return "\n".join(_group_help(name))
    names = [*COMMANDS, *read_index()["train"].groups, *(entry.key for entry in keys)]
    hint = nearest(name, names)
    listing = "lora-bench train --help lists groups and keys."
    remedy = foreign_key_note(name) or (hint if hint.startswith("Did") else listing)
    raise UserError("is no command, group or key", key="help", value=topic, remedy=remedy, code=Code.UNKNOWN_CHOICE)


def _train_help(config_dir: str | None) -> Iterator[str]:
    """Yield the lines on the arguments of `lora-bench train`: usage, options, groups and the keys of most runs."""
    index = read_index()["train"]
    yield "  lora-bench train [-m] [group=choice] [key=value] …"
    yield ""
    yield from _two_columns(list(index.options.items()))
    yield ""
    yield "Groups and their choices (lora-bench help adapter: all about one):"
    for group in GROUPS:
        yield from _choices_line(group, config_dir)
    yield ""
    yield "Keys with their defaults (lora-bench help adapter.rank: all about one):"
    sections = dict.fromkeys(entry.section for entry in index.keys if entry.section == entry.group != "hydra")
    for section in sorted(sections, key=["", *index.groups, *sections].index):
        yield ""
        yield from _key_lines([entry for entry in index.keys if entry.section == section], cut=True)
    yield ""
    yield "Some choices add keys: lora-bench help model, help data and help adapter."


def _group_help(group: str) -> Iterator[str]:
    """Yield the lines on a group: its choices, and all keys with the choices that add them."""
    index = read_index()["train"]
    if group in index.groups:
        yield "Choices:"
        yield from _choices_line(group, None)
    sections = list(dict.fromkeys(entry.section for entry in index.keys if entry.section.partition("=")[0] == group))
    sections += [entry.section for entry in index.keys if entry.group == group and entry.section not in sections]
    for section in dict.fromkeys(sections):
        if group in index.groups or section != sections[0]:
            yield ""
        yield "Keys:" if section == group else f"Keys of {section}:"
        yield from _key_lines([entry for entry in index.keys if entry.section == section])


def _explain_key(entry: KeyEntry) -> str:
    """Return all that is known about a key."""
    facts = [entry.type, f"default {entry.default}" if entry.default is not None else ""]
    facts += [f"with {entry.section}"] if "=" in entry.section else []
    known = ", ".join(filter(None, facts))
    lines = [f"{entry.key} ({known})" if known else entry.key]
    lines += _wrapped(entry.text.replace("`", ""), "  ")
    lines += _wrapped(f"Values: {', '.join(entry.values)}", "  ") if entry.values else []
    return "\n".join(lines)


def _choices_line(group: str, config_dir: str | None) -> list[str]:
    """Return the lines `group=a|b|c`, wrapped."""
    options = " | ".join(all_choices(group, config_dir))
    return textwrap.wrap(
        f"{group}={options}",
        _width(),
        initial_indent="  ",
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _key_lines(entries: Sequence[KeyEntry], *, cut: bool = False) -> list[str]:
    """Return each key with its default and its meaning, or with `cut` a line for each with the beginning of it."""
    return _two_columns([(_with_default(entry), entry.text.replace("`", "")) for entry in entries], cut=cut)


def _with_default(entry: KeyEntry) -> str:
    """Return `key=default`, or `key=` if the default is long or missing."""
    default = entry.default or ""
    return f"{entry.key}={default if len(default) <= _MAX_DEFAULT else '…'}"


def _two_columns(rows: Sequence[tuple[str, str]], *, cut: bool = False) -> list[str]:
    """Return the rows as lines of two columns, the second one wrapped, or cut to one line at the end of a word."""
    first = max(len(name) for name, _ in rows)
    lines = []
    for name, text in rows:
        start = f"  {name:<{first}}  "
        room = _width() - len(start)
        if cut:
            lines.append(f"{start}{_cut(text, room)}".rstrip())
        else:
            lines += textwrap.wrap(text, _width(), initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    return lines


def _cut(text: str, width: int) -> str:
    """Return the first sentence or part of a sentence of a text, cut at a word with `…` if it is longer."""
    text = text[:1].upper() + text[1:] if re.match("[a-z]+ ", text) else text
    first = re.split(r"(?<=[a-z)])[.;] ", text)[0].rstrip(".")
    return first if len(first) <= width else f"{first[: width - 1].rpartition(' ')[0].rstrip(',:;')} …"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent)


def _width() -> int:
    """Return the columns that a text may take."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns - 1))
