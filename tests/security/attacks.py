"""A table of attacks: every file that a command reads, every way to damage it, and what must hold afterwards.

A `World` is a folder with two finished runs, a run of two tasks, a stopped run, a sweep that lacks a job, a model, an
adapter in PEFT's format and a warm cache. An attack damages one file there and runs one command. It must exit 0 with
the result of the undamaged world, or 2 with a message that names the file or the key; it must run no code, print no
secret, and leave everything outside the folder as it is.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from tests.command_line import Answer, lora_bench, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

SECONDS = 60
"""A command that takes longer hangs."""
SECRET = "correct-horse-battery-4711"
SECRET_NAME = "CANARY_SECRET"
CANARY = "canary"
"""Made in the outer folder by code that a file names, if it is run."""
HUGE = 4 * 2**30


# -- damages --


class Bomb:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.path.abspath(f"../{CANARY}"),))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 16
    path.write_bytes(content)


def other_type(path: Path) -> None:
    path.write_text("[[1, 2.5, null, true]]\n" if path.suffix in JSON else "a\tb\n0\t1\n")


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(HUGE)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def link_to_itself(path: Path) -> None:
    replace(path, lambda: path.symlink_to(path.name))


def dangling_link(path: Path) -> None:
    replace(path, lambda: path.symlink_to("../nowhere/at/all"))


def link_to_zeros(path: Path) -> None:
    replace(path, lambda: path.symlink_to("/dev/zero"))


def fifo(path: Path) -> None:
    replace(path, lambda: os.mkfifo(path))


def folder(path: Path) -> None:
    replace(path, path.mkdir)


def link_out(path: Path) -> None:
    """The file itself lies outside: it may be read, and must not be written through the link."""
    outside = Path("../outside") / path.name
    shutil.copy(path, outside)
    replace(path, lambda: path.symlink_to(outside.resolve()))


def hostile_values(path: Path) -> None:
    """Put terminal escapes, markup, interpolations, formulas and paths in the place of every text."""
    words = iter(HOSTILE * 10_000)
    rewrite(path, lambda value: next(words) if isinstance(value, str) and value not in KEPT else value)


def hostile_keys(path: Path) -> None:
    """Name code to run, and read the environment, in every object."""

    def add(value: Any) -> Any:
        return value | NAMES_CODE | {"zz": "${oc.env:" + SECRET_NAME + "}"} if isinstance(value, dict) else value

    rewrite(path, add)


def absurd_numbers(path: Path) -> None:
    """Put what no float holds, or what is not finite, in the place of every number."""
    numbers = iter([10**400, float("nan"), float("inf"), -1, 0, 1e308] * 10_000)

    def absurd(value: Any) -> Any:
        return next(numbers) if isinstance(value, int | float) and not isinstance(value, bool) else value

    rewrite(path, absurd, kept=("schema",))


def wrong_types(path: Path) -> None:
    """Put a list where an object was, and an object where a list or text was, one level below the top."""

    def swapped(value: Any) -> Any:
        return [1] if isinstance(value, dict) else {"a": [{}]} if isinstance(value, list | str) else "text"

    rewrite(path, swapped, kept=("schema", "status"), deep=False)


def deep(path: Path) -> None:
    path.write_text('{"schema": 1, "status": "done", "config": ' + '{"a":' * 50_000 + "1" + "}" * 50_001)


def code_in_overrides(path: Path) -> None:
    """Ask Hydra for a callback, as the overrides of a record may."""
    content = json.loads(path.read_text())
    target = f"{{_target_: os.mkdir, path: {os.path.abspath('../' + CANARY)}}}"
    content["overrides"] = [*content["overrides"], f"+hydra.callbacks.x={target}"]
    path.write_text(json.dumps(content))


JSON = (".json", ".jsonl")
HOSTILE = [
    "\x1b]0;title\x07\x1b[31m",
    "<script>alert(1)</script>",
    "${oc.env:" + SECRET_NAME + "}",
    "=HYPERLINK(1)",
    "../../outside/x",
    "'; $(touch canary) `touch canary`",
    "{_target_: os.mkdir, path: ../canary}",
    "\ud800\u202e",
    "(a+)+$",
]
KEPT = ("done", "interrupted", "bert", "LORA")
"""Texts without which a file is refused at its first line."""
NAMES_CODE = {"_target_": "os.mkdir", "path": f"../{CANARY}", "auto_map": {"AutoConfig": "evil.C"}}


def rewrite(path: Path, change: Callable[[Any], Any], kept: tuple[str, ...] = (), deep: bool = True) -> None:
    """Change every value of a file of JSON, or of each line of one; other files get all hostile words as text."""
    if path.suffix not in JSON:
        path.write_bytes("\n".join(HOSTILE).encode(errors="surrogatepass"))
        return

    def walk(value: Any, level: int = 0) -> Any:
        if isinstance(value, dict) and (deep or level == 0):
            value = {key: item if key in kept else walk(item, level + 1) for key, item in value.items()}
        elif isinstance(value, list) and deep:
            value = [walk(item, level + 1) for item in value]
        return change(value) if deep or level else value

    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    path.write_text("\n".join(json.dumps(walk(json.loads(line))) for line in lines) + "\n")


def replace(path: Path, make: Callable[[], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make()


ANY_FILE = (cut, empty, zeros, flipped_bit, other_type, huge, pickled, hostile_values, link_to_itself)
ANY_FILE += (dangling_link, link_to_zeros, fifo, folder, link_out)
JSON_FILE = (hostile_keys, absurd_numbers, wrong_types, deep)


def damages_of(target: Target) -> tuple[Callable[[Path], None], ...]:
    json_damages = JSON_FILE if Path(target.path).suffix == ".json" else ()
    return (
        ANY_FILE + json_damages + ((code_in_overrides,) if Path(target.path).name in ("run.json", "sweep.json") else ())
    )


# -- commands and what they read --


@dataclass(frozen=True)
class Command:
    name: str
    arguments: tuple[str, ...]
    result: Callable[[Answer], Any]
    """The part of the answer that must be as in the undamaged world."""
    keys: tuple[str, ...] = ()
    """Keys that a refusal may name in the place of the file."""


@dataclass(frozen=True)
class Target:
    path: str
    """In the world; `*` stands for what is different each time."""
    commands: tuple[str, ...]
    """The commands that read it, the cheapest first; the test suite runs only the first."""


def rows(answer: Answer) -> Any:
    return [[row["runs"], row["n"], row["mcc"], row["accuracy"]] for row in json.loads(answer.out)]


def is_touched(run: Path, file: Path) -> bool:
    """Return whether a damaged file lies in the run's folder, or in one that the run lies in."""
    return run in file.parents or file.parent in run.parents


def table_of(name: str) -> Callable[[Answer], Any]:
    """The file's rows, whatever its format."""
    return lambda _: pq.read_table(name).to_pydict() if name.endswith("parquet") else Path(name).read_text()


def run_of(name: str) -> Callable[[Answer], Any]:
    """A run's metrics and predictions."""

    def read(_: Answer) -> Any:
        metrics = json.loads(Path(name, "run.json").read_text())["metrics"]
        return metrics, pq.read_table(Path(name, "predictions/validation.parquet")).to_pydict()

    return read


def evaluation_of(name: str) -> Callable[[Answer], Any]:
    return lambda _: json.loads(Path(name).read_text())["metrics"]


def weights_of(name: str) -> Callable[[Answer], Any]:
    return lambda _: {path.name: path.read_bytes() for path in sorted(Path(name).glob("*.safetensors"))}


def nothing(_: Answer) -> None:
    return None


TRAIN = toy_run("model.path=model", "adapter.layers=top:1", "trainer.max_steps=2", "trainer.eval_every=1")
NEW = [*TRAIN, "hydra.run.dir=new"]
PREDICT = ("predict", "run=runs/a", "input=pairs.tsv", "output=labelled.tsv")
COMMANDS = {
    command.name: command
    for command in (
        Command("compare", ("compare", "runs", "outputs", "--format", "json"), rows),
        Command("compare --html", ("compare", "runs", "outputs", "--html", "page.html"), nothing),
        Command("compare table", ("compare", "runs", "outputs"), nothing),
        Command("compare csv", ("compare", "runs", "outputs", "--format", "csv"), nothing),
        Command("compare md", ("compare", "runs", "outputs", "--format", "md", "--anchors"), nothing),
        Command("compare latex", ("compare", "runs", "outputs", "--format", "latex", "--by", "adapter.rank"), nothing),
        Command("compare --baseline", ("compare", "runs", "--baseline", "runs/b", "--format", "json"), rows),
        Command("compare sweep", ("compare", "sweep", "--format", "json"), rows),
        Command("predict", PREDICT, table_of("labelled.tsv"), ("run=",)),
        Command("eval", ("eval", "run=runs/a", "data=toy", "name=again", "data.validation_rows=8"),
                evaluation_of("runs/a/evaluations/again.json"), ("run=",)),
        Command("export peft", ("export", "run=runs/a", "format=peft", "output=out"), weights_of("out"), ("run=",)),
        Command("export merged", ("export", "run=runs/a", "format=merged", "output=out"), weights_of("out"), ("run=",)),
        Command("init_from", ("train", *NEW, "adapter.init_from=runs/a"), run_of("new"), ("adapter.init_from",)),
        Command("resume", ("train", "resume=outputs/stopped"), run_of("outputs/stopped"), ("resume=",)),
        Command("resume=last", ("train", "resume=last"), nothing, ("resume=",)),
        Command("resume sweep", ("train", "-m", "resume=sweep"), run_of("sweep/1"), ("resume=",)),
        Command("train", ("train", *NEW), run_of("new"), ("model.path", "model.tokenizer")),
        Command("eval peft", ("eval", "peft=peft", "model.path=model", "data=toy", "name=own", "output=scored",
                "data.validation_rows=8"), evaluation_of("scored/evaluations/own.json"),
                ("peft=", "model.path", "model.tokenizer")),
    )
}  # fmt: skip
COMPARE = ("compare", "compare --html", "compare table", "compare csv", "compare md", "compare latex")
COMPARE += ("compare --baseline",)
READS_RUN = ("predict", "eval", "export peft", "export merged", "init_from")
TARGETS = (
    Target("runs/a/run.json", (*COMPARE, *READS_RUN)),
    Target("runs/a/metrics.jsonl", (*COMPARE, "predict")),
    Target("runs/a/predictions/validation.parquet", (*COMPARE, "predict")),
    Target("runs/a/evaluations/toy.json", (*COMPARE, "eval")),
    Target("runs/a/adapter/adapter_model.safetensors", (*READS_RUN, "compare")),
    Target("runs/a/adapter/adapter_config.json", (*READS_RUN, "compare")),
    Target("runs/a/.hydra/config.yaml", ("compare", "predict")),
    Target("runs/a/.hydra/overrides.yaml", ("compare", "predict")),
    Target("runs/a/.lock", ("compare", "predict", "eval")),
    Target("runs/several/tasks/one/run.json", COMPARE),
    Target("runs/several/run.json", COMPARE),
    Target("outputs/stopped/run.json", ("resume", "resume=last", *COMPARE)),
    Target("outputs/stopped/metrics.jsonl", ("resume", *COMPARE)),
    Target("outputs/stopped/.lock", ("resume", *COMPARE)),
    Target("outputs/stopped/.hydra/config.yaml", ("resume",)),
    Target("outputs/stopped/checkpoints/*/tensors.safetensors", ("resume",)),
    Target("outputs/stopped/checkpoints/*/state.json", ("resume",)),
    Target("outputs/stopped/checkpoints/*/manifest.json", ("resume",)),
    Target("sweep/sweep.json", ("resume sweep", "compare sweep")),
    Target("sweep/0/run.json", ("compare sweep", "resume sweep")),
    Target("sweep/table.csv", ("compare sweep", "resume sweep")),
    Target("sweep/.lock", ("compare sweep", "resume sweep")),
    Target("model/config.json", ("train", "eval peft", "predict")),
    Target("model/model.safetensors", ("train", "eval peft", "predict")),
    Target("model/model.safetensors.index.json", ("train", "predict")),
    Target("model/tokenizer.json", ("train", "eval peft", "predict")),
    Target("model/tokenizer_config.json", ("train", "eval peft", "predict")),
    Target("model/special_tokens_map.json", ("train", "predict")),
    Target("model/adapter_config.json", ("train", "predict")),
    Target("peft/adapter_config.json", ("eval peft",)),
    Target("peft/adapter_model.safetensors", ("eval peft",)),
    Target("cache/tokens/*.arrow", ("train", "predict", "eval")),
    Target("cache/prefix/*.hidden", ("train",)),
)
IGNORED = ("runs/a/.hydra", "runs/a/run.log", "model/special_tokens_map.json", "sweep/table.csv")
"""Files that no command reads: damage there changes nothing."""
INPUTS = ("model/", "peft/")
TAKES_ANY_MODEL = ("train", "eval peft")
"""Another weight or token there is another model, which no record knows: these commands may give another result."""


# -- the world --


@dataclass
class World:
    """A folder `work` that every attack finds as it was made, in `top`."""

    top: Path
    expected: dict[str, Any] = field(default_factory=dict)
    """Results of commands in the undamaged world."""

    @property
    def work(self) -> Path:
        return self.top / "work"

    def build(self, commands: Collection[str] = ()) -> None:
        """Make everything unless it is there, and note what these commands (by default all) give; `work` is current."""
        os.environ["LORA_BENCH_CACHE"] = str(self.work / "cache")
        os.environ[SECRET_NAME] = SECRET
        if not (self.top / "base").exists():
            self._make()
        for command in [COMMANDS[name] for name in commands or COMMANDS]:
            self.restore()
            self.expected[command.name] = command.result(self._do(*command.arguments))
        self.restore()

    def _make(self) -> None:
        (self.top / "outside").mkdir(parents=True)
        (self.top / "outside/precious").write_text("as it was")
        self.work.mkdir()
        os.chdir(self.work)
        Path("pairs.tsv").write_text("question1\tquestion2\n" + "".join(f"how {i}\twhy {i}\n" for i in range(4)))
        Path("conf/data").mkdir(parents=True)
        for seed, name in enumerate(("one", "other")):
            text = f"defaults: [toy, _self_]\ntask: {name}\ngenerator_seed: {seed}\ntrain_rows: 40\n"
            Path(f"conf/data/{name}.yaml").write_text(text + "validation_rows: 16\n")
        self._do("train", *toy_run("adapter=full", "hydra.run.dir=whole"))
        self._do("export", "run=whole", "format=merged", "output=model")
        shutil.rmtree("whole")
        self._do("train", *TRAIN, "hydra.run.dir=runs/a")
        self._do("train", *TRAIN, "adapter.rank=2", "hydra.run.dir=runs/b")
        tasks = [override for override in TRAIN if not override.startswith("data")]
        self._do("train", "--config-dir=conf", *tasks, "data.tasks=[one,other]", "hydra.run.dir=runs/several")
        self._do("eval", "run=runs/a", "data=toy", "name=toy", "data.validation_rows=12")
        self._do("export", "run=runs/a", "format=peft", "output=peft")
        self._do("train", "-m", *TRAIN, "seed=0,1", "hydra.sweep.dir=sweep")
        shutil.rmtree("sweep/1")
        self._stop()
        os.chdir(self.top)
        shutil.copytree(self.work, "making", symlinks=True)
        os.replace("making", "base")

    def _stop(self) -> None:
        """Leave a run that was interrupted after a checkpoint."""
        import pytest

        from tests.command_line import at_step, signalled

        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, signalled(signal.SIGINT))
            arguments = [override for override in TRAIN if "max_steps" not in override]
            answer = lora_bench(
                *("train", *arguments, "trainer.max_steps=4", "trainer.checkpoint_every=1"),
                "hydra.run.dir=outputs/stopped",
            )
        assert answer.code == 130, answer

    def _do(self, *arguments: str) -> Answer:
        answer = lora_bench(*arguments)
        assert answer.code == 0, (arguments, answer)
        return answer

    def restore(self) -> None:
        os.chdir(self.top)
        shutil.rmtree(self.work)
        shutil.copytree(self.top / "base", self.work, symlinks=True)
        os.chdir(self.work)
        for path in (self.top / "outside").iterdir():
            if path.name != "precious":
                path.unlink()
        if (self.top / CANARY).exists():
            (self.top / CANARY).rmdir()

    def attack(self, target: Target, damage: Callable[[Path], None], command: Command) -> str | None:
        """Damage a file that was just restored, run the command, and return what is wrong with what it did."""
        path = self._path(target)
        damage(path)
        outside = self._outside()
        began = time.monotonic()
        with alarm(SECONDS), writer_of_last_resort(path):
            answer = lora_bench(*command.arguments)
        return self._wrong(target, command, answer, outside, time.monotonic() - began)

    def _path(self, target: Target) -> Path:
        paths = sorted(Path().glob(target.path))
        if paths:
            return paths[-1]
        path = Path(target.path)  # a file that need not be there: a valid one that means nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return path

    def _outside(self) -> dict[str, Any]:
        """Everything beside the world, with times and content."""
        paths = [path for path in sorted(self.top.iterdir()) if path not in (self.work, self.top / "base")]
        paths += sorted((self.top / "outside").iterdir())
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    def _wrong(
        self, target: Target, command: Command, answer: Answer, outside: dict[str, Any], seconds: float
    ) -> str | None:
        last_line = (answer.err.strip().splitlines() or [""])[-1]
        if (self.top / CANARY).exists() or Path(CANARY).exists():
            return "code was run"
        if SECRET in answer.out + answer.err or any(SECRET.encode() in content for content in self._small_files()):
            return "the secret is in its output"
        if "\x1b]0" in answer.out + answer.err:
            return "a terminal escape is in its output"
        if self._outside() != outside:
            return f"changed what lies outside: {sorted(self._outside().items() ^ outside.items())[:2]}"
        if seconds > SECONDS:
            return f"took {seconds:.0f} s"
        if answer.code not in (0, 2):
            return f"exit {answer.code}: {last_line}"
        if "Traceback (most recent" in answer.out + answer.err:
            return "printed a traceback"
        if answer.code == 2:
            if answer.error is None:
                return f"exit 2 without an error of the user's: {last_line}"
            path = Path(target.path)
            names = (path.name, str(path.parent), path.parent.name, *command.keys)
            is_named = answer.error.key is not None or any(name in answer.err for name in names)
            return None if is_named else f"names neither file nor key: {last_line}"
        if command.result is not rows:
            result = command.result(answer)
            is_input = target.path.startswith(INPUTS) and command.name in TAKES_ANY_MODEL
            return None if is_input or result == self.expected[command.name] else "exit 0 with another result"
        result = rows(answer)
        hurt = Path(target.path.split("/*")[0])
        lost = [row for row in self.expected[command.name] if row not in result]
        lost = [row for row in lost if not any(is_touched(Path(run), hurt) for run in row[0])]
        return f"rows of other runs are lost: {lost}" if lost else None

    def _small_files(self) -> Iterator[bytes]:
        """Yield the content of every small file, which the command may have written."""
        for path in Path().rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1_000_000:
                yield path.read_bytes()


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """End what hangs by an exception."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"hangs: no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds + 5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def writer_of_last_resort(path: Path) -> Iterator[None]:
    """Open a FIFO for writing when the time is over: a library that waits for a writer hears no alarm."""
    if not path.is_fifo():
        yield
        return
    script = f'sleep {SECONDS}; exec 3<>"$1"; sleep 1'
    with subprocess.Popen(["sh", "-c", script, "sh", str(path)], start_new_session=True) as helper:
        try:
            yield
        finally:
            os.killpg(helper.pid, signal.SIGKILL)
