"""The commands: pops one from the arguments, then runs a `hydra.main` of its own if it composes a config.

Nothing here imports torch: `--help`, `--cfg job`, a mistyped key and `compare` answer at once.
Exit codes: 0 done; 1 a run failed; 2 the request was wrong; 130 and 143 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import secrets
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_bench.errors import DivergedError, RunFailedError, UserError, nearest
from lora_bench.help import COMMANDS, GROUPS, PROMPT_GROUPS, conf_folder, help_of, overview
from lora_bench.screen import shown
from lora_bench.secrets import remember

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from lora_bench.hydra_errors import Arguments


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; each was told when it happened."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "lora-bench"
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a screen without ± and ↑ shows a question mark, not a traceback
    remember(arguments)
    try:
        return _dispatch(arguments)
    except UserError as error:
        return _say(str(error), 1 if isinstance(error, RunFailedError) else 2)
    except DivergedError as error:
        return _say(f"the run diverged: {error}", 1)
    except SweepFailedError as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: `lora-bench compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            first[0] += " Take a smaller trainer.batch_size, data.max_length or model."
        return _say(f"{command} failed: {type(error).__name__}: {first[0]} ({_where(error)})", 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    command, *rest = arguments
    if command == "--version":
        from lora_bench import __version__

        print(f"lora-bench {__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command", remedy=nearest(command, COMMANDS))
    if command == "compare":
        from lora_bench.compare import main as compare

        return compare(rest)
    if "-h" in rest or "--help" in rest:
        print(help_of(command))
        return 0
    if command == "doctor":
        if rest:
            raise UserError(f"takes no {rest[0]!r}", key="doctor")
        from lora_bench.doctor import run_doctor

        run_doctor(_console())
        return 0
    tasks = {"train": _train, "eval": _eval, "predict": _predict, "export": _export, "prompt": _prompt}
    _run_hydra(command, "config" if command == "train" else command, tasks[command], rest)
    return 0


def _run_hydra(command: str, config_name: str, task: Callable[[DictConfig], None], arguments: list[str]) -> None:
    """Compose the config as Hydra does and call the task with it; its errors are told in our words."""
    from lora_bench.hydra_errors import Arguments, compose, refuse_code, translated

    parsed = Arguments.read(arguments)
    if parsed.multirun and command != "train":
        raise UserError("sweeps over nothing", key="-m", remedy=f"lora-bench {command} takes one run.")
    for override in parsed.repeated():
        _tell(f"note: {override} is given again with another value, which counts")
    register_with_hydra()
    import hydra

    failures: list[Exception] = []
    jobs = 0

    def job(cfg: DictConfig) -> None:
        """Keeps errors from Hydra, which would print them its own way and stop at the first of a sweep."""
        nonlocal jobs
        jobs += 1
        try:
            task(cfg)
        except Exception as error:
            failures.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # it then raises its own errors instead of printing them
    with translated(conf_folder(), config_name, parsed):
        composed = compose(conf_folder(), config_name, parsed.overrides, parsed.config_dir)
        refuse_code(composed.hydra)
        if command == "train" and composed.resume and not parsed.cfg:
            parsed = _resumed(parsed, str(composed.resume))
        sys.argv = [f"lora-bench {command}", *parsed.for_hydra()]
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)()
        if jobs == 1 and failures:
            raise failures[0]
    if failures:
        reason = f"{len(failures)} of {jobs} jobs failed"
        requests = [isinstance(error, UserError) and not isinstance(error, RunFailedError) for error in failures]
        raise UserError(reason) if len(failures) == jobs and all(requests) else SweepFailedError(reason)


def _resumed(parsed: Arguments, resume: str) -> Arguments:
    """The arguments with the folder to go on with found, and with those of its beginning where it is a sweep's."""
    from lora_bench.resume import arguments_of_sweep, place, quoted
    from lora_bench.sweep import is_sweep

    folder = place(resume, Path("outputs"))
    if is_sweep(folder):
        return arguments_of_sweep(parsed, folder)
    if parsed.multirun:
        remedy = "Give the folder of a sweep; a single run goes on without -m."
        raise UserError("holds no sweep", key="resume", value=folder, remedy=remedy)
    parsed.overrides.append(f"resume={quoted(folder)}")
    return parsed


def register_with_hydra() -> None:
    """Our sweeper, where Hydra looks for it, and the resolver for a run folder's id."""
    from omegaconf import OmegaConf

    try:
        plugins: Any = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        plugins = type(sys)("hydra_plugins")
        plugins.__path__ = []
        sys.modules["hydra_plugins"] = plugins
    folder = str(Path(__file__).parent / "plugin")
    if folder not in plugins.__path__:
        plugins.__path__.append(folder)
    OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def _train(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from lora_bench.record import Run, discard

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    asked: dict[str, Any] = {
        "choices": {group: hydra.runtime.choices.get(group) for group in GROUPS if hydra.runtime.choices.get(group)},
        "overrides": OmegaConf.to_container(hydra.overrides.task, resolve=False),  # as typed
    }
    for node, key in ((cfg.model, "path"), (cfg.data, "path")):
        if node.get(key) and isinstance(node[key], str | int | float):  # a folder may be called 2024
            node[key] = os.path.abspath(str(node[key]))  # so that the record can be used from any folder
    console = _console()
    job = hydra.job.num if hydra.mode == RunMode.MULTIRUN else None
    if job is not None:
        console.print()
        console.print(shown(f"job {job}: {' '.join(asked['overrides'])}", style="bold"))
    try:
        if cfg.resume:
            discard(folder)
            _resume(cfg, asked["overrides"], console, brief=job is not None)
            return
        from lora_bench.train import train  # torch: late

        train(cfg, folder, **asked, console=console, brief=job is not None)
    except Exception as error:
        if job is None:
            discard(folder)  # unless the run has begun: then its record says how it ended
        elif not (folder / "run.json").exists():
            config: Any = OmegaConf.to_container(cfg, resolve=False)
            Run.claim(folder, **asked, config=config).fail(error)
        if (folder / "run.log").exists() and not isinstance(error, UserError):
            error.add_note(f"the traceback is in {folder / 'run.log'}")
        _tell_job(console, job, error)
        raise
    if cfg.dry_run:
        discard(folder)


def _resume(cfg: DictConfig, overrides: list[str], console: Console, brief: bool) -> None:
    """Go on with an unfinished run: its config is that of its record, and nothing else may be asked for."""
    from omegaconf import OmegaConf

    from lora_bench.record import Run, read
    from lora_bench.resume import refuse_difference, refuse_hidden, refuse_prompted

    folder = Path(cfg.resume)
    found = read(folder)
    refuse_prompted(folder, found)
    if found["status"] == "done":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a kill after the run's end may have left them
        console.print(shown(f"{folder} is done: nothing to go on with"))
        return
    run = Run.reopen(folder)
    try:
        refuse_hidden(folder, run.record["config"])
        refuse_difference(run.record, cfg, overrides, GROUPS)
        from lora_bench.train import train  # torch: late

        asked: dict[str, Any] = {"choices": run.record["choices"], "overrides": run.record["overrides"]}
        train(OmegaConf.create(run.record["config"]), folder, **asked, console=console, brief=brief, begun=run)
    finally:
        run.release()


def _tell_job(console: Console, job: int | None, error: Exception) -> None:
    """In a sweep the others go on, so each failure is told when it happens."""
    if job is not None:
        console.print(shown(f"job {job} failed: {error}", style="red"))


def _eval(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from lora_bench.evaluate import run_eval

    run_eval(cfg, data_choice=str(HydraConfig.get().runtime.choices["data"]), console=_console())


def _predict(cfg: DictConfig) -> None:
    from lora_bench.predict import run_predict

    run_predict(cfg)


def _export(cfg: DictConfig) -> None:
    from lora_bench.export import run_export

    run_export(cfg, console=_console())


def _prompt(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lora_bench.prompt.run import run_prompt
    from lora_bench.record import discard

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    chosen = hydra.runtime.choices
    choices = {group: chosen[group] for group in PROMPT_GROUPS if isinstance(chosen.get(group), str)}
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    for node, key in ((cfg.data, "path"), (cfg, "predictions")):
        if node.get(key) and isinstance(node[key], str | int | float):
            node[key] = os.path.abspath(str(node[key]))
    try:
        run_prompt(cfg, folder, choices=choices, overrides=overrides, console=_console())
    finally:
        discard(folder)  # unless the run has begun


def _console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def _say(message: str, code: int) -> int:
    _tell(f"lora-bench: {message}")
    return code


def _where(error: Exception) -> str:
    """Where to look: the run's log, or the line of ours that raised what nobody expected."""
    from traceback import extract_tb

    if getattr(error, "__notes__", None):
        return str(error.__notes__[0])
    ours = [frame for frame in extract_tb(error.__traceback__) if Path(__file__).parent in Path(frame.filename).parents]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else "outside lora-bench"


def _tell(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(shown(text))


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
