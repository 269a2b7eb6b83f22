"""The text of `--help`, with the groups and their choices."""

from __future__ import annotations

from lora_bench.config.groups import COMMANDS, GROUPS, all_choices, conf_folder


def format_overview() -> str:
    """Return the text of `lora-bench --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "lora-bench: which low-rank adapter is best for a text encoder, at what cost, and is the difference real?",
            "",
            "  lora-bench train experiment=quickstart",
            "  lora-bench train model=roberta adapter.rank=8",
            "  lora-bench train -m adapter=lora,full 'seed=range(5)'",
            "  lora-bench compare outputs/",
            "",
            "Commands (lora-bench COMMAND --help shows their arguments):",
            *lines,
            "",
            "  --version",
        ]
    )


def format_help(command: str, config_dir: str | None = None) -> str:
    """Return the text of `lora-bench COMMAND --help`, which begins with the command's one-line help.

    Usage follows for `train` and `clean`; for `eval`, `predict`, `export`, `push` and `prompt` it is the command's YAML
    file. An unknown command is a KeyError.

    Args:
        command: its name.
        config_dir: a folder whose choices are listed, too.
    """
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
            *(f"  {group}={'|'.join(all_choices(group, config_dir))}" for group in GROUPS),
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
    elif command in ("eval", "predict", "export", "push", "prompt"):
        lines += [f"  {line}" for line in (conf / f"{command}.yaml").read_text(encoding="utf-8").splitlines()]
    return "\n".join(lines)
