"""The record of a finished run, checked once for all code that predicts with it: files of a run's folder are untrusted.

torch is not imported, so that a folder without a finished run is refused quickly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lora_bench.config.build import build_data
from lora_bench.config.metric_names import task_form
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.calibration import Calibration
from lora_bench.files import untrusted
from lora_bench.records import hub_run, run_folder
from lora_bench.records.backfill import load_config, refuse_edited, relocate, without_removed_settings
from lora_bench.records.environment import PACKAGES
from lora_bench.records.run_folder import ADAPTER, RECORD_FILE, is_prompted, member_adapter_folder
from lora_bench.records.task_folders import refuse_multitask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_bench.config.schema import Data

GROUPS = ("model", "adapter", "data", "optimizer", "trainer", "metric", "pack", "ensemble", "head")
"""Config groups that a finished run may have."""
PRECISIONS = ("float32", "bfloat16")
MAX_RANK = 1 << 20
"""A record with a higher rank is damaged."""


@dataclass(frozen=True)
class FinishedRecord:
    """The record of a finished run, with the values that loading it needs, each checked and of its type."""

    folder: Path
    record: dict[str, Any]
    config: dict[str, Any]
    """The config, with defaults for keys that are newer than the run."""
    text_columns: list[str]
    """Names of one or two columns."""
    label_names: list[str] | None
    """Names of the classes 0, 1, …; None if the run predicts a number."""
    members: int
    """Number of adapters: the size of an ensemble, otherwise 1."""
    precision: str
    """Compute dtype, one of `PRECISIONS`."""
    backbone_sha256: str
    """Hash of the backbone's weights."""
    calibration: Calibration | None
    """Calibration fitted on the selection split; None for an older run without one."""
    member_calibrations: list[Calibration]
    """Calibration of each member of an ensemble; empty for other runs."""

    def check_weights(self, adapter: Path) -> None:
        """Refuse an adapter's folder whose weight files were changed after the run wrote them.

        Files that the record has no SHA-256 of, as in older records, are accepted. A missing file or folder is not
        noticed here.

        Args:
            adapter: the folder; its own files `*.safetensors` are checked, not those of folders in it.

        Raises:
            UserError: the SHA-256 of a file differs from the record, or the file cannot be read.
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
        """Rank of each target module; a list with one rank per member where an ensemble's members differ."""
        return self.record["targets"]  # type: ignore[no-any-return]

    @cached_property
    def data(self) -> Data:
        """The settings of its data, with the names of its classes.

        Raises:
            UserError: the record is damaged.
        """
        try:
            data = build_data(OmegaConf.create(self.config["data"]))
        except UserError as error:
            raise damaged(self.folder, error) from None
        return replace(data, label_names=self.label_names, positive_label=None)

    @property
    def form(self) -> str:
        """The form of the run's task: a key of `SHOWN_METRICS`."""
        return task_form(str(self.config["data"].get("type")), len(self.label_names or ()))

    @property
    def other_packages(self) -> list[str]:
        """The packages that registered parts of the run, as `gated-lora 0.1`; empty for a run without them."""
        versions = self.record["environment"].get("versions")
        others = versions.items() if isinstance(versions, dict) else ()
        return [f"{name} {version}" for name, version in others if name not in ("python", *PACKAGES)]

    def relocate(self, model_path: str | None, tokenizer: str | None) -> FinishedRecord:
        """Return the record with new paths of its backbone and tokenizer (`backfill.relocate`)."""
        return replace(self, config=relocate(self.config, model_path, tokenizer))

    @classmethod
    def read(cls, folder: str | Path, key: str = "run") -> FinishedRecord:
        """Read and check the record in `folder`.

        Args:
            folder: of the run; or `hf://OWNER/NAME`, with or without `@REVISION`, which is downloaded.
            key: the command-line option that names the folder, for messages.

        Raises:
            UserError: there is no record or it is damaged, its config was edited, or the run is not done, has several
                tasks, or is a run of `lora-bench prompt`.
        """
        path = hub_run.fetch(folder, key) if hub_run.is_on_hub(folder) else Path(str(folder))
        record = run_folder.read(path)
        if is_prompted(record):
            raise UserError(
                "is a run of lora-bench prompt, which leaves no model", key=key, value=folder, code=Code.UNSUPPORTED
            )
        if record["status"] != "done":
            raise UserError(f"the run is {record['status']}, not done", key=key, value=folder, code=Code.UNFINISHED)
        refuse_multitask(path, record["config"], key)
        if record["checksum"] in (None, run_folder.ALTERED):  # otherwise the record is as it was written
            refuse_edited(path, record)
        try:
            return cls._checked(path, record)
        except UserError as error:
            raise damaged(path, error) from None

    @classmethod
    def _checked(cls, path: Path, record: dict[str, Any]) -> FinishedRecord:
        """Return the checked record of a run whose status is checked already.

        Its config has defaults for newer keys, and no removed settings.

        Raises:
            UserError: a value is missing, of a wrong type or out of range; it is named.
        """
        for group, choice in record["choices"].items():
            _require(choice is None or type(choice) is str, f"choices.{group}", "is not text")
        recorded = record["config"]
        for key, text in _texts(recorded, "config"):
            # A record's config is resolved. An interpolation in it would read this machine's environment.
            _require("${" not in text, key, "is an interpolation")
        for group in ("model", "adapter", "data", "trainer"):
            _require(group in recorded, f"config.{group}", "is missing")
        for group in GROUPS:
            _require(isinstance(recorded.get(group, {}), dict), f"config.{group}", "is not a group of keys")
        for group in ("tasks", "tracking"):
            _require(isinstance(recorded.get(group) or {}, dict), f"config.{group}", "is not a group of keys")
        config = without_removed_settings(load_config(record))
        columns = config["data"].get("text_columns")
        is_valid = isinstance(columns, list) and len(columns) in (1, 2) and all(type(name) is str for name in columns)
        _require(is_valid, "config.data.text_columns", "does not name one or two columns")
        label_names = _label_names(record["data"], config["data"])
        members = _count_members(path, config["ensemble"].get("members"), bool(recorded.get("tasks")))
        _check_targets(record["targets"], members)
        environment = record["environment"]
        precision, sha256 = environment.get("precision"), environment.get("backbone_sha256")
        _require(precision in PRECISIONS, "environment.precision", f"is not one of {', '.join(PRECISIONS)}")
        is_hash = type(sha256) is str and re.fullmatch("[0-9a-f]{64}", sha256) is not None
        _require(is_hash, "environment.backbone_sha256", "is not a SHA-256")
        calibrations = calibration, of_members = _calibrations(record["selection"], members)
        if label_names is not None and len(label_names) == 2:
            has_threshold = all(fitted is None or fitted.threshold is not None for fitted in (calibration, *of_members))
            _require(has_threshold, "selection.threshold", "is null, and the run has two classes")
        return cls(path, record, config, columns, label_names, members, precision, sha256, *calibrations)


def damaged(folder: Path, error: UserError) -> UserError:
    """Return the refusal of a run's record for a value in it that `error` refused."""
    reason = f"is damaged: {str(error).removesuffix('.')}"
    return UserError(reason, file=folder / RECORD_FILE, code=Code.DAMAGED)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; a `UserError` if it cannot be read or is no regular file."""
    try:
        with untrusted.open_file(path, max_bytes=2**63) as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=path, code=Code.UNREADABLE) from None


def _require(holds: bool, name: str, reason: str) -> None:
    """Raise a `UserError` about the value of this name, unless a condition holds."""
    if not holds:
        raise UserError(f"{name} {reason}", code=Code.DAMAGED)


def _texts(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield (path of keys, text) of every text below a node, keys included."""
    if isinstance(node, str):
        yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield f"{name}.{key}", key
            yield from _texts(value, f"{name}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _texts(value, f"{name}.{i}")


def _label_names(data: dict[str, Any], config: dict[str, Any]) -> list[str] | None:
    """Return the names of a run's classes when it was trained; None if it predicts a number.

    Args:
        data: the section of the record, which older records have without names.
        config: the group `data`.

    Raises:
        UserError: they are not two or more different names.
    """
    if config.get("type") == "regression":
        return None
    names = data.get("label_names") or config.get("label_names") or ["0", "1"]
    is_valid = isinstance(names, list) and all(type(name) is str and name for name in names)
    _require(is_valid and len(names) == len(set(names)) >= 2, "data.label_names", "is not a list of two or more names")
    return names


def _count_members(path: Path, members: Any, tasks: bool) -> int:
    """Return the number of adapters in the folder, after a check that an ensemble has a folder for each member.

    It is 1 for the folder of a run of several tasks, and for a config without the key. A single adapter's folder is not
    checked.

    Raises:
        UserError: the number is invalid, or a member's folder is missing.
    """
    if members is None or tasks:
        return 1
    _require(type(members) is int and members >= 1, "config.ensemble.members", "is not a number of members")
    if members > 1:
        for i in range(members):  # stops at the first missing one: a damaged record may name any number
            _require(
                member_adapter_folder(path, i).is_dir(),
                "config.ensemble.members",
                f"is {members}, and {ADAPTER}/member_{i} is missing",
            )
    return int(members)


def _check_targets(targets: dict[str, Any], members: int) -> None:
    """Raise a `UserError` unless each target has a rank, or a list of one rank per member."""
    for name, ranks in targets.items():
        by_member = ranks if isinstance(ranks, list) else [ranks] * members
        is_valid = len(by_member) == members and all(type(rank) is int and 0 <= rank <= MAX_RANK for rank in by_member)
        _require(is_valid, f"targets.{name}", "is neither a rank nor a list of one rank per member")


def _calibrations(selection: dict[str, Any], members: int) -> tuple[Calibration | None, list[Calibration]]:
    """Return the calibration of a run, and those of its ensemble's members (empty unless all have one).

    Raises:
        UserError: a number is out of range, or there are entries for another number of members.
    """
    calibration = Calibration.read(selection)
    entries = selection.get("members", [])
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    _require(is_list and len(entries) in (0, members), "selection.members", "does not have one entry per member")
    of_members = [fitted for entry in entries if (fitted := Calibration.read(entry, "selection.members"))]
    return calibration, of_members if len(of_members) == members else []
