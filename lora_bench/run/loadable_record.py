"""The record of a finished run that can be loaded here: what its adapter and backbone need is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.adapters.methods import method_names
from lora_bench.backbones.families import family_names
from lora_bench.errors import Code, UserError
from lora_bench.extensions.entry_points import BACKBONES, METHODS
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import RECORD_FILE

if TYPE_CHECKING:
    from pathlib import Path


def read_loadable(folder: str | Path, key: str = "run") -> FinishedRecord:
    """Read the record of a finished run whose adapter method and model family are known here; torch is not imported.

    Args:
        folder: as `FinishedRecord.read` takes it.
        key: the command-line option that names the folder, for messages.

    Raises:
        UserError: as `FinishedRecord.read`; or method or family is of a package that is not installed. The package that
            the record names is named.
    """
    finished = FinishedRecord.read(folder, key)
    for name_key, names, group in (
        ("adapter.method", method_names(), METHODS),
        ("model.family", family_names(), BACKBONES),
    ):
        section, _, name = name_key.partition(".")
        value = finished.config[section].get(name)
        if isinstance(value, str) and value.isidentifier() and value not in names:
            recorded = finished.other_packages
            remedy = f"Install the package that registers it in the entry point group {group}."
            raise UserError(
                "the run was trained with it, and it is not installed here",
                key=name_key,
                value=value,
                file=finished.folder / RECORD_FILE,
                remedy=f"{remedy} The record names {', '.join(recorded)}." if recorded else remedy,
                code=Code.MISSING_PACKAGE,
            )
    return finished
