"""Runs by name, by id, or as the newest one, in place of their folders: `run=baseline`, `run=b49726`, `run=last`.

The name is that of the config; runs may share one. The id is six hexadecimal digits, which follow from the record and
the folder's name and are not stored. Runs are looked for below `outputs/` in the current folder; a run elsewhere is
given as its folder. Where a folder has the given name, it is taken.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.config.keys import as_typed
from lora_bench.config.schema import LAST, RUN_NAME
from lora_bench.errors import Code, UserError, require
from lora_bench.records import sweep_folder
from lora_bench.records.stored_run import stored_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from lora_bench.records.stored_run import StoredRun

TOP = Path("outputs")
"""The folder below which runs are looked for."""
MAX_CANDIDATES = 8
"""Maximum number of runs that a message lists."""


def find_run(reference: str | Path, key: str, *, finished: bool = False) -> Path:
    """Return the folder of the run that a reference names.

    Args:
        reference: a folder, which is returned whether it holds a run or not; or `last`, a name, or the first digits of
            an id, which are looked for below `TOP`.
        key: the option that it was given to, for messages.
        finished: `last` and a name mean the newest run that is done and left a model, if there is one.

    Raises:
        UserError: it is empty, no run has this name or id, or several have an id with these first digits.
    """
    if _is_folder(text := _without_key(reference, key)):
        return Path(text)
    return choose_run(text, _runs_below_top(), key, finished=finished).folder


def resolve_run(cfg: DictConfig) -> Path:
    """Set the key `run` of a command to the folder of the run that it names, and return the folder; as `find_run`."""
    from hydra.core.hydra_config import HydraConfig

    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    cfg.run = str(find_run(as_typed(cfg.run, "run", overrides), "run", finished=True))
    return Path(cfg.run)


def find_folder(reference: str | Path, key: str) -> Path:
    """Return the folder that a reference names, as `find_run` does, but that of a whole sweep for its name.

    A run's name is that of its sweep if the sweep was started with it. `last` is the newest sweep or run outside of a
    sweep, and an id always names one run.
    """
    if _is_folder(text := _without_key(reference, key)):
        return Path(text)
    runs = _runs_below_top()
    named = runs if text == LAST else [run for run in runs if run.name == text]
    sweep = sweep_of(named[-1].folder) if named else None
    if sweep is not None and (text == LAST or f"name={text}" in _overrides(sweep)):
        return sweep
    return choose_run(text, runs, key).folder


def choose_run(reference: str, runs: Sequence[StoredRun], key: str, *, finished: bool = False) -> StoredRun:
    """Return the newest run that a reference stands for; a note is printed if several have the name.

    Args:
        reference: no folder.
        runs: the newest last.
        key: of the option.
        finished: prefer runs that are done and left a model.

    Raises:
        UserError: as `find_run`.
    """
    matches = match_runs(reference, runs)
    if not matches:
        raise _unknown(reference, key, runs)
    if len(matches) > 1 and reference != LAST and matches[-1].name != reference:
        raise _ambiguous(reference, key, matches)
    usable = [run for run in matches if run.is_usable] if finished else []
    newest = (usable or matches)[-1]
    if len(matches) > 1 and reference != LAST:
        from lora_bench.console.text import note  # rich: late

        which = "newest finished" if usable else "newest"
        note(f"{len(matches)} runs are called {reference}; taking the {which} one, {newest.folder}")
    return newest


def match_runs(reference: str, runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Return the runs that a name, the first digits of an id, or `last` stand for, in their order.

    Args:
        reference: as a name it comes before an id.
        runs: any.
    """
    if reference == LAST:
        return list(runs)
    named = [run for run in runs if run.name == reference]
    return named or [run for run in runs if run.id.startswith(reference.lower())]


def sweep_of(run: Path) -> Path | None:
    """Return the folder of the sweep that a run's folder belongs to; None for a single run."""
    return next((above for above in run.parents if sweep_folder.is_sweep(above)), None)


def _without_key(reference: str | Path, key: str) -> str:
    """Return a reference without `run=`, which other commands need, unless a file has the whole name.

    Raises:
        UserError: it is empty, which would be the current folder.
    """
    text = str(reference)
    text = text if Path(text).exists() else text.removeprefix("run=")
    require(bool(text), key, "''", "is empty", "Give the folder, the name or the id of a run.")
    return text


def _is_folder(reference: str) -> bool:
    """Return whether a reference is a path: it has the form of no name, or a folder has it; `last` never is."""
    is_name = RUN_NAME.fullmatch(reference) is not None and Path(reference) != TOP
    return reference != LAST and (not is_name or Path(reference).is_dir())


def _runs_below_top() -> list[StoredRun]:
    """Return the runs below `TOP`, the newest last; none without that folder."""
    return stored_runs([TOP])[0] if TOP.is_dir() else []


def _unknown(reference: str, key: str, runs: Sequence[StoredRun]) -> UserError:
    """Return the error for a reference that no run has, with the nearest names and ids."""
    if not runs:
        reason = f"there is no run below {TOP}"
        reason = reason if reference == LAST else f"there is no such folder, and {reason}"
        remedy = "Give the folder of a run."
        return UserError(reason, key=key, value=reference, remedy=remedy, code=Code.NOT_FOUND)
    words = {word for run in runs for word in (run.name, run.id) if word}
    close = get_close_matches(reference, sorted(words), n=3, cutoff=0.6)
    nearest = f"Did you mean {' or '.join(close)}? " if close else ""
    return UserError(
        f"there is no such folder, and no run of this name or id below {TOP}",
        key=key,
        value=reference,
        remedy=f"{nearest}`lora-bench ls` lists the runs.",
        code=Code.NOT_FOUND,
    )


def _ambiguous(reference: str, key: str, matches: Sequence[StoredRun]) -> UserError:
    """Return the error for the first digits of several ids, with these runs."""
    listed = "; ".join(run.label for run in matches[-MAX_CANDIDATES:])
    rest = f"; and {len(matches) - MAX_CANDIDATES} more" if len(matches) > MAX_CANDIDATES else ""
    return UserError(
        f"the ids of {len(matches)} runs begin with these digits",
        key=key,
        value=reference,
        remedy=f"Give more digits, or a folder: {listed}{rest}.",
        code=Code.AMBIGUOUS,
    )


def _overrides(sweep: Path) -> list[str]:
    """Return the overrides that a sweep was started with; none if its record cannot be read."""
    try:
        return sweep_folder.read(sweep).overrides
    except UserError:
        return []
