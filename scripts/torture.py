#!/usr/bin/env python3
"""Kill commands at random moments, fill their disk, resume them, and compare with undisturbed ones.

    scripts/torture.py --kills 100

Every training is killed (SIGKILL) `--kills-per-run` times, about half of them inside the writing of a checkpoint, and
resumed after each kill. In the end its weights, predictions, record and log must be those of the same training
undisturbed, bit for bit. A full disk is a limit on the size of files that falls on the process in mid-run.
`--scenario-kills` are spread over packs, halving, ensembles, several tasks, `sweep=methods`, `sweep=transfer`,
`pack.workers=2`, `eval` and `export`: each is killed at moments spread over its duration, run again, and compared.
Children are forked from a process that has trained before, so that nothing is loaded again. Needs a Unix; one thread.
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
sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_bench.cli import main
from lora_bench.data.toy import generate
from lora_bench.training.checkpoint import Checkpoints

METHODS = (
    "adapter=lora adapter.dropout=0.2",
    "adapter=adalora adapter.dropout=0.1",
    "adapter=full",
    "adapter=enhanced",
)
SHORT = [
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
SAME = ("status", "error", "choices", "config", "overrides", "data", "metrics", "selection", "params", "targets")
POLL_SECONDS = 0.0002


@dataclass
class Child:
    """A command of lora-bench's in a process of its own."""

    process: int
    output: int
    """A pipe's end: a limit on the size of files does not hold it up."""
    code: int | None = None

    @classmethod
    def start(cls, *arguments: str) -> Child:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        process = os.fork()
        if process:
            os.close(writing)
            return cls(process, reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        while not self.ended():
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """Kill the process; return False if it had ended before."""
        if not self.ended():
            os.kill(self.process, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def output_text(self) -> str:
        with os.fdopen(self.output, "rb") as file:
            return file.read().decode(errors="replace")


@dataclass
class Score:
    """Trials of one sort, and those that went wrong."""

    what: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    inside: int = 0
    """Kills that left a checkpoint half written."""

    def lose(self, trials: int, why: str) -> None:
        self.lost += trials
        self.wrong.append(why)
        print(f"  LOST: {why}", flush=True)

    def __str__(self) -> str:
        return f"{self.what}: survived {self.tried - self.lost} / {self.tried}"


def content(folder: Path) -> dict[str, Any]:
    """All that must be the same in two runs: what took time is left out."""
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in (".safetensors", ".parquet")}
    return {
        **{key: record[key] for key in SAME},
        "cost": {key: record["cost"].get(key) for key in ("steps", "train_flops")},
        "metrics.jsonl": [{**line, "seconds": None} for line in lines],
        **{name: path.read_bytes() for name, path in files.items()},
    }


def difference(run: Path, whole: Path) -> str | None:
    one, other = content(run), content(whole)
    one["overrides"] = other["overrides"]  # they name the folder
    wrong = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return f"{run.name} differs in {', '.join(wrong)}" if wrong else None


def newest_step(folder: Path) -> int:
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)


def is_writing(folder: Path) -> bool:
    try:
        return any(name.endswith(".part") for name in os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False


def await_moment(child: Child, folder: Path, chance: random.Random) -> None:
    """Until a random moment of the run: as it starts, in a step, or inside the writing of a checkpoint."""
    moment = chance.choice(("start", "step", "write", "write"))
    if moment == "start":
        until = time.monotonic() + chance.uniform(0, 4)
        while time.monotonic() < until and not child.ended():
            time.sleep(0.005)
        return
    target = newest_step(folder) + chance.randint(1, 3) * 2
    while newest_step(folder) < target and not child.ended():
        time.sleep(0.002)
    if moment == "write":
        while not is_writing(folder) and not child.ended():
            time.sleep(POLL_SECONDS)
        time.sleep(chance.choice((0, chance.uniform(0, 0.004), chance.uniform(0, 0.02))))
    else:
        time.sleep(chance.uniform(0, 0.05))


def begin_or_go_on(folder: Path, overrides: list[str]) -> Child:
    if (folder / "run.json").exists():
        return Child.start("train", f"resume={folder}")
    return Child.start("train", *overrides, f"hydra.run.dir={folder}")


def older_is_damaged(folder: Path) -> str | None:
    checkpoints = Checkpoints(folder / "checkpoints")
    there = newest_step(folder)
    newest = checkpoints.newest()
    if checkpoints.damaged or (there and (newest is None or newest.step != there)):
        return f"{folder.name} has a damaged checkpoint: {checkpoints.damaged}"
    return None


def finish(folder: Path, overrides: list[str], whole: Path) -> str | None:
    """Go on to the end, undisturbed; what is wrong with it then."""
    child = begin_or_go_on(folder, overrides)
    if child.wait() != 0:
        return f"{folder.name} ended with {child.code}: {child.output_text()[-500:]}"
    os.close(child.output)
    return difference(folder, whole)


def kill_run(folder: Path, overrides: list[str], whole: Path, kills: int, chance: random.Random, score: Score) -> None:
    done = 0
    while done < kills:
        child = begin_or_go_on(folder, overrides)
        await_moment(child, folder, chance)
        if child.kill():
            done += 1
            score.inside += is_writing(folder)
            wrong = older_is_damaged(folder)
        else:
            wrong = None if child.code == 0 else f"{folder.name} ended with {child.code}: {child.output_text()[-500:]}"
            if wrong is None:
                os.close(child.output)
                break  # it was quicker than the kill
        if wrong:
            score.tried += done
            score.lose(done or 1, wrong)
            return
        if child.code != 0:
            os.close(child.output)
    score.tried += done
    if wrong := finish(folder, overrides, whole):
        score.lose(done, wrong)


def fill_disk(folder: Path, overrides: list[str], whole: Path, chance: random.Random, score: Score) -> None:
    """From a random moment on no file can grow beyond a random size; later there is room again."""
    child = begin_or_go_on(folder, overrides)
    await_moment(child, folder, chance)
    limit = chance.choice((0, 100, 2_000, 20_000, 60_000, 100_000))
    if not child.ended():
        resource.prlimit(child.process, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code, output_text = child.wait(), child.output_text()
    if code == 0:
        return
    score.tried += 1
    wrong = older_is_damaged(folder)
    if code not in (1, 2) or "Traceback" in output_text or "cannot be written" not in output_text:
        wrong = f"{folder.name}, files up to {limit} bytes: ended with {code}: {output_text[-500:]}"
    if wrong := wrong or finish(folder, overrides, whole):
        score.lose(1, wrong)


# -- other commands than a single training --


@dataclass(frozen=True)
class Scenario:
    """A command that is killed and run again."""

    name: str
    arguments: tuple[str, ...]
    """As first given; FOLDER stands for the folder that it writes."""
    again: tuple[str, ...]
    """After a kill, where the file `marker_file` exists."""
    marker_file: str = "sweep.json"
    source: Path | None = None
    """A folder that FOLDER is a copy of at first: a finished run."""

    def start(self, folder: Path) -> Child:
        if self.source and not folder.exists():
            shutil.copytree(self.source, folder)
        arguments = self.again if (folder / self.marker_file).exists() else self.arguments
        return Child.start(*(argument.replace("FOLDER", str(folder)) for argument in arguments))


def scenarios(top: Path) -> list[Scenario]:
    """Every kind of command that trains or writes, as small as it can be. Writes the data that they need."""
    for number, task in enumerate(("one", "two")):
        write_task(top / task, number)
    (top / "conf/data").mkdir(parents=True)
    for number, task in enumerate(("small", "large")):
        settings = f"task: {task}\ntrain_rows: {60 + 40 * number}\nvalidation_rows: 16\ngenerator_seed: {number}\n"
        (top / f"conf/data/{task}.yaml").write_text(f"defaults: [toy, _self_]\n{settings}")
    finished = top / "finished"
    child = Child.start("train", *SHORT, "trainer.max_steps=9", f"hydra.run.dir={finished}")
    if child.wait() != 0:
        sys.exit(f"the run to evaluate failed: {child.output_text()}")
    os.close(child.output)

    tasks = ["--config-dir", f"{top}/conf", *(item for item in SHORT if item != "data=toy" and "_rows" not in item)]
    tasks += ["data.tasks=[small,large]", "trainer.max_steps=40"]
    few = ["hydra.sweeper.shots=[8]", "hydra.sweeper.few.trainer.max_steps=6", "hydra.sweeper.few.trainer.eval_every=3"]
    transfer = [item for item in SHORT if not item.startswith("data")]
    transfer += ["sweep=transfer", "data=pairs", f"data.path={top}/one,{top}/two", *few, "trainer.max_steps=12"]
    transfer += ["hydra.sweeper.few.data.selection_size=8"]
    methods = [*SHORT, "sweep=methods", "adapter=lora,head_only", "optimizer.lr=1e-3,1e-2", "seed=0,1"]
    methods += ["hydra.sweeper.tune.data.train_size=40", "hydra.sweeper.tune.trainer.epochs=2", "trainer.max_steps=16"]
    pack = [*SHORT, "trainer.max_steps=40", "pack.size=16"]
    evaluated = ("eval", "run=FOLDER", "data=pairs", f"data.path={top}/two", "name=two", "device=cpu")
    exported = ("export", "run=FOLDER", "output=FOLDER/exported")

    def run(name: str, *arguments: str) -> Scenario:
        return Scenario(name, ("train", *arguments, "hydra.run.dir=FOLDER"), ("train", "resume=FOLDER"), "run.json")

    def sweep(name: str, *arguments: str) -> Scenario:
        return Scenario(name, ("train", *arguments, "hydra.sweep.dir=FOLDER"), ("train", "-m", "resume=FOLDER"))

    return [
        run("ensemble", *SHORT, "ensemble.members=3", "trainer.max_steps=40"),
        run("several tasks", *tasks),
        run("several tasks, own adapters", *tasks, "data.share=backbone"),
        sweep("pack", "-m", *pack, "seed=0,1,2"),
        sweep("jobs in a row", "-m", *pack, "pack.size=1", "adapter=lora,full"),
        sweep("halving", "-m", *pack, "pack.halving=true", "optimizer.lr=1e-4,1e-3,1e-2,3e-2"),
        sweep("sweep=methods", *methods),
        sweep("sweep=transfer", *transfer),
        sweep("pack.workers=2", "-m", *pack, "pack.workers=2", "trainer.threads=null", "seed=0,1,2,3"),
        Scenario("eval", evaluated, evaluated, "run.json", finished),
        Scenario(
            "export format=merged", (*exported, "format=merged"), (*exported, "format=merged"), "run.json", finished
        ),
        Scenario("export format=peft", (*exported, "format=peft"), (*exported, "format=peft"), "run.json", finished),
    ]


def write_task(folder: Path, seed: int) -> None:
    """Generated pairs as train.tsv and validation.tsv."""
    folder.mkdir()
    for split, rows in (("train", 60), ("validation", 24)):
        examples = generate(rows, seed, split)
        assert examples.labels is not None
        table = zip(*examples.texts, examples.labels.tolist(), strict=True)
        lines = ["question1\tquestion2\tlabel", *("\t".join(map(str, row)) for row in table)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def outcome(folder: Path) -> dict[str, Any]:
    """All that a killed command must leave as the undisturbed one does: runs, evaluations, exports and tables."""
    contents: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "run.json":
            runs = content(path.parent)
            contents[name] = json.loads(json.dumps({k: v for k, v in runs.items() if not isinstance(v, bytes)}))
            contents[name].pop("overrides")  # they name the folder
        elif path.suffix in (".safetensors", ".parquet"):
            contents[name] = path.read_bytes()
        elif path.suffix == ".csv":
            contents[name] = untimed(path)
        elif "evaluations" in path.parts or "exported" in path.parts:
            contents[name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
    text = json.dumps(contents, default=lambda held: sha256(held).hexdigest())
    return {k: drop_times(v) for k, v in json.loads(text.replace(str(folder), "FOLDER")).items()}


def drop_times(value: Any) -> Any:
    """A JSON value without what differs from one execution to the next."""
    if isinstance(value, dict):
        return {k: drop_times(v) for k, v in value.items() if k not in ("seconds", "created", "finished")}
    return [drop_times(v) for v in value] if isinstance(value, list) else value


def untimed(path: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table without the columns of time, memory and number of members."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = ("seconds", "memory", "per_second", "pack_size", "bytes", "rate", "time saved")
    return [{key: value for key, value in row.items() if not any(word in key for word in measured)} for row in rows]


def kill_scenario(scenario: Scenario, top: Path, kills: int, chance: random.Random, score: Score) -> None:
    """Kill a command at moments spread over its duration, run it again each time, and compare what is left."""
    whole = top / "whole"
    began = time.monotonic()
    child = scenario.start(whole)
    if child.wait() != 0:
        sys.exit(f"{scenario.name}: the undisturbed command failed: {child.output_text()}")
    os.close(child.output)
    seconds, expected = time.monotonic() - began, outcome(whole)
    number = 0
    while score.tried < kills:
        folder, done = top / str(number), 0
        number += 1
        while True:
            child = scenario.start(folder)
            if score.tried + done < kills:
                until = time.monotonic() + chance.uniform(0, seconds)
                while time.monotonic() < until and not child.ended():
                    time.sleep(0.001)
                if child.kill():
                    done += 1
                    os.close(child.output)
                    continue
            break
        score.tried += done
        if child.wait() != 0:
            score.lose(
                done or 1, f"{scenario.name} {folder.name} ended with {child.code}: {child.output_text()[-500:]}"
            )
            continue
        os.close(child.output)
        contents = outcome(folder)
        wrong = [name for name in sorted(contents.keys() | expected.keys()) if contents.get(name) != expected.get(name)]
        if wrong:
            score.lose(done or 1, f"{scenario.name} {folder.name} differs in {', '.join(wrong)[:500]}")
        shutil.rmtree(folder)


def torture(options: argparse.Namespace, top: Path) -> list[Score]:
    for number, method in enumerate(METHODS):
        with redirect_stdout(io.StringIO()):
            main(["train", *SHORT, *method.split(), "trainer.max_steps=9", f"hydra.run.dir={top / f'warm-{number}'}"])
    gc.freeze()
    chance = random.Random(options.seed)
    kills, disk = Score("SIGKILL of a training"), Score("full disk")

    def undisturbed(name: str, *arguments: str) -> Path:
        child = Child.start("train", *arguments, f"hydra.run.dir={top / name}")
        if child.wait() != 0:
            sys.exit(f"the undisturbed run failed: {child.output_text()}")
        os.close(child.output)
        return top / name

    number = 0
    while kills.tried < options.kills or disk.tried < options.full_disk:
        overrides = [
            *SHORT,
            *METHODS[number % len(METHODS)].split(),
            f"seed={options.seed + number}",
            "trainer.max_steps=60",
        ]
        whole = undisturbed(f"whole-{number}", *overrides)
        kills_of_run = min(options.kills_per_run, options.kills - kills.tried)
        if kills_of_run > 0:
            kill_run(top / f"killed-{number}", overrides, whole, kills_of_run, chance, kills)
        if disk.tried < options.full_disk:
            fill_disk(top / f"full-{number}", overrides, whole, chance, disk)
        number += 1
        print(
            f"run {number}, seed {options.seed + number - 1}: {kills} ({kills.inside} inside a write); {disk}",
            flush=True,
        )
    scores = [kills, disk]
    commands = scenarios(top) if options.scenario_kills else []
    for number, scenario in enumerate(commands):
        # the first of them get one more where the kills cannot be shared out evenly
        share = options.scenario_kills // len(commands) + (number < options.scenario_kills % len(commands))
        score = Score(f"SIGKILL, {scenario.name}")
        scores.append(score)
        with tempfile.TemporaryDirectory(dir=top) as folder:
            kill_scenario(scenario, Path(folder), share, chance, score)
        print(score, flush=True)
    return scores


def cli() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of single trainings")
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--full-disk", type=int, default=10, help="disks that fill up")
    parser.add_argument("--scenario-kills", type=int, default=100, help="kills of packs, sweeps, eval and export")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the trainings")
    options = parser.parse_args()
    print(f"seed {options.seed}; moments are in seconds, so a second pass hits other ones", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_BENCH_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        scores = torture(options, Path(folder))
    for score in scores:
        print(score)
    tried, lost = sum(score.tried for score in scores), sum(score.lost for score in scores)
    print(f"all: survived {tried - lost} / {tried}")
    print(f"{scores[0].inside} of the kills fell into the writing of a checkpoint; {time.monotonic() - began:.0f} s")
    return 1 if any(score.lost for score in scores) else 0


if __name__ == "__main__":
    sys.exit(cli())
