"""Which runs are one experiment, and what tells experiments apart.

Runs whose configs are equal but for the seed are one experiment. What only follows from a choice that varies
(`model.hub_id` from `model`) tells nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.config.canonical import normalise_numbers, settings_hash
from lora_bench.config.keys import flatten, key_of
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GROUPS = ("model", "adapter", "prompt", "data", "optimizer", "trainer")


# What may differ between runs of one experiment: they still belong to one row.
OUTSIDE_THE_EXPERIMENT = ("seed", "resume", "dry_run", "metric", "pack", "tracking")


# What the data turned out to be, from the record; the rest are config keys.
DATA_FOUND = ("data.fingerprint", "data.fingerprint.train", "data.rows.train")


@dataclass(frozen=True)
class Recorded:
    """A run by its record: what was asked for, flat, so that runs can be told apart."""

    folder: Path
    record: dict[str, Any]
    keys: dict[str, Any]
    """Choices, flat config, and `DATA_FOUND` (`data.fingerprint` is that of the reported splits)."""
    tokens: dict[str, str]
    """The same as text in which equal values are equal (16 and 16.0)."""

    @property
    def data(self) -> str | None:
        """What must be equal for two scores to be comparable."""
        return self.tokens.get("data.fingerprint", self.tokens.get("data"))


def describe(folder: Path, record: dict[str, Any], splits: Sequence[str]) -> Recorded:
    """A run for comparison with others; `splits` are the reported ones, by which data are told apart."""
    choices = {group: record["choices"][group] for group in GROUPS if record["choices"].get(group) is not None}
    keys = choices | {key: value for key, value in flatten(record["config"]) if key not in GROUPS}
    fingerprint, rows = record["data"].get("fingerprint"), record["data"].get("rows")
    if isinstance(fingerprint, dict):
        if "train" in fingerprint:
            keys["data.fingerprint.train"] = fingerprint["train"]
        fingerprint = " ".join(str(fingerprint[split]) for split in splits if split in fingerprint)
    if fingerprint:
        keys["data.fingerprint"] = fingerprint
    if isinstance(rows, dict) and "train" in rows:
        keys["data.rows.train"] = rows["train"]
    return Recorded(folder, record, keys, {key: _text(normalise_numbers(value)) for key, value in keys.items()})


def experiment_of(record: dict[str, Any]) -> str:
    """What is equal for the runs of one experiment, by what was asked for: their seeds may differ."""
    asked = {key: value for key, value in flatten(record["config"]) if key.split(".")[0] not in OUTSIDE_THE_EXPERIMENT}
    return settings_hash([record["choices"], asked])


_text = json.JSONEncoder(sort_keys=True).encode


def all_keys(runs: Sequence[Recorded]) -> list[str]:
    """Choices first, then the config's keys by group, as the records have them."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(keys, key=lambda key: (key not in GROUPS, order.get(key.split(".")[0], len(GROUPS))))


def grouped(runs: Sequence[Recorded], keys: Sequence[str]) -> list[list[Recorded]]:
    groups: dict[tuple[str | None, ...], list[Recorded]] = {}
    for run in runs:
        groups.setdefault(tuple(run.tokens.get(key) for key in keys), []).append(run)
    return list(groups.values())


def newest_of_each_seed(runs: Sequence[Recorded], keys: Sequence[str]) -> list[Recorded]:
    """Of runs that repeat a seed, the newest: a repetition tells nothing about the spread over seeds."""
    newest = []
    for group in grouped(runs, [*keys, "seed"]):
        repeats = group if "seed" in group[0].keys else []
        newest += [max(repeats, key=lambda run: run.record["created"] or "")] if repeats else group
    return newest


def follows(key: str, varying: Sequence[str], runs: Sequence[Recorded]) -> bool:
    """Whether a varying key only follows from another that is shown, so that a column of its own would be noise."""
    group = key.split(".")[0]
    if key in DATA_FOUND:
        givers = [k for k in varying if k.split(".")[0] == "data" and k not in DATA_FOUND]
        return bool(givers) and _is_function_of(key, givers, runs)
    if key == "optimizer.lr" and "adapter" in varying:
        at_default = all(
            run.tokens.get(key) == run.tokens.get("adapter.default_lr", run.tokens.get(key)) for run in runs
        )
        return at_default and _is_function_of(key, ["adapter"], runs)
    if key in GROUPS or group not in varying or not _is_function_of(key, [group], runs):
        return False
    # A hyperparameter that somebody set by hand for one choice is a difference of its own.
    by_hand = {key_of(str(text)) for run in runs for text in run.record["overrides"]}
    return group in ("model", "data") or key not in by_hand


def _is_function_of(key: str, givers: Sequence[str], runs: Sequence[Recorded]) -> bool:
    return all(len({run.tokens.get(key) for run in group}) == 1 for group in grouped(runs, givers))


def check_key(by: str, known: Sequence[str], shown: Sequence[str]) -> None:
    if by not in known:
        hint = nearest(by, known)
        hint = hint if hint.startswith("Did") else f"Varying here: {', '.join(shown) or 'nothing but seeds'}."
        raise UserError("is not a config key of these runs", key="--by", value=by, remedy=hint, code=Code.UNKNOWN_KEY)
