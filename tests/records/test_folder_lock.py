"""A folder's claim ends with the process that holds it, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from lora_bench.records import folder_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from lora_bench.records import folder_lock as claim
lock = claim.acquire(Path(sys.argv[1]))
print("held" if lock else "taken", flush=True)
time.sleep(60)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    assert not folder_lock.is_locked(tmp_path)
    assert not (tmp_path / folder_lock.LOCK_FILE).exists()  # whoever asks leaves nothing
    lock = folder_lock.acquire(tmp_path)
    assert lock is not None
    assert folder_lock.acquire(tmp_path) is None
    assert folder_lock.is_locked(tmp_path)
    lock.release()
    assert not folder_lock.is_locked(tmp_path)
    assert folder_lock.acquire(tmp_path) is not None


def test_the_claim_of_a_killed_process_is_void(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert folder_lock.is_locked(tmp_path)
        assert folder_lock.acquire(tmp_path) is None
        holder.send_signal(signal.SIGKILL)
    assert not folder_lock.is_locked(tmp_path)
    assert folder_lock.acquire(tmp_path) is not None
