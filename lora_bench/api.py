"""The Python interface: train a run, run a sweep or a search, and compare finished runs as a pandas DataFrame.

    from lora_bench.api import compare, search, sweep, train

    run = train(model="minilm", data="qqp", adapter={"rank": 8})
    folders = sweep("seed=range(5)", model="minilm", data="qqp", adapter=["lora", "dora"])
    compare(folders)
    result = search("optimizer.lr=tag(log,interval(1e-4,1e-2))", model="minilm", data="qqp", search={"trials": 24})
    result.best, result.final[0].metrics

Each function does what the command of its name does, with the same settings, messages and run folders. A request that
cannot be met raises `UserError`; nothing here ends the process. `lora_bench.load(folder)` loads a finished run for
prediction. A script that sweeps with `pack.workers` or on several GPUs needs `if __name__ == "__main__":`, because
worker processes import it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.formats import to_json
from lora_bench.analysis.significance import MARGIN
from lora_bench.analysis.summary import View, summarise
from lora_bench.cli import SEARCH, run_command
from lora_bench.config.compose import register_with_hydra
from lora_bench.config.groups import conf_folder
from lora_bench.config.keys import key_of
from lora_bench.config.overrides import parse_override
from lora_bench.console.redaction import remember
from lora_bench.errors import Code, UserError, quoted
from lora_bench.records import run_folder, sweep_folder
from lora_bench.records.resume import resolve_folder
from lora_bench.run.callbacks import ActiveRun, Callback, calling
from lora_bench.run.trained_run import TrainedRun
from lora_bench.sweeps.search_trials import FINAL, REPEATS, TRIALS, of_stage, setting_of

if TYPE_CHECKING:
    import pandas

__all__ = ["ActiveRun", "Callback", "SearchResult", "TrainedRun", "compare", "search", "sweep", "train"]


@dataclass(frozen=True)
class SearchResult:
    """A finished search: the best setting on the selection split, and the runs that trained it again."""

    folder: Path
    """Of the sweep; the trials are below `trials/`, their repeats below `repeats/`, the final runs below `final/`."""
    best: dict[str, Any]
    """The searched keys of the best setting with their values: `{"adapter": "dora", "optimizer.lr": 0.0012}`."""
    final: list[TrainedRun]
    """The best setting with fresh seeds, scored on the reported splits."""
    trials: list[TrainedRun]
    """The trials in their order; an eliminated one has no metrics."""
    repeats: list[TrainedRun]
    """The best trials with another seed; empty with `search.repeats=0`."""


def train(
    *overrides: str,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    config_dir: str | Path | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> TrainedRun:
    """Train, evaluate and record one run, as `lora-bench train` does.

    Args:
        overrides: settings as on the command line: `"adapter.rank=8"`.
        folder: the new run's folder; None: a new one below `outputs/`.
        resume: the interrupted run to resume: its folder, name or id; a run that is done is returned as it is.
        config_dir: a folder with further choices of the configuration groups.
        quiet: print nothing.
        callbacks: objects whose hooks are called while the run trains.
        settings: settings by key: `seed=1`, `adapter="dora"`, `adapter={"rank": 8}`, `**{"adapter.rank": 8}`.

    Raises:
        UserError: the request cannot be met; no folder is left behind. A `RunFailedError`: the run had started.
        DivergedError: the loss ceased to be finite; the record says so.
        Exception: of a callback, with status `interrupted` in the record; or another error, with status `failed` if the
            run had started.
    """
    arguments = [*overrides, *_overrides(settings)]
    for override in arguments:
        if key_of(override) in ("sweep", "hydra.mode", "dry_run"):
            remedy = "Run `lora-bench train` in a shell."
            if key_of(override) != "dry_run":
                remedy = "Call lora_bench.api.sweep, or run `lora-bench train` in a shell."
            raise UserError("does not train one run", key=key_of(override), remedy=remedy, code=Code.UNSUPPORTED)
    folder = _train(arguments, "run", folder, resume, config_dir, quiet, callbacks)
    return TrainedRun(folder, run_folder.read(folder))


def sweep(
    *overrides: str,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    config_dir: str | Path | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> list[Path]:
    """Train every combination of the values given, as `lora-bench train -m` does, and return the runs' folders.

    They are in the order of the jobs, eliminated runs included.

    Args:
        overrides: settings as on the command line: `"seed=range(5)"`, `"sweep=rank"`.
        folder: the new sweep's folder; None: a new one below `outputs/sweeps/`.
        resume: the folder or name of a sweep, of which the unfinished runs are trained.
        config_dir: a folder with further choices of the configuration groups.
        quiet: print nothing.
        callbacks: objects whose hooks are called while each run trains.
        settings: settings by key, as for `train`; a list holds the values to try: `adapter={"rank": [2, 4, 8]}`.

    Raises:
        UserError: the request cannot be met; no folder is left behind.
        SweepFailedError: some runs failed; the other ones are recorded, and `resume` trains the rest.
        Exception: of a callback; `resume` trains the rest.
    """
    arguments = [*overrides, *_overrides(settings, swept=True)]
    if any(key_of(override) == "dry_run" for override in arguments):
        remedy = "Run `lora-bench train -m` in a shell."
        raise UserError("trains nothing", key="dry_run", remedy=remedy, code=Code.UNSUPPORTED)
    folder = _train(["-m", *arguments], "sweep", folder, resume, config_dir, quiet, callbacks)
    return [folder / name for name in sweep_folder.read(folder).jobs]


def search(
    *overrides: str,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    config_dir: str | Path | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> SearchResult:
    """Search the best setting within a budget, as `lora-bench search` does, and train it with fresh seeds.

    Args:
        overrides: settings as on the command line, intervals among them: `"adapter.dropout=interval(0,0.3)"`.
        folder: the new search's folder; None: a new one below `outputs/sweeps/`.
        resume: the folder of a search to resume; one that is finished is read.
        config_dir: a folder with further choices of the configuration groups.
        quiet: print nothing.
        callbacks: objects whose hooks are called while each trial and final run trains.
        settings: settings by key, as for `sweep`; a list holds choices, `search={"trials": 24}` is the budget.

    Raises:
        UserError: the request cannot be met, or Optuna is not installed; no folder is left behind. A
            `RunFailedError`: every trial diverged.
        SweepFailedError: some runs failed; `resume` trains the rest.
        Exception: of a callback; `resume` continues the search.
    """
    arguments = [*overrides, *_overrides(settings, swept=True)]
    for override in arguments:
        if key_of(override) in ("dry_run", "sweep"):
            remedy = "Run `lora-bench search` in a shell." if key_of(override) == "dry_run" else "Call sweep."
            raise UserError("does not search", key=key_of(override), remedy=remedy, code=Code.UNSUPPORTED)
    folder = _train([SEARCH, *arguments], "sweep", folder, resume, config_dir, quiet, callbacks)
    jobs = sweep_folder.read(folder).jobs
    trials, repeats, final = (of_stage(jobs, stage) for stage in (TRIALS, REPEATS, FINAL))
    searched = {key_of(text) for job in trials.values() for text in setting_of(job)}
    best = {
        key_of(text): parse_override(text).value() for text in next(iter(final.values())) if key_of(text) in searched
    }
    runs = {name: TrainedRun(folder / name, run_folder.read(folder / name)) for name in jobs}
    return SearchResult(
        folder, best, [runs[name] for name in final], [runs[name] for name in trials], [runs[name] for name in repeats]
    )


def compare(
    folders: str | Path | Sequence[str | Path] = "outputs",
    *,
    by: str | None = None,
    baseline: str | Path | None = None,
    margin: float = MARGIN,
    measure: str | None = None,
    target: float | None = None,
    where: str | None = None,
    all_settings: bool = False,
) -> pandas.DataFrame:
    """Return the finished runs at or below some folders: the rows of `lora-bench compare --format json`.

    A row is a method with its setting that is best on the selection split: mean, standard deviation (`<metric>_std`)
    and n over its seeds, the paired test against the baseline (`tests.verdict`, `tests.p_holm` and others), and the
    `savings.<cause>`. The row to use is `recommended`, and the first one
    of its data. Seconds, bytes and FLOPs are plain numbers. What `compare` prints below its table is in
    `frame.attrs["notes"]` and `frame.attrs["advice"]`, two lists of sentences.

    Args:
        folders: run folders, sweeps, folders above them, or names and ids of runs.
        by: configuration keys, separated by commas: one row for each combination of their values.
        baseline: the row that the other ones are tested against: `full`, `adapter=lora,adapter.rank=8`, or a folder.
        margin: a difference up to this counts as equivalent.
        measure: the metric that is tested; None: the main metric of the runs.
        target: count steps and FLOPs up to this main metric on the selection split.
        where: conditions on configuration keys: `"adapter=lora and adapter.rank<=16"`.
        all_settings: also return the settings that are not the best of their method; `chosen` says which are.

    Raises:
        UserError: a folder, key, condition or baseline is not there, the folders hold no runs, or pandas is not
            installed.
    """
    try:
        import pandas
    except ImportError:
        remedy = "Install it: pip install pandas."
        raise UserError("needs the package pandas", key="compare", remedy=remedy, code=Code.MISSING_PACKAGE) from None
    paths = [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
    named = None if baseline is None else str(baseline)
    table = summarise(paths, by, named, margin, measure, target, where, View(all_settings=all_settings))
    frame = pandas.DataFrame(json.loads(to_json(table)))
    frame.attrs |= {"notes": table.footnotes, "advice": table.advice}
    return frame


def _overrides(settings: Mapping[str, Any], *, swept: bool = False, prefix: str = "") -> Iterator[str]:
    """Yield the settings as overrides: `{"adapter": {"rank": 8}}` as `adapter.rank=8`.

    Args:
        settings: by key, nested or dotted; an empty mapping gives no override.
        swept: a list or range holds values of a sweep (`rank=2,4`), otherwise it is one value (`rank=[2,4]`).
        prefix: of the keys, with its dot.
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, swept=swept, prefix=f"{prefix}{key}.")
        elif swept and isinstance(value, list | tuple | range):
            yield f"{prefix}{key}={','.join(map(_text, value))}"
        else:
            yield f"{prefix}{key}={_text(value)}"


def _text(value: Any) -> str:
    """Return a value as it is typed in an override: None as `null`, a list as `[1,2]`, a text in quotation marks.

    A text that is a plain word or path is not quoted, unless it would be read as another type, as `null` would.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple | range):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, str | Path):
        is_word = re.fullmatch(r"[A-Za-z_][\w/-]*", str(value), re.ASCII)
        is_literal = str(value).lower() in ("null", "true", "false", "nan", "inf")
        return str(value) if is_word and not is_literal else quoted(value)
    return str(value)


def _train(
    arguments: list[str],
    mode: str,
    folder: str | Path | None,
    resume: str | Path | None,
    config_dir: str | Path | None,
    quiet: bool,
    callbacks: Sequence[Callback],
) -> Path:
    """Run `lora-bench train` in this process, and return the folder of its run or sweep, as it was given.

    Args:
        arguments: of the command; `-m` is the only option.
        mode: `run` or `sweep`.
        folder: of a new run or sweep.
        resume: the folder to resume.
        config_dir: a folder with further choices of the groups.
        quiet: discard standard output, except what callbacks print; notes on standard error stay.
        callbacks: are called while runs train.

    Raises:
        UserError: `folder` and `resume` are both given, an argument is another option or sets one of the folders, or as
            the command raises it.
    """
    if folder is not None and resume is not None:
        remedy = "A run is resumed in its own folder."
        raise UserError("excludes resume", key="folder", value=folder, remedy=remedy, code=Code.CONFLICT)
    parameters = {"hydra.run.dir": "folder", "hydra.sweep.dir": "folder", "resume": "resume"}
    for override in arguments:
        if parameter := parameters.get(key_of(override)):
            remedy = f"Give {parameter}=DIR as an argument of the function."
            raise UserError("is not an override here", key=key_of(override), remedy=remedy, code=Code.CONFLICT)
        if override.startswith("-") and override != "-m":
            remedy = "Each override is key=value or group=choice."
            raise UserError(f"{override!r} is an option", remedy=remedy, code=Code.INVALID_SYNTAX)
    path = Path(folder or _new_folder(mode)) if resume is None else resolve_folder(str(resume))
    key = "resume" if resume is not None else f"hydra.{mode}.dir"
    options = [] if config_dir is None else ["--config-dir", str(config_dir)]
    remember(arguments)
    with (
        calling(callbacks, sys.stdout if quiet else None),
        _unchanged_process(),
        open(os.devnull, "w") as null,
        redirect_stdout(null) if quiet else nullcontext(),
    ):
        run_command(["train", *options, *arguments, f"{key}={quoted(path)}"])
    return path


def _new_folder(mode: str) -> str:
    """Return the path of a new folder where the command line would put a `run` or `sweep`; it is not created."""
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf

    setup_globals()
    register_with_hydra()
    return str(OmegaConf.select(OmegaConf.load(conf_folder() / "hydra" / "quiet.yaml"), f"{mode}.dir"))


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Give the process a Hydra state of its own within the context, and put back what Hydra changes in the process.

    That is `sys.argv`, the environment variable HYDRA_FULL_ERROR and Hydra's global objects, also after an error.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    outer, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        sys.argv = argv
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = outer, config
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
