"""Processes that have torch imported as they start: forks of one process, which imports it once.

For tests of what only a process of its own can show: that it is killed, or that two hold one folder.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["lora_bench.cli", "lora_bench.sweeps.workers", "datasets", "scipy.stats", "pytest"])


class Forked:
    """A running function of a test module, called with texts; what it returns is the exit code.

    Args:
        function: in the module where a process finds it by its name.
        arguments: of the function.
        environment: variables besides those of this process.
    """

    def __init__(self, function: Callable[..., object], *arguments: str, **environment: str) -> None:
        self.files = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.files)
        settings = (sys.path, os.getcwd(), {**os.environ, **environment}, self.files)
        call = (function.__module__, function.__name__, arguments)
        self.process = CONTEXT.Process(target=_call, args=(*settings, *call), daemon=True)
        self.process.start()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Wait for its end and return its exit code, -N if signal N ended it; a `TimeoutError` after these seconds."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError
        return int(self.process.exitcode)

    @property
    def out(self) -> str:
        """What it wrote to standard output."""
        return Path(self.files, "1").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it wrote to standard error."""
        return Path(self.files, "2").read_text(encoding="utf-8")


def command(*arguments: str) -> Forked:
    """Start `lora-bench ARGUMENTS`."""
    return Forked(run_command, *arguments)


def run_command(*arguments: str) -> int:
    """Run `lora-bench ARGUMENTS` and return its exit code."""
    from lora_bench import cli

    sys.argv[1:] = arguments
    return cli.main()


def _call(
    path: list[str],
    folder: str,
    environment: Mapping[str, str],
    files: str,
    module: str,
    name: str,
    arguments: tuple[str, ...],
) -> None:
    """Call a function of a module, as a new process does; the exit code is what it returns."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it may start others
    sys.path[:] = path
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(os.open(Path(files, str(descriptor)), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    raise SystemExit(getattr(importlib.import_module(module), name)(*arguments))
