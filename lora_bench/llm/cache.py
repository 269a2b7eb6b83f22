"""The cache of a server's answers, by a hash of the request: no request is sent twice.

One SQLite file in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench), shared by all processes. An answer is committed
on arrival, so a killed run loses only the pending ones. The file is not trusted: a damaged entry counts as missing, and
a damaged file is moved aside and replaced by a new one.
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
    """Answers by key in the SQLite file `answers.sqlite`, opened at once; a context manager that closes it.

    A file that is damaged or of another format is moved aside and replaced by an empty one (`set_aside`).

    Args:
        folder: of the file; created if it does not exist.

    Raises:
        UserError: the file cannot be created, read or written, now or in a later call.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file, as the class describes it."""
        self.path = folder / "answers.sqlite"
        self.damaged = 0
        """Number of damaged entries, which count as missing."""
        self.set_aside: Path | None = None
        """The new path of a damaged file that was replaced; None: there was none."""
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
        """Return the entry of this key; None if it is missing or damaged.

        Damaged is an entry that is no JSON object or too large; it stays in the file and is counted in `damaged`.
        """
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
        """Store an answer, and replace an older entry of this key."""
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(answer))

    def notes(self) -> Iterator[str]:
        """Yield a line about damaged entries and one about a replaced file, if there are any."""
        if self.damaged:
            yield f"{self.damaged} entries of the cache {self.path} are damaged; they are requested again"
        if self.set_aside is not None:
            yield f"the cache {self.path} was damaged or not ours: it was moved to {self.set_aside} and replaced"

    def _open(self) -> sqlite3.Connection:
        """Return a connection to the file, with its table; a damaged or foreign file is moved aside and replaced first.

        Raises:
            sqlite3.Error: another error of SQLite, for example a lock of another process that lasts.
        """
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
        """Return a connection to the file that commits every statement and waits while another process writes."""
        db = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
        db.text_factory = lambda content: content.decode(errors="replace")
        return db

    def _set_aside(self) -> None:
        """Move the file and its SQLite journals to an unused name, and keep that in `set_aside`."""
        number = 1
        while (aside := self.path.with_name(f"answers.damaged-{number}.sqlite")).exists():
            number += 1
        os.replace(self.path, aside)
        for suffix in ("-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        self.set_aside = aside

    def _execute(self, query: str, *values: Any) -> list[Any]:
        """Execute one statement and return its rows; if the file proves to be damaged, execute it on a new one.

        The damaged file is moved aside. Other errors become a `UserError`.
        """
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
        """Translate errors of the file and of SQLite within the context into a `UserError`."""
        try:
            yield
        except (OSError, ValueError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "Set the environment variable LORA_BENCH_CACHE to a folder with room to write, or remove the file."
            raise UserError(
                f"the cache of answers cannot be used: {reason}", file=self.path, remedy=remedy, code=Code.DAMAGED
            ) from None
