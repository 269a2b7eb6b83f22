#!/usr/bin/env python3
"""Repeat 100 runs and then 50 packs in one process: memory, files, threads and the cache stay flat.

    scripts/soak.py [RUNS [PACKS]]

For each of the two it prints the mean resident memory in the first and in the last quarter after a warm-up. It also
prints open files, threads, temporary files and bytes of cache after the first and after the last. The exit code is 1 if
memory grew by more than 5 % or any of the others grew at all. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lora_bench.cli import main as lora_bench

WARM_UP = 10
SHORT_RUN = [
    "model=tiny_bert",
    "data=toy",
    "data.train_rows=40",
    "data.validation_rows=16",
    "trainer.precision=fp32",
    "trainer.device=cpu",
    "trainer.max_steps=2",
]


@dataclass(frozen=True)
class Usage:
    """The resources of this process that a leak would make grow."""

    open_files: int
    threads: int
    temporary_files: int
    cache_bytes: int

    @classmethod
    def measure(cls, top: Path) -> Usage:
        cache_sizes = [path.stat().st_size for path in (top / "cache").rglob("*") if path.is_file()]
        temporary_files = sum(1 for _ in (top / "tmp").rglob("*"))
        open_files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        return cls(open_files, threads, temporary_files, sum(cache_sizes))


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def train(*arguments: str) -> None:
    """Run `lora-bench train` without output, and end this process if it fails."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = lora_bench(["train", *SHORT_RUN, *arguments])
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    if code:
        sys.exit(f"{' '.join(arguments)} ended with {code}: {errors.getvalue()}")


def soak(command: str, count: int, top: Path) -> bool:
    """Repeat `runs` or `packs`, print what grew, and return whether nothing did."""
    memory, usage = [], []
    for repetition in range(WARM_UP + count):
        if command == "runs":
            train(f"seed={repetition}", f"hydra.run.dir=runs/{repetition}")
        else:
            seeds = f"seed={repetition},{repetition + 1}"
            train("-m", seeds, "pack.size=16", f"hydra.sweep.dir=packs/{repetition}")
        if repetition >= WARM_UP:
            memory.append(resident_megabytes())
            usage.append(Usage.measure(top))
    quarter = max(1, count // 4)
    first, last = sum(memory[:quarter]) / quarter, sum(memory[-quarter:]) / quarter
    print(
        f"{count} {command}: resident memory {first:.1f} MB in the first {quarter}, {last:.1f} MB in the last: ", end=""
    )
    print(f"{100 * (last / first - 1):+.2f} %\n  first {usage[0]}\n  last  {usage[-1]}", flush=True)
    grown = any(after > before for before, after in zip(astuple(usage[0]), astuple(usage[-1]), strict=True))
    return last <= 1.05 * first and not grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=100, metavar="RUNS")
    parser.add_argument("packs", type=int, nargs="?", metavar="PACKS", help="half of RUNS by default")
    options = parser.parse_args()
    packs = options.runs // 2 if options.packs is None else options.packs
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(top / "tmp")
        os.environ["LORA_BENCH_CACHE"] = str(top / "cache")
        os.chdir(folder)
        is_flat = [soak("runs", options.runs, top), soak("packs", packs, top)]
        os.chdir("/")
    return 0 if all(is_flat) else 1


if __name__ == "__main__":
    sys.exit(main())
