"""Every answer of a server, kept under a key made of the request: what was asked once is never asked again.

One SQLite file in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench), shared by all processes. An answer is committed
as it comes, so a run that is killed loses only those that were under way.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_PATIENCE_SECONDS = 60.0  # while another process writes


def key(request: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a request's content."""
    return sha256(json.dumps(request, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Cache:
    """Answers by key, on disk; a context manager that closes the file.

    Args:
        folder: where the file lies; made if it is not there.

    Raises:
        UserError: it cannot be read or written, here or at any later call.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.sqlite"
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
            try:
                self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, key: str) -> dict[str, Any] | None:
        with self._told():
            row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            found: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return found

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        with self._told():
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, sqlite3.Error) as error:
            why = getattr(error, "strerror", None) or error
            remedy = "Set the environment variable LORA_BENCH_CACHE to a folder with room to write, or remove the file."
            raise UserError(f"the cache of answers cannot be used: {why}", file=self.path, remedy=remedy) from None
