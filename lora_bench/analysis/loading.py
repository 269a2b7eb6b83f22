"""The runs below some folders, read for a comparison: finished ones, the others with the reason, and their keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lora_bench.analysis import where
from lora_bench.analysis.settings import (
    COMPUTATION_KEYS,
    OUTSIDE_THE_SETTING,
    REQUEST_LIMITS,
    RecordedRun,
    all_keys,
    describe_run,
    differs,
    group_runs,
    is_function_of,
    keep_newest_per_seed,
    reported_splits,
    with_shared_paths,
    without_keys,
)
from lora_bench.analysis.table import Missing
from lora_bench.errors import Code, UserError
from lora_bench.records import metrics_log
from lora_bench.records.backfill import align_configs
from lora_bench.records.evaluations import add_evaluations
from lora_bench.records.run_folder import METRICS_FILE, find_runs, is_killed, is_prompted
from lora_bench.records.run_names import find_folder
from lora_bench.records.task_folders import split_by_task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class LoadedRuns:
    """The runs below some folders."""

    all: list[RecordedRun]
    """Every run that can be read, finished or not, in the order of their folders."""
    finished: list[RecordedRun]
    """Those that are done."""
    unreadable: list[tuple[Path, str]]
    """Folders that cannot be read, with the reason."""
    hidden: int = 0
    """Number of runs that only chose a setting (`data.report=false`) and are left out, eliminated ones included."""

    @cached_property
    def keys(self) -> list[str]:
        """The keys that distinguish settings."""
        compared = set().union(*(computations for _, computations in self._computations))
        return [key for key in self._all_keys if key not in COMPUTATION_KEYS - compared]

    @cached_property
    def _all_keys(self) -> list[str]:
        """The keys that distinguish settings, with all `COMPUTATION_KEYS`."""
        keys = [key for key in all_keys(self.all) if key.split(".")[0] not in OUTSIDE_THE_SETTING]
        return [key for key in keys if key not in REQUEST_LIMITS]

    @cached_property
    def _computations(self) -> list[tuple[list[RecordedRun], set[str]]]:
        """The finished runs of each setting, with those of `COMPUTATION_KEYS` in which runs of one seed differ."""
        groups = group_runs(self.finished, [key for key in self._all_keys if key not in COMPUTATION_KEYS])
        return [(runs, {key for key in COMPUTATION_KEYS if not is_function_of(key, ["seed"], runs)}) for runs in groups]

    @property
    def splits(self) -> list[str]:
        """The reported splits of the finished runs, validation and test first."""
        return reported_splits(run.record for run in self.finished)

    def newest(self, by_keys: Sequence[str] = ()) -> list[RecordedRun]:
        """Return the finished runs without repetitions of a setting and seed.

        The runs of a setting have no value of a computation key that it does not compare, if its values differ.

        Args:
            by_keys: keys that distinguish rows beside those of a setting, such as `name`.
        """
        mixed_keys = {
            run.folder: [key for key in COMPUTATION_KEYS - compared - {*by_keys} if differs(key, runs)]
            for runs, compared in self._computations
            for run in runs
        }
        runs = [without_keys(run, mixed_keys[run.folder]) for run in self.finished]
        return keep_newest_per_seed(runs, [*self.keys, *by_keys])

    @property
    def missing(self) -> list[Missing]:
        """The runs that are not done and the folders that cannot be read."""
        missing = [_unfinished(run) for run in self.all if run.record["status"] != "done"]
        return missing + [Missing("skipped", folder, reason) for folder, reason in self.unreadable]

    def filtered(self, expression: str) -> LoadedRuns:
        """Return the runs whose keys meet the conditions of `--where`.

        Raises:
            UserError: the expression is malformed, names an unknown key, or no run meets it.
        """
        keys = all_keys(self.all)
        matches = where.parse(expression, keys, [key for key in self.keys if differs(key, self.all)])
        remaining = [run for run in self.all if matches(run.keys)]
        if not remaining:
            raise UserError(
                f"matches none of {len(self.all):,} runs",
                key=where.OPTION,
                value=expression,
                remedy="`lora-bench compare DIR` without it lists the runs with their keys.",
                code=Code.NOT_FOUND,
            )
        return replace(self, all=remaining, finished=[run for run in self.finished if matches(run.keys)])


def load_runs(paths: Sequence[Path]) -> LoadedRuns:
    """Read the runs at or below `paths`.

    Args:
        paths: run folders, sweeps, folders above, or names and ids of runs.

    Raises:
        UserError: a path does not exist, or there are no runs.
    """
    recorded, skipped = find_runs([find_folder(path, "compare") for path in paths])
    recorded, unread_tasks = split_by_task(recorded)
    recorded = add_evaluations(align_configs(recorded))
    if not recorded:
        skipped_note = f"; skipped {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        remedy = "Give the folder of a run or one above it; `lora-bench train` makes runs below outputs/."
        raise UserError(
            f"no runs here{skipped_note}", file=", ".join(map(str, paths)), remedy=remedy, code=Code.NOT_FOUND
        )
    runs = with_shared_paths([describe_run(folder, record) for folder, record in recorded])
    finished = [run for run in runs if run.record["status"] == "done"]
    # A run that only chose a setting is no rival of runs that were trained with it.
    reporting = [run for run in finished if run.keys.get("data.report") is not False]
    ended = [run for run in runs if run.record["status"] in ("done", "eliminated")]
    hidden = {run.folder for run in ended if run.keys.get("data.report") is False} if reporting else set()
    if hidden:
        runs, finished = [run for run in runs if run.folder not in hidden], reporting
    return LoadedRuns(runs, finished, [*skipped, *unread_tasks], len(hidden))


def _unfinished(run: RecordedRun) -> Missing:
    """Return the entry of a run that is not done, with its error or its last evaluation."""
    record = run.record
    killed = is_killed(run.folder, record)
    status, overrides = "killed" if killed else record["status"], " ".join(map(str, record["overrides"]))
    if record["status"] != "running":
        reason = record["error"] or "no reason recorded"
        return Missing(status, run.folder, reason if len(reason) <= 300 else reason[:299] + "…", overrides)
    reason = f"since {(record['created'] or '?')[:16].replace('T', ' ')} UTC"
    if last := metrics_log.last_value(run.folder / METRICS_FILE, run.main_metric):
        value, line = last
        reason += f", step {line.get('step')}, {line.get('split')} {run.main_metric} {value:.4f}"
    remedy = "run the same command again" if is_prompted(record) else f"resume it with resume={run.folder}"
    return Missing(status, run.folder, f"{reason}; its process has ended: {remedy}" if killed else reason, overrides)
