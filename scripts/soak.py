#!/usr/bin/env python3
"""100 runs and then 50 packs in one process: memory, files, threads and the cache stay flat.

    scripts/soak.py [RUNS [PACKS]]

Prints for each of the two the mean resident memory in the first and in the last quarter after a warm-up, and the open
files, threads, temporary files and bytes of cache after the first and after the last. Exits with 1 where memory grew
by more than 5 % or any of the others grew at all. Linux only.
"""

import contextlib
import io
import os
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lora_bench.cli import main

WARM_UP = 10
SHORT = ["model=tiny_bert", "data=toy", "data.train_rows=40", "data.validation_rows=16", "trainer.precision=fp32"]
SHORT += ["trainer.device=cpu", "trainer.max_steps=2"]


@dataclass(frozen=True)
class Usage:
    """Return what the process holds that would grow with a leak."""

    open_files: int
    threads: int
    temporary_files: int
    cache_bytes: int

    @classmethod
    def now(cls, top: Path) -> "Usage":
        cached = [path.stat().st_size for path in (top / "cache").rglob("*") if path.is_file()]
        temporary = sum(1 for _ in (top / "tmp").rglob("*"))
        return cls(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), temporary, sum(cached))


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(["train", *SHORT, *arguments])
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    if code:
        sys.exit(f"{' '.join(arguments)} ended with {code}: {errors.getvalue()}")


def soak(name: str, count: int, top: Path) -> bool:
    """Repeat the command, print what grew, and return whether nothing did."""
    memory, usage = [], []
    for number in range(WARM_UP + count):
        if name == "runs":
            run(f"seed={number}", f"hydra.run.dir=runs/{number}")
        else:
            run("-m", f"seed={number},{number + 1}", "pack.size=16", f"hydra.sweep.dir=packs/{number}")
        if number >= WARM_UP:
            memory.append(resident_megabytes())
            usage.append(Usage.now(top))
    quarter = max(1, count // 4)
    first, last = sum(memory[:quarter]) / quarter, sum(memory[-quarter:]) / quarter
    print(f"{count} {name}: resident memory {first:.1f} MB in the first {quarter}, {last:.1f} MB in the last: ", end="")
    print(f"{100 * (last / first - 1):+.2f} %\n  first {usage[0]}\n  last  {usage[-1]}", flush=True)
    grown = any(after > before for before, after in zip(astuple(usage[0]), astuple(usage[-1]), strict=True))
    return last <= 1.05 * first and not grown


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    packs = int(sys.argv[2]) if len(sys.argv) > 2 else runs // 2
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(top / "tmp")
        os.environ["LORA_BENCH_CACHE"] = str(top / "cache")
        os.chdir(folder)
        flat = [soak("runs", runs, top), soak("packs", packs, top)]
        os.chdir("/")
    sys.exit(not all(flat))
