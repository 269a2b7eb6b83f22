"""`lora-bench completion SHELL`: print the script that completes commands, groups, choices, keys and values.

The script calls `lora-bench __complete WORD…` at each press of the tab key. It answers with a line for each candidate:
the whole word, a tab and a description. This module imports little, because the answer has to be there at once.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.config.groups import COMMANDS, choices, conf_folder
from lora_bench.config.key_index import CommandIndex, read_index

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

COMPLETE = "__complete"
"""The hidden command that the scripts call."""

PATH_KEYS = {
    "run",
    "peft",
    "resume",
    "input",
    "output",
    "predictions",
    "data.path",
    "model.path",
    "model.tokenizer",
    "adapter.init_from",
    "hydra.run.dir",
    "hydra.sweep.dir",
}
"""Keys whose values are files or folders."""
PATH_OPTIONS = {"--config-dir", "-cd", "--html", "--best", "--baseline"}
"""Options that are followed by a file or folder."""
VALUES = {"run": ["last"], "resume": ["last"], "--cfg": ["job", "hydra", "all"], "-c": ["job", "hydra", "all"]}
"""Further values of keys and options."""
ARGUMENTS = {
    "clean": ["tokens", "prefix", "checkpoints", "--dry-run"],
    "completion": ["bash", "zsh", "fish"],
    "compare": ["last"],
    "show": ["last"],
    "watch": ["last"],
    "rm": ["last"],
    "push": ["last"],
}
"""Arguments of commands that compose no config."""
PATH_COMMANDS = {"compare", "ls", "show", "watch", "rm"}
"""Commands whose arguments are folders."""


class Candidate(NamedTuple):
    """A word that completes the present one; one that ends in `=`, `.`, `/` or `,` goes on."""

    word: str
    description: str = ""


def print_candidates(words: Sequence[str]) -> None:
    """Print the candidates for the last of these words, which follow `lora-bench`, one in a line."""
    for word, description in complete(words):
        print(f"{word}\t{_shortened(description)}")


def _shortened(text: str) -> str:
    """Return the first sentence, or part of a sentence, of a description, at most 60 characters."""
    first = re.split(r"(?<! al)\. |; ", text.replace("`", ""), maxsplit=1)[0].rstrip(".")
    return first if len(first) <= 60 else f"{first[:59]}…"


def complete(words: Sequence[str]) -> list[Candidate]:
    """Return the candidates for the last word of a command line, whose first word follows `lora-bench`."""
    *before, word = words or [""]
    word = word.lstrip("'\"")
    if not before:
        names = [Candidate(name, text) for name, text in COMMANDS.items()]
        return _matching([*names, Candidate("--version"), Candidate("--help")], word)
    command = before[0]
    if command == "help":
        return _matching(_topics(word), word)
    command = "train" if command == "search" else command  # it takes the same keys
    index = read_index().get(command, CommandIndex({}, [], []))
    if before[-1] in PATH_OPTIONS:
        return list(_paths("", word))
    if before[-1] in VALUES:
        return _matching([Candidate(value) for value in VALUES[before[-1]]], word)
    if word.startswith("-"):
        options = [Candidate(name, text) for names, text in index.options.items() for name in names.split(", ")]
        return _matching([*options, Candidate("--help", "explain the command"), *_arguments(command)], word)
    if "=" in word:
        key, _, value = word.partition("=")
        return _values(index, key, value, before)
    if command in PATH_COMMANDS:
        return [*_matching(_arguments(command), word), *_paths("", word)]
    return _matching([*_arguments(command), *_keys(index, word)], word)


def _matching(candidates: Iterable[Candidate], word: str) -> list[Candidate]:
    """Return the candidates that begin with a word, each word once with its first description."""
    by_word: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.word.startswith(word):
            by_word.setdefault(candidate.word, candidate)
    return list(by_word.values())


def _arguments(command: str) -> list[Candidate]:
    return [Candidate(argument) for argument in ARGUMENTS.get(command, ())]


def _topics(word: str) -> Iterator[Candidate]:
    """Yield what `help` explains: commands, groups and, once a group is typed, its keys."""
    yield from (Candidate(name, text) for name, text in COMMANDS.items())
    yield from (Candidate(group, "a group") for group in read_index()["train"].groups)
    for entry in read_index()["train"].keys:
        if "." in word or not entry.group:
            yield Candidate(entry.key, entry.text)


def _keys(index: CommandIndex, word: str) -> Iterator[Candidate]:
    """Yield the groups and keys that may follow; without a dot in the word only the first parts of keys."""
    for group in index.groups:
        yield Candidate(f"{group}=", "choose one")
    for entry in index.keys:
        first = entry.key.partition(".")[0]
        if "." in word or not entry.group:
            yield Candidate(f"{entry.key}=", entry.text)
        else:
            yield Candidate(f"{first}.", f"keys of {first}")


def _values(index: CommandIndex, key: str, value: str, before: Sequence[str]) -> list[Candidate]:
    """Return the words that complete `key=value`; of several values, separated by commas, the last is completed.

    Args:
        index: of the command.
        key: as typed, also with `+`.
        value: as typed, without a closing quotation mark.
        before: the words before, which may name a folder of choices.
    """
    name = key.lstrip("+")
    if name in PATH_KEYS:
        fixed = [Candidate(f"{key}={word}") for word in VALUES.get(name, ()) if word.startswith(value)]
        return [*fixed, *_paths(f"{key}=", value)]
    start = max(value.rfind(","), value.rfind("[")) + 1
    typed, part = f"{key}={value[:start]}", value[start:]
    if name in index.groups:
        return [
            Candidate(f"{typed}{choice}", _describe(name, choice))
            for choice in _choices(name, before)
            if choice.startswith(part)
        ]
    values = [value for entry in index.keys if entry.key == name for value in entry.values]
    return [Candidate(f"{typed}{word}") for word in dict.fromkeys(values) if word.startswith(part)]


def _choices(group: str, before: Sequence[str]) -> list[str]:
    """Return the choices of a group, those of installed packages and of a folder of `--config-dir` included."""
    from lora_bench.extensions.presence import has_extensions

    folder = next((after for option, after in pairwise(before) if option == "--config-dir"), None)
    group_folder = os.path.join(folder, group) if folder else ""
    if has_extensions():
        from lora_bench.config.groups import all_choices

        return all_choices(group, folder)
    typed = os.listdir(group_folder) if os.path.isdir(group_folder) else []
    return sorted({*choices(group), *(name[:-5] for name in typed if name.endswith(".yaml"))})


def _describe(group: str, choice: str) -> str:
    """Return the first comment line of a choice's YAML file; empty if it is not one of lora-bench's own."""
    path = conf_folder() / group / f"{choice}.yaml"
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first[2:].strip() if first.startswith("# ") else ""


def _paths(prefix: str, path: str) -> Iterator[Candidate]:
    """Yield the files and folders whose path begins with this one; hidden ones only after a dot."""
    folder, name = os.path.split(path)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith(".")):
            yield Candidate(f"{prefix}{os.path.join(folder, entry.name)}{'/' if entry.is_dir() else ''}")


def run_completion(arguments: Sequence[str]) -> None:
    """Print the completion script of a shell: `bash`, `zsh` or `fish`.

    Raises:
        UserError: there is no such shell, or not one argument.
    """
    from lora_bench.errors import Code, UserError

    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        remedy = f"Give one of {', '.join(SCRIPTS)}: lora-bench completion bash."
        raise UserError(
            "is not a shell that is known" if arguments else "needs the name of a shell",
            key="completion",
            value=" ".join(arguments) or None,
            remedy=remedy,
            code=Code.UNKNOWN_CHOICE,
        )
    print(SCRIPTS[arguments[0]], end="")


_BASH = """\
# Completion of lora-bench for bash. Add this line to ~/.bashrc:
#   eval "$(lora-bench completion bash)"
_lora_bench() {
    local line="${COMP_LINE:0:COMP_POINT}" current="${COMP_WORDS[COMP_CWORD]}" prefix candidate
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local word="${words[${#words[@]}-1]}"
    # bash replaces only what follows the last = or :, so candidates lose what precedes it.
    [[ $current == [=:] ]] && current=""
    prefix="${word%"$current"}"
    COMPREPLY=()
    while IFS=$'\\t' read -r candidate _; do
        [[ $candidate == "$prefix"* ]] || continue
        candidate="${candidate#"$prefix"}"
        [[ $candidate == *" "* ]] && printf -v candidate %q "$candidate"
        COMPREPLY+=("$candidate")
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./,] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _lora_bench lora-bench
"""

_ZSH = """\
#compdef lora-bench
# Completion of lora-bench for zsh. Add this line to ~/.zshrc, below `compinit`:
#   eval "$(lora-bench completion zsh)"
_lora_bench() {
    local line word text
    local -i width=0
    local -a lines going ending going_texts ending_texts
    lines=("${(@f)$("${words[1]}" __complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    for line in "${lines[@]}"; do
        word="${line%%$'\\t'*}"
        (( ${#word} > width )) && width=${#word}
    done
    for line in "${lines[@]}"; do
        word="${line%%$'\\t'*}"
        [[ -n $word ]] || continue
        text="${(r:width:)word}  ${line#*$'\\t'}"
        text="${text[1,$((COLUMNS - 1))]}"
        if [[ $word == *[=./,] ]]; then
            going+=("$word")
            going_texts+=("$text")
        else
            ending+=("$word")
            ending_texts+=("$text")
        fi
    done
    (( ${#going} )) && compadd -l -S '' -d going_texts -a going
    (( ${#ending} )) && compadd -l -d ending_texts -a ending
    return 0
}
if [[ $funcstack[1] == _lora_bench ]]; then
    _lora_bench "$@"
else
    compdef _lora_bench lora-bench
fi
"""

_FISH = """\
# Completion of lora-bench for fish. Write it to ~/.config/fish/completions/lora-bench.fish:
#   lora-bench completion fish > ~/.config/fish/completions/lora-bench.fish
function __lora_bench_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    $words[1] __complete $words[2..-1] "$current" 2>/dev/null
end
complete -c lora-bench -f -a '(__lora_bench_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
"""The completion script of each shell."""
