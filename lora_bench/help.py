"""What `--help` prints: the commands, the config groups and their choices."""

from __future__ import annotations

from functools import cache
from pathlib import Path

COMMANDS = {
    "train": "train, evaluate and record a run; with -m or sweep=NAME, a sweep",
    "eval": "score a finished run, or an adapter made by PEFT, on another data set",
    "predict": "label new pairs with a finished run",
    "export": "write a finished run as an adapter for PEFT or as a plain Hugging Face model",
    "prompt": "a language model behind an OpenAI-compatible server as a baseline; or answers in a file",
    "compare": "tables over finished runs: what varies, how good, at what cost",
    "clean": "remove cached tokens and prefixes, or list them with their sizes",
    "doctor": "versions, devices, precisions, and what is missing here",
}
GROUPS = (
    "model",
    "adapter",
    "data",
    "optimizer",
    "trainer",
    "metric",
    "pack",
    "ensemble",
    "tracking",
    "experiment",
    "sweep",
)
"""Of `train`, in the order in which they are told."""
PROMPT_GROUPS = ("data", "prompt", "metric", "tracking")


def conf_folder() -> Path:
    """The configuration groups: beside the package in a clone, inside it in an installed wheel."""
    found = Path(__file__).parent / "conf"
    return found if found.is_dir() else Path(__file__).parent.parent / "conf"


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "lora-bench: which low-rank adapter is best for a text encoder, at what cost, and is the difference real?",
            "",
            "  lora-bench train experiment=quickstart",
            "  lora-bench train model=roberta adapter.rank=8",
            "  lora-bench train -m adapter=lora,full 'seed=range(5)'",
            "  lora-bench compare outputs/",
            "",
            "Commands (lora-bench COMMAND --help tells more):",
            *lines,
            "",
            "  --version",
        ]
    )


def help_of(command: str) -> str:
    conf = conf_folder()
    lines = [f"lora-bench {command}: {COMMANDS[command]}", ""]
    if command == "train":
        lines += [
            "  lora-bench train [-m] [--cfg job] [group=choice] [key=value] …",
            "",
            "  -m              sweep: every combination of the values, as adapter.rank=2,4,8 'seed=range(5)'",
            "  --cfg job       print the composed config and stop: every key with its value",
            "  --config-dir D  look for groups' choices in folder D too",
            "  dry_run=true    build everything, run a few probe steps, print what the run would cost",
            "",
            "Groups and their choices:",
            *(f"  {group}={'|'.join(choices(group))}" for group in GROUPS),
            "",
            "Keys: adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules, adapter.layers,",
            "  optimizer.lr, trainer.epochs, trainer.batch_size, trainer.precision, data.path, data.train_size,",
            "  seed, … (--cfg job lists all)",
        ]
    elif command == "clean":
        lines += [
            "  lora-bench clean [tokens] [prefix] [--dry-run]",
            "",
            "  tokens      tokenised texts",
            "  prefix      outputs of frozen layers",
            "  --dry-run   list the caches with their sizes and remove nothing",
            "",
            "Without a name, both are removed; the next run computes what it needs again.",
            "Answers of language models (lora-bench prompt) are listed and kept.",
            "The caches lie in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench). Their sizes are bounded by",
            "trainer.prefix_cache_bytes and by $LORA_BENCH_TOKEN_CACHE_BYTES (4e9 by default; 0: no token cache).",
        ]
    elif command in ("eval", "predict", "export", "prompt"):
        lines += [f"  {line}" for line in (conf / f"{command}.yaml").read_text(encoding="utf-8").splitlines()]
    return "\n".join(lines)


@cache
def choices(group: str) -> tuple[str, ...]:
    """The options of a config group that ship with the package."""
    return tuple(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))
