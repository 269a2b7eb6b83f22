"""The folder of a run: the only code that claims and writes it, and the only reader of its record.

    run.json                      the record: request, results and costs (the keys of `LAYOUT`, in that order)
    metrics.jsonl                 one line per evaluation (`metrics_log`)
    predictions/<split>.parquet   id, label and score or probabilities of every example
    evaluations/<name>.json       a later evaluation of the finished run, its predictions in evaluations/<name>/
    adapter/                      the trained adapter; of an ensemble adapter/member_<i>/
    checkpoints/                  the state of training, while the run is resumable
    progress.json                 how far the run has come, while it trains (`live_progress`)
    .hydra/                       config.yaml and overrides.yaml
    .lock                         locked by the process that trains

A folder belongs to one run, and one process at a time may write it: a second one is refused.
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

from lora_bench.config.keys import present_choices, present_overrides, with_present_names
from lora_bench.console.redaction import redact, redact_new_path
from lora_bench.errors import Code, DivergedError, LostFolderError, RunFailedError, UserError, shell_argument
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, dump, to_json, write, writing
from lora_bench.records import folder_lock, live_progress, metrics_log
from lora_bench.records.record_types import with_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from lora_bench.records.folder_lock import Claim

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PREDICTIONS, EVALUATIONS, ADAPTER, CHECKPOINTS = "predictions", "evaluations", "adapter", "checkpoints"
"""Folders inside a run's folder."""
CONFIG_FILE, OVERRIDES_FILE = ".hydra/config.yaml", ".hydra/overrides.yaml"
"""Copies of parts of the record, named as Hydra names them."""

OWN_FILES = (
    *(METRICS_FILE, PREDICTIONS, EVALUATIONS, ADAPTER, CHECKPOINTS, "tasks", "tensorboard", "run.log", ".hydra"),
    *(live_progress.PROGRESS_FILE, RECORD_FILE, folder_lock.LOCK_FILE),
)
"""All files and folders that lora-bench writes into a run's folder, the record and the lock last."""

SCHEMA = 1
STATUSES = ("running", "done", "failed", "diverged", "interrupted", "eliminated")
"""`eliminated`: stopped by successive halving; such a run is `interrupted` in records of version 0.1."""
PROMPT_AGAIN = "Run the same `lora-bench prompt` command again: it requests only the answers that are missing."

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
"""Every key of `run.json` with its type, in the order they are written; a value that is no dict or list may be null."""
OPTIONAL_LAYOUT: dict[str, type] = {"per_class": dict}
"""Keys that only some runs have, with their types, written after the others: metrics of each class, by split."""
ALTERED = "altered"
"""The checksum that `read` gives to a record that was changed after it was written."""

Column: TypeAlias = "Sequence[int | None] | Sequence[float] | np.ndarray[Any, Any] | None"
Predictions: TypeAlias = tuple[Column, Column, Column]
"""Ids, labels and scores of one split."""


@dataclass
class Run:
    """A run's folder, open for writing.

    It is claimed for a new run (`claim`), reopened to resume one (`reopen`), or `Run(folder, read(folder))` to add to a
    finished one.
    """

    folder: Path
    record: dict[str, Any]
    """The content of `run.json`."""
    lock: Claim | None = None
    """The right to write the folder; None for a finished run."""

    @classmethod
    def claim(
        cls,
        folder: Path,
        *,
        choices: Mapping[str, str],
        config: Mapping[str, Any],
        overrides: list[str],
        is_task: bool = False,
    ) -> Run:
        """Claim `folder` for a new run, and write its record with status `running` and copies of the config.

        Args:
            folder: is created where it does not exist.
            choices: the chosen option of each config group.
            config: resolved.
            overrides: as typed.
            is_task: the folder is that of one task inside the folder of its run.

        Raises:
            UserError: the folder's name holds a secret, the folder holds a run, runs in folders below it, or is inside
                a run's folder; it is claimed by another process, or cannot be written. An existing run is unchanged; a
                folder that was created is not removed.
        """
        refuse_secret_name(folder)
        request = {"choices": choices, "config": config, "overrides": overrides}
        record = with_checksum(
            to_json(_empty_record() | {"schema": SCHEMA, "status": "running", "created": _now()} | request)
        )
        try:
            if not is_task:
                refuse_inside_run(folder, "hydra.run.dir")
                _refuse_above_runs(folder)
            folder.mkdir(parents=True, exist_ok=True)
            refuse_existing_run(folder)
            lock = folder_lock.acquire(folder)
        except (OSError, ValueError) as error:
            raise _unwritable(folder, describe_error(error)) from None
        if lock is None:
            raise UserError(
                "another process is writing it", key="hydra.run.dir", value=folder, remedy=_NEW_FOLDER, code=Code.IN_USE
            )
        try:
            refuse_existing_run(folder)
            write(folder, RECORD_FILE, dump(record).encode())
            write(folder, CONFIG_FILE, _yaml(record["config"]))
            write(folder, OVERRIDES_FILE, _yaml(record["overrides"]))
        except RunFailedError as error:
            for name in (RECORD_FILE, folder_lock.LOCK_FILE):
                (folder / name).unlink(missing_ok=True)
            lock.release()
            raise _unwritable(folder, error.reason.removeprefix("cannot be written: ")) from None
        except UserError:
            lock.release()
            raise
        return cls(folder, record, lock)

    @classmethod
    def reopen(cls, folder: Path) -> Run:
        """Claim the folder of an existing run, to resume it; its status is not checked.

        Raises:
            UserError: there is no run, its record is damaged, another process is training it, or the folder cannot be
                written.
        """
        read(folder)  # so that a folder without a run is refused untouched
        try:
            lock = folder_lock.acquire(folder)
        except OSError as error:
            raise UserError(f"cannot be written: {describe_error(error)}", file=folder, code=Code.UNWRITABLE) from None
        if lock is None:
            remedy = "Wait until it ends, or stop it."
            raise UserError("another process is training this run", file=folder, remedy=remedy, code=Code.IN_USE)
        return cls(folder, read(folder), lock)

    def rewind(self, step: int) -> None:
        """Set the record back to the end of update number `step`: status `running`, with no end, error or selection.

        The log keeps only evaluations of the selection split up to that step.

        Raises:
            UserError: the log cannot be read.
            RunFailedError: log or record cannot be written.
        """
        log = self.folder / METRICS_FILE
        if os.path.lexists(log):
            try:
                lines = metrics_log.lines_up_to(log, step)
            except OSError as error:
                raise UserError(f"cannot be read: {describe_error(error)}", file=log, code=Code.UNREADABLE) from None
            self._write(METRICS_FILE, "".join(json.dumps(to_json(line)) + "\n" for line in lines).encode())
        self.update(status="running", finished=None, error=None, selection=None)

    def check(self) -> None:
        """Refuse to write where the path leads to another run's folder by now.

        A finished run, which has no lock, is recognised by its time of creation and its config.

        Raises:
            LostFolderError: another folder has its path, or the claimed folder is gone.
            UserError: the record of a finished run cannot be read any more.
        """
        if self.lock is not None:
            self.lock.check()
        elif self.record:  # a finished run to add to
            on_disk = read(self.folder)
            if any(on_disk[key] != self.record[key] for key in ("created", "config")):
                raise LostFolderError(
                    "holds another run by now, and nothing is written into it", file=self.folder, code=Code.LOST
                )

    def release(self) -> None:
        """Give up the claim, if there is one."""
        if self.lock is not None:
            self.lock.release()

    @property
    def log_file(self) -> Path:
        """The file of the traceback of an unexpected error."""
        return self.folder / "run.log"

    def update(self, **sections: Any) -> None:
        """Set keys of `run.json`, and write it; a dict is merged, one level deep, into the present one.

        Raises:
            TypeError: there is no such key.
            RunFailedError: it cannot be written; the file and `record` are unchanged. A lost folder is one (`check`).
        """
        record = dict(self.record)
        for name, new in sections.items():
            if name not in LAYOUT | OPTIONAL_LAYOUT:
                raise TypeError(f"{RECORD_FILE} has no key {name!r}")
            old, new = record.get(name), to_json(new)
            record[name] = old | new if isinstance(old, dict) and isinstance(new, dict) else new
        record = with_checksum(record)
        self._write(RECORD_FILE, dump(record).encode())
        self.record = record

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; numbers that are not finite become null.

        Raises:
            RunFailedError: it cannot be written, or the folder is lost.
        """
        self.check()
        path = self.folder / METRICS_FILE
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(line), allow_nan=False) + "\n")

    def note_files(self, paths: Iterable[Path]) -> None:
        """Record the SHA-256 of files in the run's folder, keyed by their paths below it; earlier entries stay.

        Raises:
            OSError: a file cannot be read; nothing is recorded.
            RunFailedError: as `update`.
        """
        digests = {}
        for path in paths:
            with path.open("rb") as file:
                digests[path.relative_to(self.folder).as_posix()] = file_digest(file, "sha256").hexdigest()
        self.update(files=digests)

    def write_predictions(self, split: str, ids: Column, labels: Column, scores: Column) -> None:
        """Write `predictions/<split>.parquet`, replacing an older file.

        Args:
            split: its name.
            ids: (N,) rows in the source.
            labels: (N,) classes or numbers; None, or an entry of it, where a label is unknown.
            scores: (N,) P(label 1) or predicted numbers; (N, C) probabilities of three or more classes.

        Raises:
            RunFailedError: it cannot be written, or the folder is lost.
        """
        self._write(f"{PREDICTIONS}/{file_name(split)}.parquet", _encode_predictions(ids, labels, scores))

    def write_evaluation(
        self, name: str, content: Mapping[str, Any], predictions: Mapping[str, Predictions] | None = None
    ) -> Path:
        """Write `evaluations/<name>.json` after its predictions, replacing an older evaluation of that name.

        Its predictions on splits that are not among the new ones are removed. `run.json` is not changed: it holds no
        hash of these files.

        Args:
            name: of the evaluation; `file_name` makes it the name of the file.
            content: metrics, data and settings.
            predictions: by split.

        Returns:
            The path of the JSON file.

        Raises:
            UserError: the name is not plain.
            RunFailedError: a file cannot be written, or the folder is lost.
        """
        stem = f"{EVALUATIONS}/{file_name(name)}"
        columns_by_file = {f"{file_name(split)}.parquet": columns for split, columns in (predictions or {}).items()}
        for file, columns in columns_by_file.items():
            self._write(f"{stem}/{file}", _encode_predictions(*columns))
        for old in (self.folder / stem).glob("*.parquet"):
            if old.name not in columns_by_file:
                old.unlink()
        return self._write(f"{stem}.json", dump(to_json(content)).encode())

    def finish(self, status: str, error: str | None = None) -> None:
        """Record how the run ended, and give up the claim, even if the record cannot be written.

        Args:
            status: one of `STATUSES` except `running`.
            error: the reason; None for `done`.

        Raises:
            ValueError: it is another status; nothing is done.
            RunFailedError: the record cannot be written.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"a run cannot end as {status!r}")
        try:
            self.update(status=status, finished=_now(), error=error)
            live_progress.remove(self.folder)
        finally:
            self.release()

    def fail(self, error: Exception) -> None:
        """Record an exception as the run's end: `diverged` for a `DivergedError`, otherwise `failed`.

        The traceback of an unexpected error, secrets hidden, is written to `run.log`. No error of writing is raised: if
        a file cannot be written, for example because the disk is full, the record keeps its content.
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
    """Return the folder of a run's adapter, or one folder for each member of its ensemble."""
    return [folder / ADAPTER] if members == 1 else [member_adapter_folder(folder, i) for i in range(members)]


def member_adapter_folder(folder: Path, member: int) -> Path:
    """Return the folder of the adapter of one member of an ensemble."""
    return folder / ADAPTER / f"member_{member}"


def discard(folder: Path) -> None:
    """Remove the folder of a refused request if it is empty, then its empty parents inside the current folder.

    The current folder stays, and errors are ignored.
    """
    with suppress(OSError, ValueError):
        current = Path.cwd().resolve()
        folder = folder.parent.resolve() / folder.name
        if folder == current:
            return
        folder.rmdir()
        for parent in folder.parents:
            if current not in parent.parents:
                return
            parent.rmdir()


def holds_run(folder: Path) -> bool:
    """Return whether the folder holds a record, readable or not."""
    return (folder / RECORD_FILE).exists()


def read(folder: Path) -> dict[str, Any]:
    """Return a run's record with every key of `LAYOUT`, and those of `OPTIONAL_LAYOUT` that it has, each of its type.

    Numbers that are not finite become null, and keys of the config and overrides and choices that were renamed since
    have their new names. The checksum of a record that was changed is `ALTERED`.

    Raises:
        UserError: the file is missing, cannot be read, is damaged or of another schema; the error names it.
    """
    path = folder / RECORD_FILE
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
        # `to_json` removes numbers that are not finite, such as 1e999.
        names = OPTIONAL_LAYOUT.keys() & content if isinstance(content, dict) else ()
        layout = LAYOUT | {name: OPTIONAL_LAYOUT[name] for name in sorted(names)}
        record = with_types(to_json(content), layout, schema=SCHEMA, statuses=STATUSES)
    except ValueError as error:
        raise UserError(str(error), file=path, code=Code.DAMAGED) from None
    return record | {
        "config": with_present_names(record["config"]),
        "overrides": present_overrides(record["overrides"]),
        "choices": present_choices(record["choices"], record["config"]),
    }


def altered_notes(runs: Iterable[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    """Return one note that names runs whose records were changed after they were written; none if there are none.

    At most three folders are named, the others counted.
    """
    folders = [str(folder) for folder, record in runs if record["checksum"] == ALTERED]
    if not folders:
        return []
    rest = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return [f"{RECORD_FILE} was edited or damaged after it was written, in: {', '.join(folders[:3])}{rest}"]


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in the types that JSON gives back, with its checksum."""
    content: dict[str, Any] = json.loads(dump(record))
    return content | {"checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the XXH3 checksum of a record, its key `checksum` excluded; it detects damage and edits, not forgery."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def is_killed(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether the status is `running` but no living process holds the folder's lock."""
    return record["status"] == "running" and not folder_lock.is_locked(folder)


def is_prompted(record: Mapping[str, Any]) -> bool:
    """Return whether a record is that of `lora-bench prompt`, which queries a language model and trains nothing."""
    return "llm" in record["config"]


def find_runs(paths: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[tuple[Path, str]]]:
    """Find the runs at or below `paths`.

    Folders inside a run's folder are not searched, and links below the given paths are not followed. A run that is
    reached by several paths is listed once.

    Returns:
        Folder and record of each run, job 10 after job 2; and the folders that were skipped, with the reason: a damaged
        record, or no right to list the folder.

    Raises:
        UserError: a path does not exist.
    """
    runs, skipped, seen = [], [], set()
    for path in paths:
        if not os.path.lexists(path):
            raise UserError("there is no such folder", file=path, code=Code.NOT_FOUND)
        for folder, reason in walk(path):
            real = os.path.realpath(folder)  # Path.resolve raises on a link to itself
            if real in seen:
                continue
            seen.add(real)
            if reason is not None:
                skipped.append((folder, reason))
                continue
            try:
                runs.append((folder, read(folder)))
            except UserError as error:
                skipped.append((folder, f"{RECORD_FILE} {error.reason}"))
    return sorted(runs, key=lambda run: natural_order(run[0])), sorted(skipped, key=lambda skip: natural_order(skip[0]))


def walk(top: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield folders that hold a `run.json` of any type, with None, and those that cannot be listed, with the reason."""
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                below = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError as error:
            yield folder, f"cannot be read: {describe_error(error)}"
            continue
        if RECORD_FILE in below:
            yield folder, None
        else:
            folders += [folder / name for name, is_folder in below.items() if is_folder]


def natural_order(path: Path) -> list[list[str | int]]:
    """Return a key that sorts numbers in file names by value."""
    # re.split with a group alternates text and digits, so that text is compared with text.
    return [[int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))] for name in path.parts]


def _empty_record() -> dict[str, Any]:
    """Return a record without content."""
    return {key: type_() if type_ in (dict, list) else None for key, type_ in LAYOUT.items()}


_NEW_FOLDER = "Give a folder that does not exist yet."


def refuse_existing_run(folder: Path) -> None:
    """Refuse a folder that holds a run.

    An empty record does not count: a process that is killed as it starts leaves one.

    Raises:
        UserError: with the command that resumes the run, if its process was killed.
    """
    path = folder / RECORD_FILE
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    reason, remedy = "already holds a run", _NEW_FOLDER
    with suppress(UserError):
        if is_killed(folder, record := read(folder)):
            reason = "holds a run whose process was killed"
            remedy = f"{_NEW_FOLDER} Or resume it: lora-bench train {shell_argument('resume', folder)}"
            remedy = f"{_NEW_FOLDER} {PROMPT_AGAIN}" if is_prompted(record) else remedy
    raise UserError(reason, key="hydra.run.dir", value=folder, remedy=remedy, code=Code.EXISTS)


def refuse_inside_run(folder: Path, key: str) -> None:
    """Refuse a new folder of a run or sweep inside a run's folder, where `find_runs` would not find it.

    Args:
        folder: may be missing.
        key: the config key that gave it.

    Raises:
        UserError: a folder above holds a run; a file of that name which is no record does not count.
        OSError, ValueError: the path cannot be followed.
    """
    for above in Path(os.path.realpath(folder)).parents:
        if _is_record(above):
            reason = f"is inside the folder of a run, {above}, where no command would list it"
            remedy = "Give a folder outside of it."
            raise UserError(reason, key=key, value=folder, remedy=remedy, code=Code.EXISTS)


def _refuse_above_runs(folder: Path) -> None:
    """Refuse a folder for a new run with other runs below it, which `find_runs` would no longer find.

    Raises:
        UserError: a folder below holds a record that can be read.
    """
    for below, reason in walk(folder) if folder.is_dir() else ():
        if below != folder and reason is None and _is_record(below):
            reason = f"holds other runs, such as {below}, which no command would list any more"
            raise UserError(reason, key="hydra.run.dir", value=folder, remedy=_NEW_FOLDER, code=Code.EXISTS)


def _is_record(folder: Path) -> bool:
    """Return whether the folder holds a record that can be read; other programs write files of that name, too."""
    if not holds_run(folder):
        return False
    try:
        read(folder)
    except UserError:
        return False
    return True


def refuse_secret_name(folder: str | Path) -> None:
    """Refuse a folder whose name holds a secret: the name is visible on the disk and in every report.

    Raises:
        UserError: a part of the path is a secret, or looks like one.
    """
    if redact_new_path(str(folder)) != str(folder):
        raise UserError(
            "the folder's name holds a key or password, or text that looks like one",
            key="hydra.run.dir",
            value=folder,
            remedy="Give a folder of another name.",
            code=Code.FORBIDDEN,
        )


def _unwritable(folder: Path, reason: str) -> UserError:
    """Return the error for a run's folder that cannot be written."""
    remedy = "Give a folder that you may write."
    return UserError(
        f"cannot be written: {reason}", key="hydra.run.dir", value=folder, remedy=remedy, code=Code.UNWRITABLE
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _yaml(content: Any) -> bytes:
    encoded: bytes = yaml.safe_dump(content, sort_keys=False, encoding="ascii")
    return encoded


def _encode_predictions(*columns: Column) -> bytes:
    from lora_bench.records.predictions import encode  # pyarrow: late

    return encode(*columns)


def file_name(name: str) -> str:
    """Return `name` as the stem of a file: characters other than letters, digits, `.`, `-` and `_` become dashes.

    Consecutive ones become one dash, and dashes at the ends are removed; different names may become the same.

    Raises:
        UserError: it holds a slash or `..`, begins with a dot, is longer than 200 characters, or nothing remains.
    """
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
