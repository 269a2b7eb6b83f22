"""The published parts of a finished run: its weights, its base model, and the forms in which other programs load it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.peft.names import OF_PEFT
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted
from lora_bench.records import run_folder
from lora_bench.records.finished_record import FinishedRecord
from lora_bench.records.run_folder import RECORD_FILE, adapter_folders

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER_WEIGHTS, FULL_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
_HEAD_OF_PAIR_FEATURES = "base_model.model.matching."


@dataclass(frozen=True)
class PublishedRun:
    """A finished run that is published under the name of a repository."""

    finished: FinishedRecord
    repository: str
    """Its id on the hub, as the user gave it."""

    @classmethod
    def read(cls, folder: str | Path, repository: str) -> PublishedRun:
        """Read the record of a finished run, and check that its weights are those that it wrote.

        Raises:
            UserError: there is no finished run, its record or weights were changed, or weights are missing.
        """
        finished = FinishedRecord.read(folder)
        if finished.record["checksum"] == run_folder.ALTERED:
            reason = "was edited or damaged after it was written, so its results are not published"
            raise UserError(reason, file=finished.folder / RECORD_FILE, code=Code.DAMAGED)
        run = cls(finished, repository)
        for adapter in run.adapters:
            weights = adapter / (FULL_WEIGHTS if run.is_full else ADAPTER_WEIGHTS)
            if not weights.is_file():
                raise UserError("is missing", file=weights, remedy="Train the run again.", code=Code.NOT_FOUND)
            finished.check_weights(adapter)
        return run

    @property
    def adapters(self) -> list[Path]:
        """The folder of the adapter of each member."""
        return adapter_folders(self.finished.folder, self.finished.members)

    @property
    def is_full(self) -> bool:
        """True for full fine-tuning: the run's `adapter/` is a whole model."""
        return bool(self.finished.config["adapter"].get("method") == "full")

    @property
    def method(self) -> str:
        """The run's choice of the group `adapter`."""
        return str(self.finished.record["choices"].get("adapter") or self.finished.config["adapter"].get("method"))

    @property
    def data(self) -> dict[str, Any]:
        """The group `data` of its config."""
        return self.finished.config["data"]  # type: ignore[no-any-return]

    @property
    def data_name(self) -> str:
        """The name of its data: the id and configuration on the hub, or the choice of the group `data`."""
        names = (self.data.get("hub_id"), self.data.get("hub_config"))
        return " ".join(str(name) for name in names if name) or str(self.finished.record["choices"].get("data"))

    # -- the base model --

    @property
    def base_id(self) -> str | None:
        """The id of its base model on the hub; None for a local folder or a random model."""
        model = self.finished.config["model"]
        return None if self.needs_path or model.get("random") else model.get("hub_id")

    @property
    def needs_path(self) -> bool:
        """True if the base model was a local folder, which whoever loads the run has to name."""
        model = self.finished.config["model"]
        return bool(model.get("path") or model.get("folder"))

    @property
    def base_name(self) -> str:
        """The name of its base model: the id on the hub, the package, or the last name of the folder."""
        model = self.finished.config["model"]
        name = self.base_id or model.get("path") or model.get("folder") or model.get("package")
        return (
            PurePath(name).name if name and self.needs_path else str(name or self.finished.record["choices"]["model"])
        )

    # -- other programs --

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """The content of the first member's adapter_config.json; empty for full fine-tuning, or if it is damaged."""
        try:
            content = untrusted.read_json(self.adapters[0] / ADAPTER_CONFIG)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def tensor_names(self) -> list[str]:
        """Names of the tensors of the first member's adapter; empty for full fine-tuning.

        A damaged file is a `UserError`.
        """
        from safetensors import SafetensorError, safe_open

        path = self.adapters[0] / ADAPTER_WEIGHTS
        if self.is_full:
            return []
        try:
            with safe_open(path, "np") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"is damaged ({error})", file=path, code=Code.DAMAGED) from None

    @property
    def has_pair_features(self) -> bool:
        """True if the head has pair features, which no plain classifier has."""
        return any(name.startswith(_HEAD_OF_PAIR_FEATURES) for name in self.tensor_names)

    @property
    def is_classifier(self) -> bool:
        """True if other programs score it as a sequence classifier of the texts themselves, without a template."""
        model = self.finished.config["model"]
        is_head = model.get("form") in (None, "classifier") and not model.get("template")
        return is_head and self.adapter_config.get("task_type", "SEQ_CLS") == "SEQ_CLS"

    @property
    def is_read_by_peft(self) -> bool:
        """True if PEFT loads `adapter/` as it is, with the predictions of one order of the texts."""
        heads = tuple(f"base_model.model.{name}." for name in self.adapter_config.get("modules_to_save") or ())
        return (
            self.base_id is not None
            and self.finished.members == 1
            and self.is_classifier
            and bool(self.adapter_config.get("peft_type"))
            and all(name.startswith(heads) or OF_PEFT.fullmatch(name) for name in self.tensor_names)
        )
