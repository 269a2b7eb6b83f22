#!/usr/bin/env python3
"""Damage every file that a command reads, in every way, and run every command that reads it.

    scripts/attack.py                                  the whole product
    scripts/attack.py --only sweep.json --first        some files, each with its first command
    scripts/attack.py --damage fifo --damage deep

Each attack runs in a child that is forked from a process with everything loaded; it has 60 seconds and 6 GiB. A line
for each attack that fails: file, damage, command and what went wrong; then a table. Exits with 1 where any fails.
Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.security.attacks import COMMANDS, SECONDS, TARGETS, Command, Target, World, damages_of

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_BYTES = 6 * 2**30
"""Of address space beyond what the parent has: a child that reads /dev/zero or a huge file meets it."""


def attacked(
    world: World, target: Target, damage: Callable[[Path], None], command: Command, seconds: int
) -> str | None:
    """Return what went wrong in a child of its own; None where all is right."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
            wrong = world.attack(target, damage, command) or ""
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        os.write(writing, wrong.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writing)
    until = time.monotonic() + seconds + 10
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return f"hangs: killed after {seconds + 10} s"
        time.sleep(0.005)
    with os.fdopen(reading, "rb") as file:
        wrong = file.read().decode()
    code = os.waitstatus_to_exitcode(status)
    return wrong or (f"the process ended with {code}" if code else None)


def cli() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="files whose path holds this")
    parser.add_argument("--damage", action="append", default=[], help="a name of a damage")
    parser.add_argument("--command", action="append", default=[], choices=list(COMMANDS))
    parser.add_argument("--first", action="store_true", help="of each file's commands only the first")
    parser.add_argument("--world", type=Path, help="a folder to keep the world in, or where one was kept")
    parser.add_argument("--by-damage", action="store_true", help="each damage of all files before the next one")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="a command that takes longer hangs")
    options = parser.parse_args()
    began = time.monotonic()
    tried: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    chosen = [target for target in TARGETS if not options.only or any(text in target.path for text in options.only)]
    commands = options.command or list(COMMANDS)
    attacks = [
        (target, damage, name)
        for target in chosen
        for name in (target.commands[:1] if options.first else target.commands)
        for damage in damages_of(target)
        if name in commands and (not options.damage or damage.__name__ in options.damage)
    ]
    if options.by_damage:
        attacks.sort(key=lambda attack: attack[1].__name__)
    with tempfile.TemporaryDirectory() as top:
        world = World((options.world or Path(top, "top")).absolute())
        world.build({name for _, _, name in attacks})
        gc.freeze()
        print(f"{len(attacks)} attacks; the world was made in {time.monotonic() - began:.0f} s", flush=True)
        for target, damage, name in attacks:
            world.restore()
            wrong = attacked(world, target, damage, COMMANDS[name], options.seconds)
            tried[target.path, name] += 1
            if wrong is not None:
                failed[target.path, name] += 1
                print(f"{target.path} | {damage.__name__} | {name} | {wrong!r}", flush=True)
        os.chdir("/")
    print(f"\n{'file':48} {'command':20} held")
    for (path, name), number in tried.items():
        print(f"{path:48} {name:20} {number - failed[path, name]} / {number}")
    print(f"{tried.total() - failed.total()} of {tried.total()} attacks held in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli())
