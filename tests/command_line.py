"""Runs the command line in the process of the test, and restores the state of the process afterwards."""

from __future__ import annotations

import io
import os
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lora_bench import cli
from lora_bench.config.groups import COMMANDS
from lora_bench.console.signals import ENDING_SIGNALS
from lora_bench.errors import Code, UserError
from lora_bench.run.recorder import Recorder
from lora_bench.training import model_selection
from tests import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOY_RUN = [
    "model=tiny_bert",
    "data=toy",
    "data.train_rows=40",
    "data.validation_rows=16",
    "trainer.precision=fp32",
    "trainer.device=cpu",
    "trainer.max_steps=1",
    "pack.size=16",
]
"""Overrides of the fastest run; the jobs of a sweep are trained as one pack, as on a GPU."""


def toy_run(*overrides: str) -> list[str]:
    """Return the overrides of `TOY_RUN` and these, which replace those of the same key."""
    replaced = {override.partition("=")[0] for override in overrides}
    return [*(override for override in TOY_RUN if override.partition("=")[0] not in replaced), *overrides]


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Call `action` when the recorder is told that this step is done."""

    def stepped(recorder: Recorder, number: int, losses: Any, pairs: int) -> None:
        STEPPED(recorder, number, losses, pairs)
        if number == step:
            action()

    patch.setattr(Recorder, "stepped", stepped)


STEPPED = Recorder.stepped


def signalled(number: int) -> Callable[..., None]:
    """Return a function that sends this process a signal."""
    return lambda *_: os.kill(os.getpid(), number)


def interrupt_and_resume(patch: pytest.MonkeyPatch, sweep: Sequence[str], predictions: Sequence[int]) -> list[Answer]:
    """Run a sweep in the folder `sweep`, interrupt it at these predictions (from 1), and resume it until it ends."""
    predict, calls = model_selection.predict, 0

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in predictions:
            raise KeyboardInterrupt
        return predict(*arguments, **keywords)

    patch.setattr(model_selection, "predict", stopping)
    answers = [lora_bench("train", *sweep)]
    while answers[-1].code == 130:
        answers.append(lora_bench("train", "-m", "resume=sweep"))
    assert answers[0].code == 130
    return answers


@dataclass(frozen=True)
class Answer:
    """The result of a command: its exit code, its output and its error."""

    code: int
    out: str
    err: str
    error: UserError | None = None
    """The error that ended the command, if it was one of the user's."""


def lora_bench(*arguments: str) -> Answer:
    """Run `lora-bench ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    errors: list[UserError] = []

    def dispatch(typed: list[str]) -> int:
        try:
            return DISPATCH(typed)
        except UserError as error:
            errors.append(error)
            raise

    with unchanged_process(), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run_command", dispatch)
        code = cli.main(list(arguments))
    return Answer(code, out.getvalue(), err.getvalue(), *errors)


DISPATCH = cli.run_command


def refused(*arguments: str) -> UserError:
    """Run a wrong request and return its error; assert exit code 2, one line, no traceback and no new file.

    The current folder has to be the test's own (`in_tmp`), since nothing else may write into it.

    Its text has to stand in the golden file of the command, `tests/messages/COMMAND.txt`.
    """
    before = files_below(Path.cwd())
    answer = lora_bench(*arguments)
    assert answer.code == 2, answer
    assert answer.error is not None, answer
    assert "Traceback" not in answer.out + answer.err, answer
    *progress, message = answer.err.splitlines(keepends=True)
    assert all(line.endswith(": loading\n") for line in progress), answer
    assert message.startswith("lora-bench: "), answer
    assert message.endswith("\n"), answer
    assert files_below(Path.cwd()) == before
    command = "sweep" if arguments[:2] == ("train", "-m") else arguments[0] if arguments[0] in COMMANDS else "other"
    messages.check(command, message.removeprefix("lora-bench: "))
    return answer.error


@contextmanager
def refuses(code: Code, *, key: str | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Assert that the block raises a `UserError` of this code for this key, with a text of `tests/messages/python.txt`.

    Yields what `pytest.raises` yields, for further assertions on `.value`.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    assert (caught.value.code, caught.value.key) == (code, key), str(caught.value)
    messages.check("python", str(caught.value))


def files_below(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for every folder, below `folder`."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore signal handlers and the state of Hydra on exit."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
