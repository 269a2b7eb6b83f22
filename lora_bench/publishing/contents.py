"""The files of a repository: record, log, adapter, model card; predictions only if they are requested.

Texts are never among them. Local paths are cut to their last names, and the settings of trackers are left out: they
name servers and accounts.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, dump
from lora_bench.publishing.card import render_card
from lora_bench.publishing.results import read_results
from lora_bench.records import run_folder
from lora_bench.records.local_paths import without_folders
from lora_bench.records.run_folder import ADAPTER, METRICS_FILE, PREDICTIONS, RECORD_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.publishing.source import PublishedRun

CARD = "README.md"
_CONFIGS = ("adapter_config.json", "config.json", "tokenizer_config.json")
"""Files that may name a local folder."""
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Files of an adapter or a whole model that are published."""


def write_contents(
    run: PublishedRun, folder: Path, *, predictions: bool, license_name: str | None, copy: bool
) -> list[Path]:
    """Write the files of a run's repository into an existing folder, and return their paths.

    Args:
        run: what is published.
        folder: where to.
        predictions: also the ids, labels and scores of the reported splits.
        license_name: for the model card.
        copy: copy weights; otherwise they are links to those of the run.

    Raises:
        UserError: a file of the run cannot be read or is a link, or one of these cannot be written.
    """
    source = run.finished.folder
    try:
        raw = untrusted.read_json(source / RECORD_FILE)
        (folder / RECORD_FILE).write_text(dump(_public_record(raw)), encoding="utf-8")
        if _is_file(source / METRICS_FILE):
            (folder / METRICS_FILE).write_bytes(untrusted.read_bytes(source / METRICS_FILE))
        for adapter in run.adapters:
            _write_adapter(adapter, folder / adapter.relative_to(source), copy=copy)
        if predictions:
            (folder / PREDICTIONS).mkdir()
            for path in filter(_is_file, sorted((source / PREDICTIONS).glob("*.parquet"))):
                shutil.copyfile(path, folder / PREDICTIONS / path.name)
        card = render_card(run, read_results(run.finished), license_name)
        (folder / CARD).write_text(card, encoding="utf-8")
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or source
        reason = f"the files to publish cannot be written: {describe_error(error)}"
        raise UserError(reason, file=file, code=Code.UNWRITABLE) from None
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _public_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without local paths, trackers and hashes of files that are not published; with a new checksum."""
    record = without_folders(record)
    record["config"] = record["config"] | {"tracking": {}}
    record["choices"] = {group: choice for group, choice in record["choices"].items() if group != "tracking"}
    record["overrides"] = [text for text in record["overrides"] if not str(text).lstrip("+~").startswith("tracking")]
    files = record.get("files") or {}
    record["files"] = {name: digest for name, digest in files.items() if name.startswith(f"{ADAPTER}/")}
    return run_folder.with_checksum(record)


def _is_file(path: Path) -> bool:
    """Return whether a path is a regular file; a `UserError` for a link, which may lead to any file of the machine."""
    if path.is_symlink():
        remedy = "Put the file itself there, or remove the link."
        raise UserError("is a link, which is not published", file=path, remedy=remedy, code=Code.NOT_A_FILE)
    return path.is_file()


def _write_adapter(source: Path, target: Path, *, copy: bool) -> None:
    """Write the files of one adapter, without the folders above a local base model."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.suffix not in _SUFFIXES or not _is_file(path):
            continue
        if path.name in _CONFIGS:
            cut = {
                key: without_folders({key: value})[key] if "path" in key else value
                for key, value in untrusted.read_json(path).items()
            }
            (target / path.name).write_text(json.dumps(cut, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif path.suffix == ".safetensors" and not copy:
            (target / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target / path.name)
