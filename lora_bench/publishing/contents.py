"""The files of a repository: record, log, adapter, model card; predictions only if they are requested.

Texts are never among them. Local paths are cut to their last names, and the settings of trackers are left out: they
name servers and accounts.
"""

from __future__ import annotations

import json
import os
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


def write_contents(run: PublishedRun, folder: Path, *, predictions: bool, license_name: str | None) -> list[Path]:
    """Write the files of a run's repository into an existing folder, and return their paths.

    Weights are hard links where the system allows them, otherwise copies.

    Args:
        run: what is published.
        folder: where to.
        predictions: also the ids, labels and scores of the reported splits.
        license_name: for the model card.

    Raises:
        UserError: a file of the run cannot be read, or one of these cannot be written.
    """
    source = run.finished.folder
    try:
        raw = untrusted.read_json(source / RECORD_FILE)
        (folder / RECORD_FILE).write_text(dump(_public_record(raw)), encoding="utf-8")
        for name in (METRICS_FILE,):
            if (source / name).is_file():
                (folder / name).write_bytes(untrusted.read_bytes(source / name))
        for adapter in run.adapters:
            _write_adapter(adapter, folder / adapter.relative_to(source))
        if predictions:
            shutil.copytree(source / PREDICTIONS, folder / PREDICTIONS)
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


def _write_adapter(source: Path, target: Path) -> None:
    """Write the files of one adapter, without the folders above a local base model."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in _SUFFIXES:
            continue
        if path.name in _CONFIGS:
            content = untrusted.read_json(path)
            cut = {
                key: without_folders({key: value})[key] if "path" in key else value for key, value in content.items()
            }
            (target / path.name).write_text(json.dumps(cut, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif path.suffix == ".safetensors":
            _link(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    """Make a hard link to a large file, or copy it where that is not possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
