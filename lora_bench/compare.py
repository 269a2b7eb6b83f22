"""`lora-bench compare`: the runs below some folders as one table, best first.

Runs whose configs are equal but for the seed are one row: mean, standard deviation and n over the seeds. The first
columns are what varies between rows, named as in the config: a header pasted into the shell is a valid override.
What only follows from a choice that varies (`model.hub_id` from `model`) is left out. Runs on different data are never
averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_bench import prompted
from lora_bench.errors import UserError, nearest
from lora_bench.record import find, is_killed, last_logged
from lora_bench.tables import Column, Row, Stat, Table, clean, render, to_csv, to_json, to_latex, to_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

GROUPS = ("model", "adapter", "prompt", "data", "optimizer", "trainer")
# What may differ between runs of one experiment: they still belong to one row.
OUTSIDE_THE_EXPERIMENT = ("seed", "resume", "dry_run", "metric", "pack", "tracking")
# What the data turned out to be, from the record; the rest are config keys.
DATA_FOUND = ("data.fingerprint", "data.fingerprint.train", "data.rows.train")
# The main metrics always have columns, and so does what the config adds; the other standard ones stay in run.json.
MAIN_METRICS = ("accuracy", "f1", "mcc")
OTHER_METRICS = ("precision", "recall", "auroc", "nll", "ece", "brier")
COSTS = {
    "params.adapter": "count",
    "params.head": "count",
    "cost.train_seconds": "seconds",
    "cost.train_flops": "flops",
    "cost.peak_memory_bytes": "bytes",
}
# A narrow terminal loses the first of these first.
KEEP = ("cost.peak_memory_bytes", "cost.train_flops", "params.head", "cost.train_seconds", "params.adapter")
FORMATS = {"csv": to_csv, "md": to_markdown, "latex": to_latex, "json": to_json}


@dataclass(frozen=True)
class _Run:
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


def main(arguments: list[str]) -> int:
    """The command: prints the table, and returns 0 also when runs have failed.

    Raises:
        UserError: an unknown argument, folder or key, or no runs.
    """
    options = _parser().parse_args(arguments)
    table = summarise([Path(folder) for folder in options.folders or ["outputs"]], by=options.by)
    if options.format == "table":
        from rich.console import Console

        render(table, Console(highlight=False))
        return 0
    print(FORMATS[options.format](table), end="")
    if options.format in ("csv", "json"):
        for line in table.below:
            print(clean(line), file=sys.stderr)
    return 0


def write_tables(folder: Path) -> None:
    """Leave `table.md` and `table.csv` of the runs below `folder`, a finished sweep, in it; nothing if it has none."""
    if find([folder])[0]:
        table = summarise([folder])
        (folder / "table.md").write_text(to_markdown(table), encoding="utf-8")
        (folder / "table.csv").write_text(to_csv(table), encoding="utf-8")


def summarise(paths: Sequence[Path], by: str | None = None) -> Table:
    """The runs at or below `paths` as a table: a row per experiment, or per value of the config key `by`.

    Raises:
        UserError: a path that is not there, no runs, or an unknown key.
    """
    found, skipped = find(paths)
    if not found:
        why = f"; skipped {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        remedy = "Give the folder of a run or one above it; `lora-bench train` makes runs below outputs/."
        raise UserError(f"no runs here{why}", file=", ".join(map(str, paths)), remedy=remedy)
    splits = _reported_splits(record for _, record in found if record["status"] == "done")
    everything = [_describe(folder, record, splits) for folder, record in found]
    finished = [run for run in everything if run.record["status"] == "done"]
    keys = [key for key in _all_keys(everything) if key.split(".")[0] not in OUTSIDE_THE_EXPERIMENT]
    keys = [key for key in keys if key not in prompted.OUTSIDE_THE_EXPERIMENT]
    runs = _newest_of_each_seed(finished, keys)
    described = [(run.record, run.tokens) for run in runs]
    varying = [key for key in keys if prompted.differs(key, described)]
    shown = [key for key in varying if not _follows(key, varying, runs)]
    if by is None:
        groups, shown = _grouped(runs, keys), shown or [key for key in ("model", "adapter", "data") if key in keys]
    else:
        _check_key(by, _all_keys(everything), shown)
        # Whatever the key, runs on different data are different rows.
        shown = [by, *(key for key in shown if key != by and key.split(".")[0] == "data")]
        groups = _grouped(runs, shown)
    metrics = _metric_columns(runs, splits)
    costs = {name: Column(name, kind, keep=KEEP.index(name)) for name, kind in COSTS.items()}
    rows = _ordered([(_row(group, shown, metrics | costs), group[0].data) for group in groups], [*metrics.values()])
    below = _caveats(rows, runs, len(finished) - len(runs), splits)
    below += [_unfinished(run) for run in everything if run.record["status"] != "done"]
    below += [f"skipped: {folder}: {reason}" for folder, reason in skipped]
    columns = [*(Column(key, "key") for key in shown), *metrics.values(), *costs.values()]
    return Table(columns, rows, below)


# -- which runs belong together, and what tells them apart --


def _describe(folder: Path, record: dict[str, Any], splits: Sequence[str]) -> _Run:
    choices = {group: record["choices"][group] for group in GROUPS if record["choices"].get(group) is not None}
    keys = choices | {key: value for key, value in _flat(record["config"]) if key not in GROUPS}
    fingerprint, rows = record["data"].get("fingerprint"), record["data"].get("rows")
    if isinstance(fingerprint, dict):
        if "train" in fingerprint:
            keys["data.fingerprint.train"] = fingerprint["train"]
        fingerprint = " ".join(str(fingerprint[split]) for split in splits if split in fingerprint)
    if fingerprint:
        keys["data.fingerprint"] = fingerprint
    if isinstance(rows, dict) and "train" in rows:
        keys["data.rows.train"] = rows["train"]
    return _Run(folder, record, keys, {key: json.dumps(_level(value), sort_keys=True) for key, value in keys.items()})


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _level(value: Any) -> Any:
    """`value` with 16.0 as 16, since `adapter.alpha=16` is what the YAML calls 16.0."""
    if isinstance(value, list):
        return [_level(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_keys(runs: Sequence[_Run]) -> list[str]:
    """Choices first, then the config's keys by group, as the records have them."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(keys, key=lambda key: (key not in GROUPS, order.get(key.split(".")[0], len(GROUPS))))


def _grouped(runs: Sequence[_Run], keys: Sequence[str]) -> list[list[_Run]]:
    groups: dict[tuple[str | None, ...], list[_Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.tokens.get(key) for key in keys), []).append(run)
    return list(groups.values())


def _newest_of_each_seed(runs: Sequence[_Run], keys: Sequence[str]) -> list[_Run]:
    """Of runs that repeat a seed, the newest: a repetition tells nothing about the spread over seeds."""
    newest = []
    for group in _grouped(runs, [*keys, "seed"]):
        repeats = group if "seed" in group[0].keys else []
        newest += [max(repeats, key=lambda run: run.record["created"] or "")] if repeats else group
    return newest


def _follows(key: str, varying: Sequence[str], runs: Sequence[_Run]) -> bool:
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
    by_hand = {str(text).lstrip("+~").split("=")[0] for run in runs for text in run.record["overrides"]}
    return group in ("model", "data") or key not in by_hand


def _is_function_of(key: str, givers: Sequence[str], runs: Sequence[_Run]) -> bool:
    return all(len({run.tokens.get(key) for run in group}) == 1 for group in _grouped(runs, givers))


def _check_key(by: str, known: Sequence[str], shown: Sequence[str]) -> None:
    if by not in known:
        hint = nearest(by, known)
        hint = hint if hint.startswith("Did") else f"Varying here: {', '.join(shown) or 'nothing but seeds'}."
        raise UserError("is not a config key of these runs", key="--by", value=by, remedy=hint)


# -- numbers --


def _reported_splits(records: Iterable[dict[str, Any]]) -> list[str]:
    """The splits scored once, at the end; what was chosen or trained on is reported only where nothing else is."""
    splits = {key.split("/")[0] for record in records for key in record["metrics"] if "/" in key}
    order = ("validation", "test", *sorted(splits))
    reported = [split for split in dict.fromkeys(order) if split in splits - {"train", "selection"}]
    return reported or [split for split in ("selection",) if split in splits] or ["validation"]


def _metric_columns(runs: Sequence[_Run], splits: Sequence[str]) -> dict[str, Column]:
    """A column for each `split/metric` of run.json; the split is in its header where there is any doubt."""
    columns = {}
    found = sorted({key for run in runs for key in run.record["metrics"]})
    for i, split in enumerate(splits):
        extra = [key.removeprefix(f"{split}/") for key in found if key.startswith(f"{split}/")]
        extra = [name for name in extra if name not in MAIN_METRICS + OTHER_METRICS]
        for name in [*MAIN_METRICS, *extra]:
            header = f"{split}/{name}" if len(splits) > 1 or split == "selection" else name
            rank = MAIN_METRICS.index(name) if name in MAIN_METRICS else -1
            directions = {run.keys.get(f"metric.{name}.direction") for run in runs}
            arrow = "↑" if rank >= 0 or "up" in directions else "↓" if "down" in directions else ""
            columns[f"{split}/{name}"] = Column(header, "metric", arrow, keep=len(KEEP) + 9 * (len(splits) - i) + rank)
    return columns


def _row(group: Sequence[_Run], shown: Sequence[str], columns: dict[str, Column]) -> Row:
    stats = {}
    for source, column in columns.items():
        section, _, name = source.partition(".")
        path = ("metrics", source) if column.kind == "metric" else (section, name)
        stat = _stat([run.record[path[0]].get(path[1]) for run in group])
        if stat is not None:
            stats[column.name] = stat
    keys = {key: _short(group[0].keys[key]) for key in shown if key in group[0].keys}
    return Row(keys, stats, len(group), [run.folder for run in group])


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else value


def _stat(values: Sequence[Any]) -> Stat | None:
    try:
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        mean = statistics.fmean(numbers)
    except (OverflowError, statistics.StatisticsError):  # absurd, or none
        return None
    n = len(numbers)
    std = math.hypot(*(number - mean for number in numbers)) / math.sqrt(n - 1) if n > 1 else None
    return Stat(mean, std, n) if std is None or math.isfinite(std) else None


def _ordered(rows: Sequence[tuple[Row, str | None]], metrics: Sequence[Column]) -> list[Row]:
    """Rows on the same data together, best MCC first, with the best of each metric among them marked."""

    def mcc(row: Row) -> float:
        return next(
            (row.stats[c.name].mean for c in metrics if c.name.endswith("mcc") and c.name in row.stats), -math.inf
        )

    blocks: dict[str | None, list[Row]] = {}
    for row, data in sorted(rows, key=lambda item: -mcc(item[0])):
        blocks.setdefault(data, []).append(row)
    ordered = []
    for block in blocks.values():
        tops: dict[str, float] = {}
        for column in metrics:
            means = [row.stats[column.name].mean for row in block if column.name in row.stats]
            if len(means) > 1 and column.arrow:
                tops[column.name] = max(means) if column.arrow == "↑" else min(means)
        for row in block:
            best = {name for name, top in tops.items() if name in row.stats and row.stats[name].mean == top}
            ordered.append(replace(row, best=frozenset(best)))
    return ordered


# -- what has to be said below --


def _caveats(rows: Sequence[Row], runs: Sequence[_Run], repeated: int, splits: Sequence[str]) -> list[str]:
    lines = []
    if not rows:
        lines.append("no finished run yet")
    if rows and all(row.n == 1 for row in rows):
        lines.append("one seed only: no spread")
    if rows and splits not in (["validation"], ["selection"]) and len(splits) == 1:
        lines.append(f"metrics of the {splits[0]} split")
    if len({run.data for run in runs}) > 1:
        lines.append("runs on different data are not comparable: the best values are marked for each data set")
    if repeated:
        lines.append(f"{repeated} finished run(s) repeat an experiment and its seed; the newest counts")
    dirty = [str(run.folder) for run in runs if run.record["environment"].get("dirty") is True]
    if dirty:
        more = f" and {len(dirty) - 3} more" if len(dirty) > 3 else ""
        lines.append(
            f"uncommitted changes in the code of {len(dirty)} of {len(runs)} runs: {', '.join(dirty[:3])}{more}"
        )
    return lines


def _unfinished(run: _Run) -> str:
    record = run.record
    asked = " ".join(map(str, record["overrides"]))
    killed = is_killed(run.folder, record)
    line = f"{'killed' if killed else record['status']}: {run.folder}" + (f" ({asked})" if asked else "")
    if record["status"] == "running":
        line += f": since {(record['created'] or '?')[:16].replace('T', ' ')} UTC"
        logged = last_logged(run.folder) or {}
        metrics = logged.get("metrics")
        mcc = metrics.get("mcc") if isinstance(metrics, dict) else None
        if isinstance(mcc, float):
            line += f", step {logged.get('step')}, {logged.get('split')} mcc {mcc:.4f}"
        again = "the same command again asks only for the rest"
        goes_on = again if prompted.is_prompted(record) else "resume= goes on with it"
        return f"{line}; its process is gone, {goes_on}" if killed else line
    reason = record["error"] or "no reason recorded"
    return f"{line}: {reason if len(reason) <= 300 else reason[:299] + '…'}"


# -- arguments --


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, key="compare", remedy="`lora-bench compare --help` lists what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lora-bench compare",
        description="One table of all runs at or below the folders, best first: a row per experiment, mean ± sample "
        "standard deviation over its seeds. Runs that are not done, and folders that cannot be read, are listed below.",
        epilog="Column headers are config keys: what the column adapter.rank shows is given as adapter.rank=8.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="*", metavar="DIR", help="run folders, sweeps, or folders above (default: outputs)"
    )
    parser.add_argument(
        "--by", metavar="KEY", help="a row per value of this config key: --by adapter, --by adapter.rank"
    )
    parser.add_argument(
        "--format",
        choices=["table", *FORMATS],
        default="table",
        help="table (default) for people; csv and json with raw numbers; md and latex to paste",
    )
    return parser
