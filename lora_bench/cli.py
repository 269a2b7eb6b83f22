"""The command line: `lora-bench COMMAND ARGUMENTS`.

Nothing here imports torch, so `--help`, `--cfg job`, a mistyped key and `compare` answer at once.
Exit codes: 0 done; 1 a run failed; 2 the request was wrong; 129, 130 and 143 interrupted.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_bench.completion import COMPLETE, print_candidates, run_completion
from lora_bench.config.groups import COMMANDS, PROMPT_GROUPS, conf_folder
from lora_bench.config.keys import key_of
from lora_bench.config.launch import Launch
from lora_bench.console import streams, sweep_progress
from lora_bench.console.help import explain, format_help, format_overview
from lora_bench.console.redaction import remember, remember_config
from lora_bench.console.signals import ENDING_SIGNALS, terminate
from lora_bench.console.stages import current_console, importing_libraries, show_progress
from lora_bench.console.text import note, sanitise, stdout_console
from lora_bench.errors import Code, DivergedError, RunFailedError, SweepFailedError, UserError, nearest
from lora_bench.records.job import follower_folder
from lora_bench.records.resume import sweep_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from lora_bench.config.compose import Arguments, ComposedHydra
    from lora_bench.records.job import Job


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed to standard error and not raised.

    The signal handlers and standard streams of the process are replaced, and a size of the terminal in its environment
    that is none is removed. If standard output could not be written, the code is 1, except for commands in
    `WRITING_FILES`.

    Args:
        arguments: the command and its arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` lets a hangup pass
            signal.signal(number, terminate)
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("0*[1-9][0-9]{0,5}", os.environ.get(name, "")):
            os.environ.pop(name, None)  # rich would take a width of 0, and print nothing
    streams.protect()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a screen without ± and ↑ shows a question mark, not a traceback
    remember(arguments)
    code = _exit_code(arguments)
    if error := streams.failure():
        _report(f"standard output cannot be written: {error.strerror}", 1)
        if code == 0 and not (arguments and arguments[0] in WRITING_FILES):
            return 1
    return code


WRITING_FILES = ("train", "search", "eval", "export", "push", "prompt")
"""Commands whose results are files: a failure of standard output does not fail them."""


POSITIONAL = {"push": ("run", "repo")}
"""Keys that arguments without a key stand for, by command."""


def _exit_code(arguments: list[str]) -> int:
    """Run one command and return its exit code; an error is reported in one paragraph and not raised.

    The code is 2 for a `UserError`, 1 for a `RunFailedError` and every other error, 130 after Ctrl-C, and that of a
    SystemExit, which is 128 + its number for another signal.
    """
    command = arguments[0] if arguments else "lora-bench"
    try:
        return run_command(arguments)
    except UserError as error:
        return _report(str(error), 1 if isinstance(error, RunFailedError) else 2)
    except DivergedError as error:
        return _report(f"the run diverged: {error}", 1)
    except SweepFailedError as error:
        return _report(str(error), 1)
    except KeyboardInterrupt as stop:
        return _report(_describe_stop(stop), 130)
    except SystemExit as stop:
        if getattr(stop, "__notes__", None):
            _report(_describe_stop(stop), 0)
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            first[0] += " Take a smaller trainer.batch_size, data.max_length or model."
        return _report(f"{command} failed: {type(error).__name__}: {first[0]} ({_origin(error)})", 1)


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code, or raise its error; without arguments print the help.

    Only `compare` may return another code than 0.

    Raises:
        UserError: there is no such command, or its arguments are wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(format_overview())
        return 0
    command, *rest = arguments
    if command == "--version":
        from lora_bench import __version__

        print(f"lora-bench {__version__}")
        return 0
    if command == COMPLETE:
        print_candidates(rest)
        return 0
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command", remedy=nearest(command, COMMANDS), code=Code.UNKNOWN_CHOICE)
    if command in PARSED:
        return _parsed(command)(rest)
    if "-h" in rest or "--help" in rest:
        print(format_help(command, _config_dir(rest)))
        return 0
    if command == "help":
        if len(rest) == 1 and rest[0] in COMMANDS:
            return run_command([rest[0], "--help"])
        print(explain(rest))
        return 0
    if command == "completion":
        run_completion(rest)
        return 0
    if command == "doctor":
        if rest:
            raise UserError("takes no arguments", key="doctor", value=rest[0], code=Code.UNKNOWN_CHOICE)
        from lora_bench.doctor import run_doctor

        run_doctor(stdout_console())
        return 0
    if command == "clean":
        from lora_bench.clean import run_clean

        run_clean(rest, stdout_console())
        return 0
    if command == "search":
        command, rest = "train", search_arguments(rest)
    tasks = {"train": _train, "eval": _eval, "predict": _predict, "export": _export, "push": _push, "prompt": _prompt}
    _run_hydra(command, "config" if command == "train" else command, tasks[command], rest)
    return 0


def search_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of `lora-bench train` for those of `lora-bench search`: a sweep, with or without `-m`.

    Raises:
        UserError: they choose another sweep.
    """
    others = [text for text in arguments if text not in ("-m", "--multirun", SEARCH)]
    for text in others:
        if key_of(text) == "sweep":
            remedy = f"Leave it out, or run it with: lora-bench train {text}"
            raise UserError(
                "is not a search", key="sweep", value=text[len("sweep=") :], remedy=remedy, code=Code.CONFLICT
            )
    return [SEARCH, *others]


SEARCH = "sweep=search"
"""The override that makes a search of a sweep."""


PARSED = ("compare", "ls", "show", "rm", "watch")
"""Commands that have a parser of their own, with `--help`."""


def _parsed(command: str) -> Callable[[list[str]], int]:
    """Return the function of a command of `PARSED`, which takes its arguments and returns the exit code."""
    if command == "compare":
        from lora_bench.compare import main
    elif command == "ls":
        from lora_bench.ls import main
    elif command == "show":
        from lora_bench.show import main
    elif command == "rm":
        from lora_bench.rm import main
    else:
        from lora_bench.watch import main
    return main


def _run_hydra(command: str, config_name: str, task: Callable[[DictConfig], None], arguments: list[str]) -> None:
    """Compose the config of a command and call its task with it, or with that of each job of a sweep.

    With `--cfg` the config is printed instead. A run or sweep that `resume` names is found here.

    Args:
        command: for messages.
        config_name: the config at the top of `conf/`.
        task: takes the config without its `hydra` node, which is `HydraConfig.get()` meanwhile.
        arguments: of the command.

    Raises:
        UserError: the arguments are wrong, or `-m` is given to another command than `train` or under `torchrun`.
        Exception: the first error of the task.
    """
    from lora_bench.config.compose import Arguments
    from lora_bench.config.hydra_errors import translate_errors
    from lora_bench.config.overrides import typed_by
    from lora_bench.files.cache import token_limit_bytes

    token_limit_bytes()  # a wrong value is refused before anything is loaded
    parsed = Arguments.read(arguments, POSITIONAL.get(command, ()))
    if parsed.multirun and command != "train":
        raise UserError(
            "is an option of lora-bench train only",
            key="-m",
            remedy=f"lora-bench {command} takes one run.",
            code=Code.CONFLICT,
        )
    if Launch.read().world_size > 1 and parsed.multirun:
        remedy = "torchrun trains one run on several devices. Start the sweep without torchrun."
        raise UserError("starts several runs, and torchrun one", key="-m", remedy=remedy, code=Code.CONFLICT)
    for override in parsed.repeated():
        note(f"{override} is ignored: a later argument gives the key another value")
    from hydra.core.hydra_config import HydraConfig

    from lora_bench.records.run_folder import discard

    failures: list[Exception] = []
    start = os.getcwd()

    def job(cfg: DictConfig) -> None:
        """Call the task in the folder in which the command started; keep its error from Hydra, which would print it.

        The error is added to `failures`. After a signal the run's folder is removed if it is empty.
        """
        try:
            os.chdir(start)  # relative paths stay valid with hydra.job.chdir=true
            task(cfg)
        except Exception as error:
            failures.append(error)
        except BaseException:  # Ctrl-C, or a signal that became SystemExit
            discard(Path(HydraConfig.get().runtime.output_dir))  # unless a run has started in it
            raise

    with typed_by(parsed.overrides, parsed.config_dir):
        can_resume = command == "train" and parsed.cfg is None
        if can_resume and (typed := parsed.resume()):
            parsed = _resumed(parsed, typed)
        composed = _composed(parsed, config_name)
        if can_resume and composed.config.resume and not typed:  # from a YAML file, or from the environment
            parsed = _resumed(parsed, str(composed.config.resume))
            composed = _composed(parsed, config_name)
        with translate_errors(conf_folder(), config_name, parsed):
            composed.execute(parsed, job)
            if failures:
                raise failures[0]


def _composed(arguments: Arguments, config_name: str) -> ComposedHydra:
    """Compose the config of these arguments, and hide its secrets in all output.

    Raises:
        UserError: it cannot be composed; the error names the record that the arguments were read from, if any.
    """
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose_hydra
    from lora_bench.config.hydra_errors import translate_errors

    try:
        with translate_errors(conf_folder(), config_name, arguments):
            composed = compose_hydra(conf_folder(), config_name, arguments.overrides, arguments.config_dir)
    except UserError as error:
        error.file = error.file or arguments.record
        raise
    remember_config(OmegaConf.to_container(composed.config, resolve=False))
    return composed


def _resumed(arguments: Arguments, resume: str) -> Arguments:
    """Return the arguments with the folder that `resume` names, or the arguments of the sweep in that folder.

    Without a sweep the given arguments are changed and returned. Whether the folder holds a run is not checked here.

    Args:
        arguments: as typed.
        resume: a folder, a name, an id, or `last` for the newest unfinished run or sweep below `outputs/`.

    Raises:
        UserError: the folder is not that of a sweep, and `-m` was typed; `last` finds none; or `sweep_arguments`
            refuses.
    """
    from lora_bench.errors import quoted
    from lora_bench.records.resume import resolve_folder
    from lora_bench.records.sweep_folder import SWEEP_FILE, is_sweep

    folder = resolve_folder(resume)
    if is_sweep(folder):
        try:
            recorded = sweep_arguments(arguments, folder)
        except UserError as error:
            error.file = error.file or folder / SWEEP_FILE
            raise
        recorded.record = folder / SWEEP_FILE
        return recorded
    if arguments.multirun:
        remedy = "Give the folder of a sweep, or leave out -m to resume a single run."
        raise UserError("holds no sweep", key="resume", value=folder, remedy=remedy, code=Code.NOT_FOUND)
    arguments.overrides.append(f"resume={quoted(folder)}")
    return arguments


def _train(cfg: DictConfig) -> None:
    """Train or resume one run, or show its expected cost with `dry_run`; only print a note if it is done already.

    If the run has not started, its folder is removed after an error, and after a dry run. An unexpected error gets a
    note that names the log with its traceback. The claim on a resumed run is given up at the end. A process of
    `torchrun` other than the first prints nothing and uses a temporary folder. Of a sweep that Hydra's own launcher
    runs, this is one job.
    """
    from hydra.core.hydra_config import HydraConfig

    from lora_bench.records.job import Job, is_done, read_result
    from lora_bench.records.run_folder import discard
    from lora_bench.run.loaded_data import LoadedData
    from lora_bench.run.preflight import check_train

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    console, sweep = current_console(), sweep_progress.current()
    if cfg.resume:
        discard(folder)
    if is_done(cfg):
        console.print(sanitise(f"{cfg.resume} is done: there is nothing to resume"))
        return
    job = None
    is_follower = Launch.read().rank > 0  # of torchrun: only the process of rank 0 writes and prints
    console = Console(quiet=True) if is_follower else console
    run_context = follower_folder(cfg, folder) if is_follower else nullcontext(folder)
    with show_progress(console), run_context as run_folder:
        try:
            job = Job.composed(cfg, hydra, run_folder, "" if sweep is None else sweep.titles[hydra.job.num])
            check_train(job)
            if sweep is None:
                console.print(sanitise(f"{_title(job)}: loading"))
            loaded = LoadedData.of_tasks(job.settings)
            if cfg.dry_run:
                with importing_libraries():
                    from lora_bench.sweeps import cost_estimate  # torch: late

                cost_estimate.print_run_estimate(job, console, loaded)
            else:
                with importing_libraries():
                    from lora_bench.train import train

                train(job, console=console, loaded=loaded)
            if sweep is not None:
                sweep.job_ended(job.title, read_result(job.folder, is_resumed=job.resumed is not None))
        except Exception as error:
            if sweep is not None:
                sweep.job_ended(sweep.titles[hydra.job.num], None, error)
            discard(run_folder)  # unless the run has started: then its record says how it ended
            if (run_folder / "run.log").exists() and not isinstance(error, UserError):
                error.add_note(f"the traceback is in {run_folder / 'run.log'}")
            raise
        finally:
            if job is not None and job.resumed:
                job.resumed.release()
    if cfg.dry_run:
        discard(folder)


def _title(job: Job) -> str:
    """Return what a job trains on what: `lora on roberta, qqp`."""
    adapter, model, data = (job.choices.get(group) or "" for group in ("adapter", "model", "data"))
    return f"{adapter} on {model}, {', '.join(job.settings.tasks) or data}"


def _eval(cfg: DictConfig) -> None:
    """Evaluate a finished run, or an adapter of PEFT; wrong data, too, are refused before torch is imported."""
    from hydra.core.hydra_config import HydraConfig

    from lora_bench.run.evaluation_request import EvaluationRequest

    console, choice = stdout_console(), str(HydraConfig.get().runtime.choices["data"])
    with show_progress(console):
        request = EvaluationRequest.read(cfg, choice)
        console.print(sanitise(f"{cfg.run or cfg.peft} on {choice}: loading"))
        with importing_libraries():
            from lora_bench.evaluate import run_eval

        run_eval(request, console=console)


def _predict(cfg: DictConfig) -> None:
    """Label new texts with a finished run; a wrong request or input is refused before torch is imported."""
    from lora_bench.run.prediction_request import PredictionRequest

    console = Console(stderr=True, highlight=False, soft_wrap=True)  # standard output may be for the predictions
    with show_progress(console):
        request = PredictionRequest.read(cfg)
        console.print(sanitise(f"{cfg.run}: loading"))
        with importing_libraries():
            from lora_bench.predict import run_predict  # torch: late

        run_predict(request)


def _export(cfg: DictConfig) -> None:
    """Export a finished run; a wrong request is refused before torch is imported."""
    from lora_bench.run.preflight import check_export

    console = stdout_console()
    with show_progress(console):
        check_export(cfg)
        console.print(sanitise(f"{cfg.run} as {cfg.format}: loading"))
        with importing_libraries():
            from lora_bench.export import run_export

        run_export(cfg, console=console)


def _push(cfg: DictConfig) -> None:
    """Publish a finished run on the hub; nothing of it needs torch."""
    from lora_bench.push import run_push

    console = stdout_console()
    with show_progress(console):
        run_push(cfg, console=console)


def _prompt(cfg: DictConfig) -> None:
    """Evaluate a prompted language model, in the folder that Hydra has made; it is removed if no run starts in it.

    Paths of data and predictions in the config are made absolute.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lora_bench.config.build import build_data
    from lora_bench.records.run_folder import discard
    from lora_bench.run.preflight import check_data

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    chosen = hydra.runtime.choices
    choices = {group: chosen[group] for group in PROMPT_GROUPS if isinstance(chosen.get(group), str)}
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    for node, key in ((cfg.data, "path"), (cfg, "predictions")):
        if node.get(key) and isinstance(node[key], str | int | float):
            node[key] = os.path.abspath(str(node[key]))
    try:
        check_data(build_data(cfg.data))
        console = stdout_console()
        with show_progress(console):
            console.print(sanitise(f"{cfg.llm.model or cfg.predictions} on {choices.get('data')}: loading"))
            with importing_libraries():
                from lora_bench.prompt import run_prompt  # torch: late

            run_prompt(cfg, folder, choices=choices, overrides=overrides, console=console)
    finally:
        discard(folder)  # unless the run has started


def _config_dir(arguments: list[str]) -> str | None:
    """Return the folder of `--config-dir` among arguments that are not parsed; None without one."""
    for argument, follower in zip(arguments, [*arguments[1:], None], strict=True):
        if argument in ("--config-dir", "-cd"):
            return follower
        if argument.startswith("--config-dir="):
            return argument.partition("=")[2]
    return None


def _describe_stop(stop: BaseException) -> str:
    """Return that the command was interrupted, and the notes of the exception: what is kept and how to resume."""
    return " ".join(["interrupted.", *getattr(stop, "__notes__", [])]).rstrip(".")


def _report(message: str, code: int) -> int:
    """Print an error to standard error, with `lora-bench: ` before it and secrets hidden, and return `code`."""
    line = sanitise(f"lora-bench: {message}")
    Console(stderr=True, highlight=False, soft_wrap=True).print(line)
    return code


def _origin(error: Exception) -> str:
    """Return the origin of an unexpected error: its first note, which names the log with the traceback.

    Without a note it is the last line of lora-bench in the traceback, or `outside lora-bench`.
    """
    from traceback import extract_tb

    if getattr(error, "__notes__", None):
        return str(error.__notes__[0])
    ours = [frame for frame in extract_tb(error.__traceback__) if Path(__file__).parent in Path(frame.filename).parents]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else "outside lora-bench"
