"""The record of a finished run, checked once for whatever predicts with it: files of a run's folder are untrusted.

Nothing heavy is imported, so that a folder that is no finished run is refused at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError
from lora_bench.evaluation.calibration import Calibration
from lora_bench.files import untrusted
from lora_bench.records import run_folder
from lora_bench.records.backfill import checked, refuse_edited, relocated
from lora_bench.records.prompted import is_prompted
from lora_bench.records.task_folders import refuse_several

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS = ("model", "adapter", "data", "optimizer", "trainer", "metric", "pack", "ensemble", "head")
PRECISIONS = ("float32", "bfloat16")
HIGHEST_RANK = 1 << 20


@dataclass(frozen=True)
class FinishedRecord:
    """A finished run as its record has it, every part of the type that its users rely on."""

    folder: Path
    record: dict[str, Any]
    config: dict[str, Any]
    """With defaults for keys that have come since."""
    text_columns: list[str]
    members: int
    """Adapters in the folder: those of its ensemble, else one."""
    precision: str
    """The name of the dtype of its products."""
    backbone_sha256: str
    calibration: Calibration | None
    """Fitted on selection; None where an older run has none."""
    member_calibrations: list[Calibration]
    """Of each member of an ensemble, fitted for it alone; empty for another run."""

    def check_weights(self, adapter: Path) -> None:
        """Refuse an adapter's folder whose weights are not those that the run wrote.

        Whoever has loaded them knows already that they are whole: this tells a changed number from the right one.

        Raises:
            UserError: a file has another SHA-256 than the record names; an older record names none.
        """
        for path in adapter.glob("*.safetensors"):
            digest = self.record["files"].get(path.relative_to(self.folder).as_posix())
            if digest is not None and digest != _sha256(path):
                remedy = "Restore it from a copy, or train the run again."
                raise UserError(
                    "is not the file that the run wrote: its SHA-256 differs",
                    file=path,
                    remedy=remedy,
                    code=Code.DAMAGED,
                )

    @property
    def targets(self) -> dict[str, int | list[int]]:
        """Rank by module; of each member where they differ."""
        return self.record["targets"]  # type: ignore[no-any-return]

    def relocated(self, model_path: str | None, tokenizer: str | None) -> FinishedRecord:
        """Return the record with its backbone and its tokenizer where they lie now (`recorded.relocated`)."""
        return replace(self, config=relocated(self.config, model_path, tokenizer))

    @classmethod
    def read(cls, folder: str | Path, key: str = "run") -> FinishedRecord:
        """Read and check the record in `folder`.

        Args:
            folder: the run's.
            key: what the command line calls it.

        Raises:
            UserError: there is no record, the run is not done, learned several tasks, is one of `lora-bench prompt`,
                or the record is damaged.
        """
        path = Path(str(folder))
        found = run_folder.read(path)
        if is_prompted(found):
            raise UserError(
                "is a run of lora-bench prompt, which leaves no model", key=key, value=folder, code=Code.UNSUPPORTED
            )
        if found["status"] != "done":
            raise UserError(f"the run is {found['status']}, not done", key=key, value=folder, code=Code.UNFINISHED)
        refuse_several(path, found["config"], key)
        if found["checksum"] in (
            None,
            run_folder.ALTERED,
        ):  # else the record is as it was written, whatever its copy is
            refuse_edited(path, found)
        try:
            return cls._checked(path, found)
        except UserError as error:
            raise UserError(
                f"is damaged: {str(error).removesuffix('.')}", file=path / "run.json", code=Code.DAMAGED
            ) from None

    @classmethod
    def _checked(cls, path: Path, found: dict[str, Any]) -> FinishedRecord:
        for group, choice in found["choices"].items():
            _need(choice is None or type(choice) is str, f"choices.{group}", "is no text")
        own = found["config"]
        for key, text in _texts(own, "config"):
            # A record's config is resolved: what looks like an interpolation would read this machine's environment.
            _need("${" not in text, key, "is an interpolation")
        for group in ("model", "adapter", "data", "trainer"):
            _need(group in own, f"config.{group}", "is missing")
        for group in GROUPS:
            _need(isinstance(own.get(group, {}), dict), f"config.{group}", "is not a group of keys")
        for group in ("tasks", "tracking"):
            _need(isinstance(own.get(group) or {}, dict), f"config.{group}", "is not a group of keys")
        config = checked(found)
        columns = config["data"].get("text_columns")
        named = isinstance(columns, list) and len(columns) in (1, 2) and all(type(name) is str for name in columns)
        _need(named, "config.data.text_columns", "does not name one or two columns")
        members = _members(path, config["ensemble"].get("members"), bool(own.get("tasks")))
        _check_targets(found["targets"], members)
        environment = found["environment"]
        precision, sha256 = environment.get("precision"), environment.get("backbone_sha256")
        _need(precision in PRECISIONS, "environment.precision", f"is none of {', '.join(PRECISIONS)}")
        is_hash = type(sha256) is str and re.fullmatch("[0-9a-f]{64}", sha256) is not None
        _need(is_hash, "environment.backbone_sha256", "is no SHA-256")
        fitted = _calibrations(found["selection"], members)
        return cls(path, found, config, columns, members, precision, sha256, *fitted)


def _sha256(path: Path) -> str:
    try:
        with untrusted.open_file(path, max_bytes=2**63) as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=path, code=Code.UNREADABLE) from None


def _need(holds: bool, name: str, reason: str) -> None:
    if not holds:
        raise UserError(f"{name} {reason}", code=Code.DAMAGED)


def _texts(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Walk over every text below a node, keys included, with its place."""
    if isinstance(node, str):
        yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield f"{name}.{key}", key
            yield from _texts(value, f"{name}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _texts(value, f"{name}.{i}")


def _members(path: Path, members: Any, tasks: bool) -> int:
    """Return how many adapters the folder holds; of an ensemble, each member's is looked for."""
    if members is None or tasks:
        return 1
    _need(type(members) is int and members >= 1, "config.ensemble.members", "is no number of members")
    if members > 1:
        for i in range(members):  # stops at the first that is missing, however many a damaged record promises
            _need(
                (path / "adapter" / f"member_{i}").is_dir(),
                "config.ensemble.members",
                f"is {members}, and adapter/member_{i} is missing",
            )
    return int(members)


def _check_targets(targets: dict[str, Any], members: int) -> None:
    for name, ranks in targets.items():
        each = ranks if isinstance(ranks, list) else [ranks] * members
        right = len(each) == members and all(type(rank) is int and 0 <= rank <= HIGHEST_RANK for rank in each)
        _need(right, f"targets.{name}", "is no rank, nor one for each member")


def _calibrations(selection: dict[str, Any], members: int) -> tuple[Calibration | None, list[Calibration]]:
    own = Calibration.read(selection)
    entries = selection.get("members", [])
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    _need(is_list and len(entries) in (0, members), "selection.members", "has not one entry for each member")
    found = [each for entry in entries if (each := Calibration.read(entry, "selection.members"))]
    return own, found if len(found) == members else []
