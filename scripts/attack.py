#!/usr/bin/env python3
"""Damage every file that a command reads, in every way, and run every command that reads it.

    scripts/attack.py                                  every file, damage and command
    scripts/attack.py --only sweep.json --first        some files, each with its first command
    scripts/attack.py --damage fifo --damage deep

Each attack runs in a child that is forked from a process with everything loaded. It has 60 seconds and 6 GiB. An attack
that fails prints a line with file, damage, command and reason. A table follows. The exit code is 1 if any attack fails.
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

    Damage = Callable[[Path], None]

MEMORY_BYTES = 6 * 2**30
"""Address space beyond that of the parent: a child that reads /dev/zero or a huge file reaches this limit."""


def attack_in_child(world: World, target: Target, damage: Damage, command: Command, seconds: int) -> str | None:
    """Run an attack in a child process; return what went wrong, or None."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.setpgid(0, 0)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
            failure = world.attack(target, damage, command) or ""
        except BaseException as error:
            failure = f"{type(error).__name__}: {str(error)[:300]}"
        os.write(write_end, failure.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(write_end)
    deadline = time.monotonic() + seconds + 10
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read_end)
            return f"hangs: killed after {seconds + 10} s"
        time.sleep(0.005)
    with os.fdopen(read_end, "rb") as file:
        failure = file.read().decode()
    code = os.waitstatus_to_exitcode(status)
    return failure or (f"the process ended with {code}" if code else None)


def select_attacks(options: argparse.Namespace) -> list[tuple[Target, Damage, str]]:
    """Return the attacks that the options select: a file, a damage, and the name of a command."""
    targets = [target for target in TARGETS if not options.only or any(text in target.path for text in options.only)]
    commands = options.command or list(COMMANDS)
    attacks = [
        (target, damage, name)
        for target in targets
        for name in (target.commands[:1] if options.first else target.commands)
        for damage in damages_of(target)
        if name in commands and (not options.damage or damage.__name__ in options.damage)
    ]
    if options.by_damage:
        attacks.sort(key=lambda attack: attack[1].__name__)
    return attacks


def run_attacks(attacks: list[tuple[Target, Damage, str]], folder: Path, seconds: int) -> int:
    """Run the attacks on a world in this folder, print failures and the table, and return how many failed."""
    start = time.monotonic()
    attempts: Counter[tuple[str, str]] = Counter()
    failures: Counter[tuple[str, str]] = Counter()
    world = World(folder)
    world.build({name for _, _, name in attacks})
    gc.freeze()
    print(f"{len(attacks)} attacks; building the world took {time.monotonic() - start:.0f} s", flush=True)
    for target, damage, name in attacks:
        world.restore()
        failure = attack_in_child(world, target, damage, COMMANDS[name], seconds)
        attempts[target.path, name] += 1
        if failure is not None:
            failures[target.path, name] += 1
            print(f"{target.path} | {damage.__name__} | {name} | {failure!r}", flush=True)
    print(f"\n{'file':48} {'command':20} held")
    for (path, name), count in attempts.items():
        print(f"{path:48} {name:20} {count - failures[path, name]} / {count}")
    held = attempts.total() - failures.total()
    print(f"{held} of {attempts.total()} attacks held in {time.monotonic() - start:.0f} s")
    return failures.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="files whose path contains TEXT")
    parser.add_argument("--damage", action="append", default=[], metavar="NAME", help="a damage, as fifo")
    parser.add_argument("--command", action="append", default=[], choices=list(COMMANDS))
    parser.add_argument("--first", action="store_true", help="only the first command of each file")
    parser.add_argument("--world", type=Path, metavar="DIR", help="keep the world in DIR, or use the one that is there")
    parser.add_argument("--by-damage", action="store_true", help="apply each damage to all files before the next one")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time limit of a command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = (options.world or Path(folder, "world")).absolute()
        failed = run_attacks(select_attacks(options), world, options.seconds)
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
