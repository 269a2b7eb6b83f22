"""`lora-bench export`: a finished run as an adapter for PEFT, or as a plain Hugging Face model."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from lora_bench.adapters import peft_format
from lora_bench.adapters.layer import QuantizedLinear
from lora_bench.backbones.load import public_place
from lora_bench.checks import need_one_of
from lora_bench.errors import UserError
from lora_bench.paths import check_folder
from lora_bench.predict import FinishedRun
from lora_bench.recorded import model_places
from lora_bench.screen import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.adapters.pack import Pack

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The class of transformers that loads a backbone, by what peft calls its task."""


def run_export(cfg: DictConfig, *, console: Console) -> None:
    """`lora-bench export run=DIR format=peft|merged output=DIR`."""
    output = Path(str(cfg.output))
    need_one_of("format", str(cfg.format), ("peft", "merged"))
    _refuse_taken(output)
    check_folder(output, "output")
    places = model_places(cfg.model)
    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **places)
    for note in run.notes:
        console.print(shown(f"note: {note}"))
    backbone = run.pack.backbone
    auto_class = f"transformers.{AUTO_CLASSES[backbone.peft_task]}"
    if run.pack.matchings:
        reason = "compares the two texts beside the head, for which neither PEFT nor a plain classifier has a place"
        raise UserError(reason, key="adapter.matching", value="true", remedy="Train with adapter.matching=false.")
    one = output if run.pack.size == 1 else output / "member_0"
    if cfg.format == "peft":
        _refuse_unknown_to_peft(run.pack, str(run.record["choices"].get("adapter")))
        base = public_place(run.experiment.model)
        with _new_folder(output) as folder:
            for k, own in enumerate(_of_members(folder, run.pack.size)):
                peft_format.save(own, run.pack, k, base, for_peft=True)
                backbone.tokenizer.save_pretrained(own)
        load = f'peft.PeftModel.from_pretrained({auto_class}.from_pretrained("{base or "BASE"}"), "{one}")'
    else:
        with _new_folder(output) as folder:
            for k, own in enumerate(_of_members(folder, run.pack.size)):
                if k > 0:  # writing the one before has taken the pack apart
                    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **places)
                write_merged(own, run.pack, k, run.experiment.data.label_names)
        load = f'{auto_class}.from_pretrained("{one}")'
    for line in (f"written: {output}", f"load it: {load}"):
        console.print(shown(line), soft_wrap=True)
    if run.pack.size > 1:
        console.print(
            shown(f"It is an ensemble of {run.pack.size}, member_0, member_1, …: average their probabilities.")
        )


def _of_members(folder: Path, members: int) -> list[Path]:
    """Where each member's files go: into `folder` itself where there is one, else below it."""
    return [folder] if members == 1 else [folder / f"member_{k}" for k in range(members)]


@torch.no_grad()
def write_merged(folder: Path, pack: Pack, member: int, label_names: Sequence[str]) -> None:
    """Write a member as a plain Hugging Face model with its tokenizer; the pack is taken apart.

    Args:
        folder: made here.
        pack: on a backbone in fp32.
        member: which of its members.
        label_names: what label 0 and label 1 are called.
    """
    trained = {name: p.detach().clone() for name, p in pack.head_parameters(member).items()}
    merged = {**pack.merged(member), **trained}
    pack.detach()
    network: Any = pack.network
    for name, tensor in merged.items():
        network.get_parameter(name).copy_(tensor)
    config = network.config
    if pack.backbone.head_modules:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: label for label, name in config.id2label.items()}
    if pack.backbone.peft_task == "SEQ_CLS":
        config.problem_type = "single_label_classification"
    network.save_pretrained(folder)
    pack.backbone.tokenizer.save_pretrained(folder)


def _refuse_unknown_to_peft(pack: Pack, choice: str) -> None:
    """A sentence that says why, where peft has no form for what the run learned."""
    updates = pack.updates[0]
    if pack.members[0].adapter.peft_settings(updates):
        return
    if pack.trains_backbone:
        reason = "trains the backbone itself, so it has no adapter"
    elif not updates:
        reason = "has no adapter, only a head"
    elif any(isinstance(module, QuantizedLinear) for update in updates.values() for module in update.modules()):
        reason = "adapts quantised weights, which an adapter for PEFT cannot bring along"
    else:
        reason = "is a method that PEFT does not have"
    raise UserError(
        f"adapter={choice} {reason}",
        key="format",
        value="peft",
        remedy="format=merged writes it as a plain Hugging Face model.",
    )


def _refuse_taken(output: Path) -> None:
    try:
        free = not os.path.lexists(output) or (not output.is_symlink() and output.is_dir() and not os.listdir(output))
    except OSError as error:
        raise _unwritable(output, error) from None
    if not free:
        raise UserError("is there already", key="output", value=output, remedy="Give a folder that is not there yet.")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place once all is written; otherwise nothing of it is left."""
    place = Path(os.path.abspath(output))
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, place)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk makes of tensors
        raise _unwritable(output, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(output: Path, error: Exception) -> UserError:
    reason = f"cannot be written: {getattr(error, 'strerror', None) or error}"
    return UserError(reason, key="output", value=output, remedy="Give a folder where you may write.")
