#!/usr/bin/env python3
"""Kill commands at random moments, fill their disk, resume them, and compare with undisturbed ones.

    scripts/torture.py --kills 100

Every training is killed (SIGKILL) `--kills-per-run` times, about half of them while it writes a checkpoint, and resumed
after each kill. In the end its weights, predictions, record and log must equal those of the same training undisturbed,
bit for bit. A full disk is a limit on the size of files, set on the process in mid-run. `--scenario-kills` are spread
over packs, halving, ensembles, several tasks, `sweep=methods`, `sweep=transfer`, `pack.workers=2`, `eval` and `export`.
Each of these is killed at moments spread over its duration, run again, and compared. Children are forked from a process
that has trained before, so that nothing is loaded again. Unix only; one thread.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from lora_bench.cli import main as lora_bench
from lora_bench.data.toy import generate
from lora_bench.training.checkpoint import Checkpoints

METHODS = (
    "adapter=lora adapter.dropout=0.2",
    "adapter=adalora adapter.dropout=0.1",
    "adapter=full",
    "adapter=enhanced",
)
SHORT_RUN = [
    "model=tiny_bert",
    "data=toy",
    "data.train_rows=120",
    "data.validation_rows=40",
    "trainer.precision=fp32",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.batch_size=16",
    "trainer.epochs=999",
    "trainer.eval_every=9",
    "trainer.checkpoint_every=2",
]
COMPARED_KEYS = (
    "status",
    "error",
    "choices",
    "config",
    "overrides",
    "data",
    "metrics",
    "selection",
    "params",
    "targets",
)
POLL_SECONDS = 0.0002
DISK_LIMITS = (0, 100, 2_000, 20_000, 60_000, 100_000)
"""Sizes in bytes that files cannot exceed on a full disk."""


@dataclass
class Child:
    """A command of lora-bench in a process of its own."""

    process: int
    output: int
    """The read end of a pipe, which a limit on the size of files does not affect."""
    code: int | None = None

    @classmethod
    def start(cls, *arguments: str) -> Child:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        process = os.fork()
        if process:
            os.close(write_end)
            return cls(process, read_end)
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = lora_bench(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @classmethod
    def complete(cls, *arguments: str) -> None:
        """Run a command undisturbed, and end this process if it fails."""
        child = cls.start(*arguments)
        if child.wait() != 0:
            sys.exit(f"the undisturbed command failed: {' '.join(arguments)}\n{child.read_output()}")
        child.close()

    def has_ended(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        while not self.has_ended():
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def wait_for_seconds(self, seconds: float) -> None:
        """Wait so many seconds, or until the process ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.has_ended():
            time.sleep(0.001)

    def kill(self) -> bool:
        """Kill the process; return False if it had ended before."""
        if not self.has_ended():
            os.kill(self.process, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def read_output(self) -> str:
        """Return the output and close the pipe."""
        with os.fdopen(self.output, "rb") as file:
            return file.read().decode(errors="replace")

    def close(self) -> None:
        os.close(self.output)

    def failure(self, name: str) -> str:
        """Describe an unexpected exit code."""
        return f"{name} ended with {self.code}: {self.read_output()[-500:]}"


@dataclass
class Score:
    """Trials of one sort, and those that failed."""

    trial: str
    tried: int = 0
    lost: int = 0
    during_write: int = 0
    """Kills that left a checkpoint half written."""
    failures: list[str] = field(default_factory=list)

    def lose(self, trials: int, failure: str) -> None:
        self.lost += trials
        self.failures.append(failure)
        print(f"  LOST: {failure}", flush=True)

    def __str__(self) -> str:
        return f"{self.trial}: survived {self.tried - self.lost} / {self.tried}"


# -- single trainings --


def read_run(folder: Path) -> dict[str, Any]:
    """Return what two equal runs have in common: record, log, weights and predictions, without times."""
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in (".safetensors", ".parquet")}
    return {
        **{key: record[key] for key in COMPARED_KEYS},
        "cost": {key: record["cost"].get(key) for key in ("steps", "train_flops")},
        "metrics.jsonl": [{**line, "seconds": None} for line in lines],
        **{name: path.read_bytes() for name, path in files.items()},
    }


def compare_runs(run: Path, reference: Path) -> str | None:
    """Return the keys and files in which a run differs from the undisturbed one, if any."""
    actual, expected = read_run(run), read_run(reference)
    actual["overrides"] = expected["overrides"]  # they name the folder
    keys = [key for key in sorted(actual.keys() | expected.keys()) if actual.get(key) != expected.get(key)]
    return f"{run.name} differs in {', '.join(keys)}" if keys else None


def newest_step(folder: Path) -> int:
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)


def is_writing(folder: Path) -> bool:
    try:
        return any(name.endswith(".part") for name in os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False


def wait_for_moment(child: Child, folder: Path, rng: random.Random) -> None:
    """Wait until a random moment of a run: while it starts, in a step, or while it writes a checkpoint."""
    moment = rng.choice(("start", "step", "write", "write"))
    if moment == "start":
        child.wait_for_seconds(rng.uniform(0, 4))
        return
    target = newest_step(folder) + rng.randint(1, 3) * 2
    while newest_step(folder) < target and not child.has_ended():
        time.sleep(0.002)
    if moment == "write":
        while not is_writing(folder) and not child.has_ended():
            time.sleep(POLL_SECONDS)
        time.sleep(rng.choice((0, rng.uniform(0, 0.004), rng.uniform(0, 0.02))))
    else:
        time.sleep(rng.uniform(0, 0.05))


def start_or_resume(folder: Path, overrides: list[str]) -> Child:
    if (folder / "run.json").exists():
        return Child.start("train", f"resume={folder}")
    return Child.start("train", *overrides, f"hydra.run.dir={folder}")


def check_checkpoints(folder: Path) -> str | None:
    """Return which finished checkpoint is damaged, if any."""
    checkpoints = Checkpoints(folder / "checkpoints")
    step = newest_step(folder)
    newest = checkpoints.newest()
    if checkpoints.damaged or (step and (newest is None or newest.step != step)):
        return f"{folder.name} has a damaged checkpoint: {checkpoints.damaged}"
    return None


def finish(folder: Path, overrides: list[str], reference: Path) -> str | None:
    """Resume a run to its end, undisturbed, and return how it differs from the reference, if at all."""
    child = start_or_resume(folder, overrides)
    if child.wait() != 0:
        return child.failure(folder.name)
    child.close()
    return compare_runs(folder, reference)


def kill_run(folder: Path, overrides: list[str], reference: Path, kills: int, rng: random.Random, score: Score) -> None:
    """Kill a training and resume it, so many times or until it ends; then compare it with the reference."""
    done = 0
    while done < kills:
        child = start_or_resume(folder, overrides)
        wait_for_moment(child, folder, rng)
        if child.kill():
            child.close()
            done += 1
            score.during_write += is_writing(folder)
            failure = check_checkpoints(folder)
        elif child.code == 0:
            child.close()
            break  # it ended before the kill
        else:
            failure = child.failure(folder.name)
        if failure:
            score.tried += done
            score.lose(done or 1, failure)
            return
    score.tried += done
    if failure := finish(folder, overrides, reference):
        score.lose(done, failure)


def fill_disk(folder: Path, overrides: list[str], reference: Path, rng: random.Random, score: Score) -> None:
    """Limit the size of files from a random moment on; then lift the limit, resume, and compare with the reference."""
    child = start_or_resume(folder, overrides)
    wait_for_moment(child, folder, rng)
    limit = rng.choice(DISK_LIMITS)
    if not child.has_ended():
        resource.prlimit(child.process, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code, output = child.wait(), child.read_output()
    if code == 0:
        return
    score.tried += 1
    failure = check_checkpoints(folder)
    if code not in (1, 2) or "Traceback" in output or "cannot be written" not in output:
        failure = f"{folder.name}, files up to {limit} bytes: ended with {code}: {output[-500:]}"
    if failure := failure or finish(folder, overrides, reference):
        score.lose(1, failure)


def torture_runs(options: argparse.Namespace, top: Path, rng: random.Random) -> list[Score]:
    """Kill single trainings and fill their disk, with one seed after another."""
    kills, disk = Score("SIGKILL of a training"), Score("full disk")
    number = 0
    while kills.tried < options.kills or disk.tried < options.full_disk:
        seed = options.seed + number
        method = METHODS[number % len(METHODS)].split()
        overrides = [*SHORT_RUN, *method, f"seed={seed}", "trainer.max_steps=60"]
        reference = top / f"reference-{number}"
        Child.complete("train", *overrides, f"hydra.run.dir={reference}")
        kills_of_run = min(options.kills_per_run, options.kills - kills.tried)
        if kills_of_run > 0:
            kill_run(top / f"killed-{number}", overrides, reference, kills_of_run, rng, kills)
        if disk.tried < options.full_disk:
            fill_disk(top / f"full-{number}", overrides, reference, rng, disk)
        number += 1
        print(f"run {number}, seed {seed}: {kills} ({kills.during_write} during a write); {disk}", flush=True)
    return [kills, disk]


# -- other commands --


@dataclass(frozen=True)
class Scenario:
    """A command that is killed and run again."""

    name: str
    arguments: tuple[str, ...]
    """As first given; FOLDER stands for the folder that it writes."""
    again: tuple[str, ...]
    """After a kill, if the file `marker_file` exists."""
    marker_file: str = "sweep.json"
    source: Path | None = None
    """A folder that FOLDER is a copy of at first: a finished run."""

    def start(self, folder: Path) -> Child:
        if self.source and not folder.exists():
            shutil.copytree(self.source, folder)
        arguments = self.again if (folder / self.marker_file).exists() else self.arguments
        return Child.start(*(argument.replace("FOLDER", str(folder)) for argument in arguments))

    @classmethod
    def run(cls, name: str, *arguments: str) -> Scenario:
        return cls(name, ("train", *arguments, "hydra.run.dir=FOLDER"), ("train", "resume=FOLDER"), "run.json")

    @classmethod
    def sweep(cls, name: str, *arguments: str) -> Scenario:
        return cls(name, ("train", *arguments, "hydra.sweep.dir=FOLDER"), ("train", "-m", "resume=FOLDER"))

    @classmethod
    def of_finished_run(cls, name: str, source: Path, *arguments: str) -> Scenario:
        return cls(name, arguments, arguments, "run.json", source)


def list_scenarios(top: Path) -> list[Scenario]:
    """Write the data that the scenarios need, and return one small command of every sort that trains or writes."""
    for seed, task in enumerate(("one", "two")):
        write_task(top / task, seed)
    (top / "conf/data").mkdir(parents=True)
    for seed, task in enumerate(("small", "large")):
        settings = f"task: {task}\ntrain_rows: {60 + 40 * seed}\nvalidation_rows: 16\ngenerator_seed: {seed}\n"
        (top / f"conf/data/{task}.yaml").write_text(f"defaults: [toy, _self_]\n{settings}")
    finished = top / "finished"
    Child.complete("train", *SHORT_RUN, "trainer.max_steps=9", f"hydra.run.dir={finished}")

    without_data = [override for override in SHORT_RUN if not override.startswith("data")]
    tasks = ["--config-dir", f"{top}/conf", *without_data, "data.tasks=[small,large]", "trainer.max_steps=40"]
    few = ["hydra.sweeper.shots=[8]", "hydra.sweeper.few.trainer.max_steps=6", "hydra.sweeper.few.trainer.eval_every=3"]
    few += ["hydra.sweeper.few.data.selection_size=8"]
    pairs = ["data=pairs", f"data.path={top}/one,{top}/two", "trainer.max_steps=12"]
    methods = ["adapter=lora,head_only", "optimizer.lr=1e-3,1e-2", "seed=0,1", "trainer.max_steps=16"]
    tuning = ["hydra.sweeper.tune.data.train_size=40", "hydra.sweeper.tune.trainer.epochs=2"]
    pack = ["-m", *SHORT_RUN, "trainer.max_steps=40", "pack.size=16"]
    in_a_row = ["-m", *SHORT_RUN, "trainer.max_steps=40", "pack.size=1", "adapter=lora,full"]
    workers = ["pack.workers=2", "trainer.threads=null", "seed=0,1,2,3"]
    export = ("export", "run=FOLDER", "output=FOLDER/exported")
    evaluate = ("eval", "run=FOLDER", "data=pairs", f"data.path={top}/two", "name=two", "device=cpu")
    return [
        Scenario.run("ensemble", *SHORT_RUN, "ensemble.members=3", "trainer.max_steps=40"),
        Scenario.run("several tasks", *tasks),
        Scenario.run("several tasks, own adapters", *tasks, "data.share=backbone"),
        Scenario.sweep("pack", *pack, "seed=0,1,2"),
        Scenario.sweep("jobs in a row", *in_a_row),
        Scenario.sweep("halving", *pack, "pack.halving=true", "optimizer.lr=1e-4,1e-3,1e-2,3e-2"),
        Scenario.sweep("sweep=methods", *SHORT_RUN, "sweep=methods", *methods, *tuning),
        Scenario.sweep("sweep=transfer", *without_data, "sweep=transfer", *pairs, *few),
        Scenario.sweep("pack.workers=2", *pack, *workers),
        Scenario.of_finished_run("eval", finished, *evaluate),
        Scenario.of_finished_run("export format=merged", finished, *export, "format=merged"),
        Scenario.of_finished_run("export format=peft", finished, *export, "format=peft"),
    ]


def write_task(folder: Path, seed: int) -> None:
    """Write generated pairs as train.tsv and validation.tsv."""
    folder.mkdir()
    for split, rows in (("train", 60), ("validation", 24)):
        examples = generate(rows, seed, split)
        assert examples.labels is not None
        table = zip(*examples.texts, examples.labels.tolist(), strict=True)
        lines = ["question1\tquestion2\tlabel", *("\t".join(map(str, row)) for row in table)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """Return what a killed command must leave as the undisturbed one does: runs, evaluations, exports and tables."""
    contents: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "run.json":
            run = read_run(path.parent)
            contents[name] = {key: value for key, value in run.items() if not isinstance(value, bytes)}
            contents[name].pop("overrides")  # they name the folder
        elif path.suffix in (".safetensors", ".parquet"):
            contents[name] = path.read_bytes()
        elif path.suffix == ".csv":
            contents[name] = read_untimed_rows(path)
        elif "evaluations" in path.parts or "exported" in path.parts:
            contents[name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
    text = json.dumps(contents, default=lambda content: sha256(content).hexdigest())
    return {name: drop_times(value) for name, value in json.loads(text.replace(str(folder), "FOLDER")).items()}


def drop_times(value: Any) -> Any:
    """Return a JSON value without what differs from one execution to the next."""
    if isinstance(value, dict):
        return {k: drop_times(v) for k, v in value.items() if k not in ("seconds", "created", "finished")}
    return [drop_times(v) for v in value] if isinstance(value, list) else value


def read_untimed_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a sweep's table without the columns of time, memory and number of members."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = ("seconds", "memory", "per_second", "pack_size", "bytes", "rate", "time saved")
    return [{key: value for key, value in row.items() if not any(word in key for word in measured)} for row in rows]


def kill_scenario(scenario: Scenario, top: Path, kills: int, rng: random.Random, score: Score) -> None:
    """Kill a command at moments spread over its duration, run it again each time, and compare its results."""
    start = time.monotonic()
    child = scenario.start(top / "reference")
    if child.wait() != 0:
        sys.exit(f"the undisturbed command failed: {child.failure(scenario.name)}")
    child.close()
    seconds, expected = time.monotonic() - start, read_results(top / "reference")
    number = 0
    while score.tried < kills:
        folder, done = top / str(number), 0
        number += 1
        child = scenario.start(folder)
        while score.tried + done < kills:
            child.wait_for_seconds(rng.uniform(0, seconds))
            if not child.kill():
                break
            child.close()
            done += 1
            child = scenario.start(folder)
        score.tried += done
        if child.wait() != 0:
            score.lose(done or 1, child.failure(f"{scenario.name} {folder.name}"))
            continue
        child.close()
        results = read_results(folder)
        names = [name for name in sorted(results.keys() | expected.keys()) if results.get(name) != expected.get(name)]
        if names:
            score.lose(done or 1, f"{scenario.name} {folder.name} differs in {', '.join(names)[:500]}")
        shutil.rmtree(folder)


def torture_scenarios(kills: int, top: Path, rng: random.Random) -> list[Score]:
    """Share the kills out among all scenarios."""
    scores = []
    scenarios = list_scenarios(top) if kills else []
    for number, scenario in enumerate(scenarios):
        share = kills // len(scenarios) + (number < kills % len(scenarios))  # the first ones get the remainder
        scores.append(Score(f"SIGKILL, {scenario.name}"))
        with tempfile.TemporaryDirectory(dir=top) as folder:
            kill_scenario(scenario, Path(folder), share, rng, scores[-1])
        print(scores[-1], flush=True)
    return scores


def torture(options: argparse.Namespace, top: Path) -> list[Score]:
    """Warm this process up, then run all trials."""
    for number, method in enumerate(METHODS):
        with redirect_stdout(io.StringIO()):
            warm_up = [*SHORT_RUN, *method.split(), "trainer.max_steps=9", f"hydra.run.dir={top / f'warm-{number}'}"]
            lora_bench(["train", *warm_up])
    gc.freeze()
    rng = random.Random(options.seed)
    return [*torture_runs(options, top, rng), *torture_scenarios(options.scenario_kills, top, rng)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of single trainings")
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--full-disk", type=int, default=10, help="disks that fill up")
    parser.add_argument("--scenario-kills", type=int, default=100, help="kills of packs, sweeps, eval and export")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the trainings")
    options = parser.parse_args()
    print(f"seed {options.seed}; moments are in seconds, so a second pass hits other ones", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_BENCH_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        scores = torture(options, Path(folder))
        os.chdir("/")
    for score in scores:
        print(score)
    tried, lost = sum(score.tried for score in scores), sum(score.lost for score in scores)
    print(f"all: survived {tried - lost} / {tried}")
    print(
        f"{scores[0].during_write} of the kills fell into the writing of a checkpoint; {time.monotonic() - start:.0f} s"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
