"""Settings and methods: which runs belong to one, which keys distinguish them, and which setting stands for a method.

Runs whose configurations are equal except for the seed are one setting; how they were computed (`COMPUTATION_KEYS`)
may differ too, unless it is what they compare. Settings that differ in nothing but
`TUNED_KEYS` are one method, represented by the setting that is best on the selection split. A key that only follows
from a choice that varies (`model.hub_id` from `model`) distinguishes nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.config.canonical import normalise_numbers
from lora_bench.config.groups import model_name
from lora_bench.config.keys import flatten
from lora_bench.config.recorded_task import main_metric, recorded_form
from lora_bench.errors import Code, UserError, nearest
from lora_bench.records.run_folder import is_prompted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

GROUPS = ("model", "adapter", "prompt", "data", "optimizer", "trainer")
"""Configuration groups, in the order of their columns."""


OUTSIDE_THE_SETTING = ("name", "tags", "notes", "seed", "resume", "dry_run", "metric", "pack", "tracking")
"""Groups and keys that may differ between runs of one setting."""

TUNED_KEYS = (
    *("adapter.rank", "adapter.alpha", "adapter.dropout"),
    *("optimizer.lr", "optimizer.weight_decay", "optimizer.warmup"),
    *("trainer.epochs", "trainer.max_steps", "trainer.batch_size"),
)
"""Hyperparameters that are tuned for each method. Settings that differ in other keys are different methods."""

REQUEST_LIMITS = frozenset(
    f"llm.{name}"
    for name in (
        *("api_key_env", "concurrency", "requests_per_minute", "timeout", "retries"),
        *("max_requests", "max_cost", "input_price", "output_price"),
    )
)
"""Keys of `lora-bench prompt` that limit requests and change no answer: runs that differ in them are one setting."""

COMPUTATION_KEYS = frozenset(
    f"trainer.{name}"
    for name in (
        *("threads", "micro_batch_size", "eval_batch_size"),
        *("checkpoint_every", "quantization_kernels", "cuda_graphs"),
    )
)
"""Keys that change how fast a run is computed, but no FLOPs, and its numbers by rounding alone. They distinguish
settings only where finished runs that are otherwise equal, the seed included, differ in them."""

NAMING_KEYS = ("model", "adapter", "prompt", "llm.model", "predictions")
"""Keys that name a run: a table that holds both trained and prompted runs shows them."""

DATA_KEYS = ("data.fingerprint", "data.fingerprint.train", "data.rows.train")
"""Keys about the loaded data, taken from the record; all other keys are configuration keys."""

IDENTIFYING_KEYS = ("data", "data.task", "data.path", "data.hub_id", "data.hub_config")
"""Keys that name a data set. Other keys of the data that follow from one of them need no column."""


@dataclass(frozen=True)
class RecordedRun:
    """A run's folder and record, with its keys flattened so that runs can be compared."""

    folder: Path
    record: dict[str, Any]
    keys: dict[str, Any]
    """Choices, flat configuration and `DATA_KEYS` (`data.fingerprint` is that of `split`)."""
    tokens: dict[str, str]
    """`keys` with values as text, so that equal values have equal text (16 and 16.0, and paths to the same)."""

    @property
    def data(self) -> str | None:
        """The identity of the data."""
        return self.tokens.get("data.fingerprint", self.tokens.get("data"))

    @property
    def block(self) -> str | None:
        """The identity of data, form of task and main metric, which must be equal for two runs to be compared."""
        task = f"{self.form} {self.main_metric}"
        return self.data if task == "binary mcc" else f"{self.data} {task}"

    @property
    def split(self) -> str:
        """The reported split by which runs are compared."""
        return main_split(self.record)

    @property
    def form(self) -> str:
        """The form of the task: a key of `MAIN_METRIC_CHOICES`."""
        return recorded_form(self.record)

    @property
    def main_metric(self) -> str:
        """The metric that chooses between the settings of a method."""
        return main_metric(self.record)


def reported_splits(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return the splits that were scored once, at the end, the main one first; selection only if there is no other."""
    splits = {key.split("/")[0] for record in records for key in record["metrics"] if "/" in key}
    order = ("validation", "test", *sorted(splits))
    reported = [split for split in dict.fromkeys(order) if split in splits - {"train", "selection"}]
    return reported or [split for split in ("selection",) if split in splits] or ["validation"]


def main_split(record: dict[str, Any]) -> str:
    """Return the reported split by which a run is compared: validation, if the run was scored on it, else test.

    A run without both has another one, or selection.
    """
    return reported_splits([record])[0]


def describe_run(folder: Path, record: dict[str, Any]) -> RecordedRun:
    """Return a run prepared for comparison with others.

    Args:
        folder: the run's folder.
        record: its `run.json`.
    """
    choices = {group: record["choices"][group] for group in GROUPS if record["choices"].get(group) is not None}
    if "model" in choices:
        choices["model"] = model_name(record)
    keys = choices | {key: value for key, value in flatten(record["config"]) if key not in GROUPS}
    fingerprint, rows = record["data"].get("fingerprint"), record["data"].get("rows")
    if isinstance(fingerprint, dict):
        if "train" in fingerprint:
            keys["data.fingerprint.train"] = fingerprint["train"]
        fingerprint = fingerprint.get(main_split(record))
    if fingerprint:
        keys["data.fingerprint"] = fingerprint
    if isinstance(rows, dict) and "train" in rows:
        keys["data.rows.train"] = rows["train"]
    return RecordedRun(folder, record, keys, {key: _encode(normalise_numbers(value)) for key, value in keys.items()})


_encode = json.JSONEncoder(sort_keys=True).encode


def with_shared_paths(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the runs with one path in `tokens` for what is the same, that of the first run which has it.

    Equal fingerprints are the same data, and equal checksums of the weights the same backbone, in whatever folder of
    whatever machine they are.
    """
    paths: dict[tuple[str, ...], str] = {}
    shared = []
    for run in runs:
        weights = run.record["environment"].get("backbone_sha256")
        data = [run.tokens.get(key, "") for key in ("data.fingerprint", "data.fingerprint.train")]
        contents = {"data.path": data if data[0] else [], "model.path": [str(weights)] if weights else []}
        same = {
            key: paths.setdefault((key, *content), run.tokens[key])
            for key, content in contents.items()
            if content and key in run.tokens
        }
        shared.append(replace(run, tokens=run.tokens | same))
    return shared


def mean_selection_score(records: Sequence[dict[str, Any]]) -> float:
    """Return the mean main metric on the selection split over the records of some runs; -inf if one has none."""
    values = [record["metrics"].get(f"selection/{main_metric(record)}") for record in records]
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    return fmean(numbers) if len(numbers) == len(values) else -math.inf


def choose_setting(settings: Sequence[Sequence[RecordedRun]]) -> int | None:
    """Return the number of the setting that stands for a method: the best one on the selection split.

    A setting with fewer than half of the seeds of another one is not chosen, because the mean of few seeds is high by
    chance more often. None if there are several settings and none has scores of the selection split.

    Args:
        settings: the runs of each setting of the method.
    """
    if len(settings) == 1:
        return 0
    scores = [
        mean_selection_score([run.record for run in runs]) if is_candidate else -math.inf
        for runs, is_candidate in zip(settings, have_enough_seeds([len(runs) for runs in settings]), strict=True)
    ]
    best = max(range(len(settings)), key=lambda i: scores[i])
    return best if scores[best] > -math.inf else None


def have_enough_seeds(counts: Sequence[int]) -> list[bool]:
    """Return whether each setting, of so many seeds, has at least half as many as every other one."""
    return [2 * n >= max(counts) for n in counts]


def all_keys(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the keys that any run has: choices first, then configuration keys by group in the records' order."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(keys, key=lambda key: (key not in GROUPS, order.get(key.split(".")[0], len(GROUPS))))


def group_runs(
    runs: Sequence[RecordedRun], keys: Sequence[str], *, comparable: bool = False
) -> list[list[RecordedRun]]:
    """Return the runs in groups with equal values of `keys`, in the order of their first runs.

    Args:
        runs: to group.
        keys: config keys.
        comparable: runs of different blocks (`RecordedRun.block`) are in different groups too.
    """
    groups: dict[tuple[str | None, ...], list[RecordedRun]] = {}
    for run in runs:
        block = run.block if comparable else None
        groups.setdefault((block, *(run.tokens.get(key) for key in keys)), []).append(run)
    return list(groups.values())


def keep_newest_per_seed(runs: Sequence[RecordedRun], keys: Sequence[str]) -> list[RecordedRun]:
    """Return the runs without repetitions: of runs with equal keys and seed only the newest remains.

    A repetition has no information about the spread over seeds. Runs without a seed all remain.
    """
    newest = []
    for group in group_runs(runs, [*keys, "seed"]):
        repeats = group if "seed" in group[0].keys else []
        newest += [max(repeats, key=lambda run: run.record["created"] or "")] if repeats else group
    return newest


def without_keys(run: RecordedRun, keys: Sequence[str]) -> RecordedRun:
    """Return a run without some of its keys."""
    if not keys:
        return run
    remaining = {key: value for key, value in run.keys.items() if key not in keys}
    return replace(run, keys=remaining, tokens={key: run.tokens[key] for key in remaining})


def differs(key: str, runs: Sequence[RecordedRun]) -> bool:
    """Return whether a table of these runs needs a column for a config key.

    Trained runs, prompted runs and runs with predictions from a file have different keys. A key that some of these
    types lack differs only if its values differ within a type. The naming keys differ wherever two types meet.
    """
    values_by_type: dict[tuple[bool, bool], set[str | None]] = {}
    for run in runs:
        type_ = (is_prompted(run.record), "predictions" in run.tokens)
        values_by_type.setdefault(type_, set()).add(run.tokens.get(key))
    if len(values_by_type) > 1 and key in NAMING_KEYS:
        return True
    values = set().union(*values_by_type.values()) - {None}
    return len(values) > 1 or any(len(of_type) > 1 for of_type in values_by_type.values())


def is_implied(key: str, varying: Sequence[str], runs: Sequence[RecordedRun]) -> bool:
    """Return whether a varying key only follows from another one, so that it needs no column.

    Args:
        key: a varying key.
        varying: all keys that vary.
        runs: the runs of the table.
    """
    group = key.split(".")[0]
    if key in DATA_KEYS:
        determining = [k for k in varying if k.split(".")[0] == "data" and k not in DATA_KEYS]
        return bool(determining) and is_function_of(key, determining, runs)
    if group == "data" and key not in GROUPS:
        identifying = [name for name in IDENTIFYING_KEYS if name in varying]
        earlier = identifying[: identifying.index(key)] if key in identifying else identifying
        if any(is_function_of(key, [name], runs) for name in earlier):
            return True
    if key == "optimizer.lr" and "adapter" in varying:
        at_default = all(
            run.tokens.get(key) == run.tokens.get("adapter.default_lr", run.tokens.get(key)) for run in runs
        )
        return at_default and is_function_of(key, ["adapter"], runs)
    if key in GROUPS or group not in varying or not is_function_of(key, [group], runs):
        return False
    # A hyperparameter that somebody set for one choice is a difference in its own right.
    overridden = {str(text).lstrip("+~").split("=")[0] for run in runs for text in run.record["overrides"]}
    return group in ("model", "data") or key not in overridden


def is_function_of(key: str, determining: Sequence[str], runs: Sequence[RecordedRun]) -> bool:
    """Return whether runs with equal values of `determining` have equal values of `key`."""
    return all(len({run.tokens.get(key) for run in group}) == 1 for group in group_runs(runs, determining))


def check_key(option: str, key: str, keys: Sequence[str], varying: Sequence[str]) -> None:
    """Refuse a key that no run has.

    Args:
        option: the option that the key was given to, as `--by`.
        key: the key.
        keys: the keys that runs have.
        varying: the keys that vary between rows, for the message.

    Raises:
        UserError: the key is unknown.
    """
    if key not in keys:
        hint = nearest(key, keys)
        hint = hint if hint.startswith("Did") else f"Varying here: {', '.join(varying) or 'nothing but seeds'}."
        raise UserError("is not a config key of these runs", key=option, value=key, remedy=hint, code=Code.UNKNOWN_KEY)
