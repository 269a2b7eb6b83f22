"""Every answer of a server, kept under a key made of the request: what was asked once is never asked again.

One SQLite file in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench), shared by all processes. An answer is committed
as it comes, so a run that is killed loses only those that were under way. The file is not trusted: an entry that is
damaged counts as absent, and a damaged file is set aside for a new one.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_PATIENCE_SECONDS = 60.0  # while another process writes
_MAX_ENTRY_BYTES = 16 * 2**20
_TABLE = "CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def key(request: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a request's content."""
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
        self.damaged = 0
        """Entries that were no answers, and so absent."""
        self.set_aside: Path | None = None
        """Where a damaged file is now, in whose place there is a new one."""
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is not a file")
            self._db = self._open()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry under this key; None where there is none, or a damaged one."""
        query = "SELECT answer FROM answers WHERE key = ? AND length(CAST(answer AS BLOB)) <= ?"
        rows = self._execute(query, key, _MAX_ENTRY_BYTES)
        if not rows:
            self.damaged += bool(self._execute("SELECT 1 FROM answers WHERE key = ?", key))
            return None
        with suppress(ValueError, TypeError, RecursionError):
            entry = json.loads(rows[0][0])
            if isinstance(entry, dict):
                return entry
        self.damaged += 1
        return None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer, in place of an older entry under this key."""
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(answer))

    def notes(self) -> Iterator[str]:
        """Yield what a person should know of damage."""
        if self.damaged:
            yield f"{self.damaged} entries of the cache {self.path} are damaged and count as absent"
        if self.set_aside is not None:
            yield f"the cache {self.path} is damaged or not ours: a new one is in its place, and it is {self.set_aside}"

    def _open(self) -> sqlite3.Connection:
        """Open the file; a damaged or foreign one is set aside first."""
        db = self._connect()
        try:
            try:
                db.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))
                schema = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", None) not in _DAMAGE:
                    raise
                schema = []
            if schema == [(_TABLE,)]:
                return db
        except BaseException:
            db.close()
            raise
        db.close()
        self._set_aside()
        db = self._connect()
        db.execute(_TABLE)
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
        db.text_factory = lambda content: content.decode(errors="replace")
        return db

    def _set_aside(self) -> None:
        """Move the file, and what SQLite keeps beside it, to a name that is not taken."""
        number = 1
        while (aside := self.path.with_name(f"answers.damaged-{number}.sqlite")).exists():
            number += 1
        os.replace(self.path, aside)
        for suffix in ("-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        self.set_aside = aside

    def _execute(self, query: str, *values: Any) -> list[Any]:
        """Carry out one statement; where the file proves to be damaged, on a new one."""
        with self._errors():
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", None) not in _DAMAGE:
                    raise
            self._db.close()
            self._set_aside()
            self._db = self._open()
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, sqlite3.Error) as error:
            why = getattr(error, "strerror", None) or error
            remedy = "Set the environment variable LORA_BENCH_CACHE to a folder with room to write, or remove the file."
            raise UserError(
                f"the cache of answers cannot be used: {why}", file=self.path, remedy=remedy, code=Code.DAMAGED
            ) from None
