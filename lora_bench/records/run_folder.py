"""The run folder: claimed, written and read here, and nowhere else.

    run.json                      what was asked for, what came out, what it cost (the keys of `LAYOUT`, in that order)
    metrics.jsonl                 one line per evaluation
    predictions/<split>.parquet   id, label and score of every example
    evaluations/<name>.json       a later look at the finished run; its predictions: evaluations/<name>/<split>.parquet
    .hydra/                       config.yaml and overrides.yaml
    .lock                         locked by the process that trains

A folder belongs to one run, and to one process at a time: of two that want it the second is refused.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from traceback import format_exception
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from xxhash import xxh3_128_hexdigest

from lora_bench.console.redaction import redact, redact_new_path
from lora_bench.errors import Code, DivergedError, LostFolderError, RunFailedError, UserError, shell_argument
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, dump, to_json, write, writing
from lora_bench.records import folder_lock
from lora_bench.records.prompted import ASKS_THE_REST, is_prompted
from lora_bench.records.record_types import with_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from lora_bench.records.folder_lock import Claim

SCHEMA = 1
STATUSES = ("running", "done", "failed", "diverged", "interrupted")

# Every key of run.json, in the order it is written, with its type; what is not a dict or a list may be null.
LAYOUT: dict[str, type] = {
    "schema": int,
    "status": str,
    "created": str,
    "finished": str,
    "choices": dict,
    "overrides": list,
    "config": dict,
    "data": dict,
    "metrics": dict,
    "selection": dict,
    "params": dict,
    "cost": dict,
    "targets": dict,
    "answers": dict,
    "environment": dict,
    "files": dict,
    "error": str,
    "checksum": str,
}
ALTERED = "altered"
"""What `read` gives as the checksum of a record that was changed after it was written."""

Column: TypeAlias = "Sequence[int | None] | Sequence[float] | np.ndarray[Any, Any] | None"
Predictions: TypeAlias = tuple[Column, Column, Column]
"""ids, labels and scores of one split."""


@dataclass
class Run:
    """A run folder to write: claimed, reopened, or `Run(folder, read(folder))` to add to a finished one."""

    folder: Path
    record: dict[str, Any]
    lock: Claim | None = None

    @classmethod
    def claim(cls, folder: Path, *, choices: Mapping[str, str], config: Mapping[str, Any], overrides: list[str]) -> Run:
        """Take `folder` for a new run, or refuse and leave it as it was if it holds a run already."""
        refuse_secret(folder)
        asked = {"choices": choices, "config": config, "overrides": overrides}
        record = _sealed(to_json(_empty() | {"schema": SCHEMA, "status": "running", "created": _now()} | asked))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_taken(folder)
            lock = folder_lock.take(folder)
        except (OSError, ValueError) as error:
            raise _unwritable(folder, describe_error(error)) from None
        if lock is None:
            raise UserError(
                "another process is writing it", key="hydra.run.dir", value=folder, remedy=_ANOTHER, code=Code.IN_USE
            )
        try:
            refuse_taken(folder)
            write(folder, "run.json", dump(record).encode())
            write(folder, ".hydra/config.yaml", _yaml(record["config"]))
            write(folder, ".hydra/overrides.yaml", _yaml(record["overrides"]))
        except RunFailedError as error:
            for name in ("run.json", folder_lock.LOCK):
                (folder / name).unlink(missing_ok=True)
            lock.release()
            raise _unwritable(folder, error.reason.removeprefix("cannot be written: ")) from None
        except UserError:
            lock.release()
            raise
        return cls(folder, record, lock)

    @classmethod
    def reopen(cls, folder: Path) -> Run:
        """Take the folder of a run that has begun, to go on with it.

        Raises:
            UserError: there is no run, or another process is training it.
        """
        read(folder)  # so that a folder without a run is refused untouched
        try:
            lock = folder_lock.take(folder)
        except OSError as error:
            raise UserError(f"cannot be written: {describe_error(error)}", file=folder, code=Code.UNWRITABLE) from None
        if lock is None:
            remedy = "Wait until it ends, or stop it."
            raise UserError("another process is training this run", file=folder, remedy=remedy, code=Code.IN_USE)
        return cls(folder, read(folder), lock)

    def rewind(self, step: int) -> None:
        """Set the record back to the end of update number `step`: later lines of its log are dropped."""
        path = self.folder / "metrics.jsonl"
        if os.path.lexists(path):
            kept = []
            try:
                for line in untrusted.read_json_lines(path):
                    split, at = str(line.get("split")), untrusted.as_number(line.get("step"))
                    if split.partition("/")[0] == "selection" and at is not None and at <= step:
                        kept.append(json.dumps(to_json(line)) + "\n")
            except OSError as error:
                raise UserError(f"cannot be read: {describe_error(error)}", file=path, code=Code.UNREADABLE) from None
            self._write("metrics.jsonl", "".join(kept).encode())
        self.update(status="running", finished=None, error=None, selection=None)

    def check(self) -> None:
        """Refuse to write where the path leads to the folder of another run by now.

        Raises:
            LostFolderError: the folder is gone, or another one has its place.
        """
        if self.lock is not None:
            self.lock.check()
        elif self.record:  # to be added to: the record as it was read
            found = read(self.folder)
            if any(found[key] != self.record[key] for key in ("created", "config")):
                raise LostFolderError(
                    "holds another run by now, and nothing is written into it", file=self.folder, code=Code.LOST
                )

    def release(self) -> None:
        """Give up the claim."""
        if self.lock is not None:
            self.lock.release()

    @property
    def log_file(self) -> Path:
        return self.folder / "run.log"

    def update(self, **sections: Any) -> None:
        """Set keys of `run.json`; a dict is merged, one level deep, into the dict that is there."""
        record = dict(self.record)
        for name, new in sections.items():
            if name not in LAYOUT:
                raise TypeError(f"run.json has no key {name!r}")
            old, new = record.get(name), to_json(new)
            record[name] = old | new if isinstance(old, dict) and isinstance(new, dict) else new
        record = _sealed(record)
        self._write("run.json", dump(record).encode())
        self.record = record

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self.check()
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(line), allow_nan=False) + "\n")

    def note_files(self, paths: Iterable[Path]) -> None:
        """Record the SHA-256 of files in the run's folder, by their names below it."""
        digests = {}
        for path in paths:
            with path.open("rb") as file:
                digests[path.relative_to(self.folder).as_posix()] = file_digest(file, "sha256").hexdigest()
        self.update(files=digests)

    def write_predictions(self, split: str, ids: Column, labels: Column, scores: Column) -> None:
        """Write `predictions/<split>.parquet`; `labels` is None, or an entry of it, where a label is unknown."""
        self._write(f"predictions/{file_name(split)}.parquet", _encoded(ids, labels, scores))

    def write_evaluation(
        self, name: str, content: Mapping[str, Any], predictions: Mapping[str, Predictions] | None = None
    ) -> Path:
        """Write `evaluations/<name>.json`, in place of an older one of that name; its predictions come first."""
        place = f"evaluations/{file_name(name)}"
        written = {f"{file_name(split)}.parquet": columns for split, columns in (predictions or {}).items()}
        for file, columns in written.items():
            self._write(f"{place}/{file}", _encoded(*columns))
        for old in (self.folder / place).glob("*.parquet"):
            if old.name not in written:
                old.unlink()
        return self._write(f"{place}.json", dump(to_json(content)).encode())

    def finish(self, status: str, error: str | None = None) -> None:
        """Say how the run ended (`done`, `failed`, `diverged` or `interrupted`) and why, and give up the claim."""
        if status not in STATUSES[1:]:
            raise ValueError(f"a run cannot end as {status!r}")
        try:
            self.update(status=status, finished=_now(), error=error)
        finally:
            self.release()

    def fail(self, error: Exception) -> None:
        """Record an exception as the run's end; one that is no wrong request leaves its traceback in the log.

        What stopped the run may also be in the way of saying so: then its record stays as it was.
        """
        with suppress(RunFailedError):
            if isinstance(error, DivergedError):
                self.finish("diverged", str(error))
            elif isinstance(error, UserError):
                self.finish("failed", str(error))
            else:
                lines = redact("".join(format_exception(error)))
                self._write(self.log_file.name, lines.encode(errors="backslashreplace"))
                self.finish("failed", f"{type(error).__name__}: {error}")

    def _write(self, name: str, content: bytes) -> Path:
        self.check()
        return write(self.folder, name, content)


def adapter_folders(folder: Path, members: int) -> list[Path]:
    """Where a run keeps its adapter, or those of its ensemble's members."""
    place = folder / "adapter"
    return [place] if members == 1 else [place / f"member_{i}" for i in range(members)]


def discard(folder: Path) -> None:
    """After a refused request: remove the folder if it is empty, then empty ones above it inside the current folder."""
    with suppress(OSError, ValueError):
        here = Path.cwd().resolve()
        folder = folder.parent.resolve() / folder.name
        if folder == here:
            return
        folder.rmdir()
        for parent in folder.parents:
            if here not in parent.parents:
                return
            parent.rmdir()


def read(folder: Path) -> dict[str, Any]:
    """The run's record with every key of `LAYOUT`, each of its type, or a refusal that names the file."""
    path = folder / "run.json"
    try:
        text = untrusted.read_text(path)
    except FileNotFoundError:
        raise UserError("is missing, so this is not a run's folder", file=path, code=Code.NOT_FOUND) from None
    except OSError as error:
        raise UserError(f"cannot be read: {describe_error(error)}", file=path, code=Code.UNREADABLE) from None
    except ValueError as error:
        raise UserError(f"is damaged: {error}", file=path, code=Code.DAMAGED) from None
    if not text.strip():
        raise UserError("is empty: the run is just starting, or was killed as it started", file=path, code=Code.DAMAGED)
    try:
        content = untrusted.parse_json(text)
    except ValueError as error:
        raise UserError(f"is damaged: {error}", file=path, code=Code.DAMAGED) from None
    if isinstance(content, dict) and content.get("checksum") not in (None, _checksum(content)):
        content["checksum"] = ALTERED
    try:
        # What is not finite (1e999, or a NaN of someone else's writing) is absent.
        return with_types(to_json(content), LAYOUT, schema=SCHEMA, statuses=STATUSES)
    except ValueError as error:
        raise UserError(str(error), file=path, code=Code.DAMAGED) from None


def altered_notes(runs: Iterable[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    """Return a line that names the runs whose records were changed after they were written, if there are any."""
    folders = [str(folder) for folder, record in runs if record["checksum"] == ALTERED]
    if not folders:
        return []
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return [f"changed after it was written, by hand or by damage: run.json of {', '.join(folders[:3])}{more}"]


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum, as it is read back."""
    content: dict[str, Any] = json.loads(dump(record))
    return content | {"checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the XXH3 checksum of a record without its own; it tells of damage and edits, not of forgery."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def is_killed(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run says that it is running, but no process does it."""
    return record["status"] == "running" and not folder_lock.is_taken(folder)


def last_logged(folder: Path) -> dict[str, Any] | None:
    """The newest whole line of `metrics.jsonl` (a run may be writing one, or was killed in it); None without any."""
    try:
        with untrusted.open_file(folder / "metrics.jsonl", max_bytes=2**63) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            found = to_json(untrusted.parse_json(line.decode()))
            if isinstance(found, dict):
                return found
    return None


def find(paths: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[tuple[Path, str]]]:
    """The runs at or below `paths`, job 10 after job 2, and what was skipped with the reason.

    Nothing below a run's folder is looked at, and links below the given paths are not followed.
    """
    runs, skipped, seen = [], [], set()
    for path in paths:
        if not os.path.lexists(path):
            raise UserError("there is no such folder", file=path, code=Code.NOT_FOUND)
        for folder, trouble in _walk(path):
            real = os.path.realpath(folder)  # Path.resolve raises on a link to itself
            if real in seen:
                continue
            seen.add(real)
            if trouble is not None:
                skipped.append((folder, trouble))
                continue
            try:
                runs.append((folder, read(folder)))
            except UserError as error:
                skipped.append((folder, f"run.json {error.reason}"))
    return sorted(runs, key=lambda run: _natural(run[0])), sorted(skipped, key=lambda skip: _natural(skip[0]))


def _walk(top: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield folders that hold a run.json, whatever it is (None), and those that cannot be listed (why)."""
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                below = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError as error:
            yield folder, f"cannot be read: {describe_error(error)}"
            continue
        if "run.json" in below:
            yield folder, None
        else:
            folders += [folder / name for name, is_folder in below.items() if is_folder]


def _natural(path: Path) -> list[list[str | int]]:
    # re.split with a group alternates text and digits, so that like is compared with like.
    return [[int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", part))] for part in path.parts]


def _empty() -> dict[str, Any]:
    return {key: kind() if kind in (dict, list) else None for key, kind in LAYOUT.items()}


_ANOTHER = "Give a folder that is not there yet."


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that holds a run; an empty record is what a process left that was killed as it started."""
    path = folder / "run.json"
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    reason, remedy = "already holds a run", _ANOTHER
    with suppress(UserError):
        if is_killed(folder, found := read(folder)):
            reason = "holds a run whose process was killed"
            remedy = f"{_ANOTHER} Or resume it: lora-bench train {shell_argument('resume', folder)}"
            remedy = f"{_ANOTHER} {ASKS_THE_REST}" if is_prompted(found) else remedy
    raise UserError(reason, key="hydra.run.dir", value=folder, remedy=remedy, code=Code.EXISTS)


def refuse_secret(folder: str | Path) -> None:
    """A folder's name is on the disk and in every report: it may hold no key."""
    if redact_new_path(str(folder)) != str(folder):
        raise UserError(
            "the folder's name holds a key, or what looks like one",
            key="hydra.run.dir",
            value=folder,
            code=Code.FORBIDDEN,
        )


def _unwritable(folder: Path, reason: str) -> UserError:
    remedy = "Give a folder where you may write."
    return UserError(
        f"cannot be written: {reason}", key="hydra.run.dir", value=folder, remedy=remedy, code=Code.UNWRITABLE
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _yaml(content: Any) -> bytes:
    written: bytes = yaml.safe_dump(content, sort_keys=False, encoding="ascii")
    return written


def _encoded(*columns: Column) -> bytes:
    from lora_bench.records.predictions import encode  # pyarrow: late

    return encode(*columns)


def file_name(name: str) -> str:
    """`name` as the stem of a file: what is no letter, digit, dot, dash or underscore becomes a dash."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
    if "/" in name or "\\" in name or ".." in name or not slug.strip(".") or slug.startswith(".") or len(slug) > 200:
        raise UserError(
            "is not a plain name",
            key="name",
            value=name,
            remedy="Give a short name without slashes, such as paws.",
            code=Code.INVALID_VALUE,
        )
    return slug
