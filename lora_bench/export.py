"""`lora-bench export`: a finished run as an adapter for PEFT, or as a plain Hugging Face model."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from lora_bench.adapters.lowrank.linear import QuantizedLinear
from lora_bench.adapters.peft import files
from lora_bench.backbones.load import public_place
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError, require_one_of
from lora_bench.files.paths import check_folder
from lora_bench.records.backfill import model_places
from lora_bench.run.finished_run import FinishedRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.adapters.pack.pack import Pack

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The class of transformers that loads a backbone, by what peft calls its task."""


def run_export(cfg: DictConfig, *, console: Console) -> None:
    """`lora-bench export run=DIR format=peft|merged output=DIR`."""
    output = Path(str(cfg.output))
    require_one_of("format", str(cfg.format), ("peft", "merged"))
    _refuse_taken(output)
    check_folder(output, "output")
    places = model_places(cfg.model)
    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **places)
    for note in run.notes:
        console.print(sanitise(f"note: {note}"))
    backbone = run.pack.backbone
    auto_class = f"transformers.{AUTO_CLASSES[backbone.peft_task]}"
    if run.pack.matchings:
        reason = "compares the two texts beside the head, for which neither PEFT nor a plain classifier has a place"
        raise UserError(
            reason,
            key="adapter.matching",
            value="true",
            remedy="Train with adapter.matching=false.",
            code=Code.UNSUPPORTED,
        )
    one = output if run.pack.size == 1 else output / "member_0"
    differences, reading = _differences(run), _reading(run)
    if cfg.format == "peft":
        _refuse_unknown_to_peft(run.pack, str(run.record["choices"].get("adapter")))
        base = public_place(run.experiment.model)
        with _new_folder(output) as folder:
            for k, own in enumerate(_of_members(folder, run.pack.size)):
                files.save(own, run.pack, k, base, for_peft=True)
                backbone.tokenizer.save_pretrained(own)
            _write_readme(folder, cfg.format, [*differences, *reading])
        load = f'peft.PeftModel.from_pretrained({auto_class}.from_pretrained("{base or "BASE"}"), "{one}")'
    else:
        with _new_folder(output) as folder:
            for k, own in enumerate(_of_members(folder, run.pack.size)):
                if k > 0:  # writing the one before has taken the pack apart
                    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **places)
                write_merged(own, run.pack, k, run.experiment.data.label_names)
            _write_readme(folder, cfg.format, [*differences, *reading])
        load = f'{auto_class}.from_pretrained("{one}")'
    for line in (f"written: {output}", f"load it: {load}"):
        console.print(sanitise(line), soft_wrap=True)
    for difference in differences:
        console.print(sanitise(f"note: {difference}"), soft_wrap=True)


def _differences(run: FinishedRun) -> list[str]:
    """Return what `lora-bench predict` does with this run's model that the exported model does not do by itself."""
    experiment = run.experiment
    notes = []
    if experiment.trainer.score_both_orders and len(experiment.data.text_columns) > 1:
        notes.append(
            "this run scores both orders of the two texts (trainer.score_both_orders), an exported model one. "
            "For the scores of lora-bench predict, score (a, b) and (b, a) and take the mean of P(label 1)."
        )
    if run.pack.size > 1:
        notes.append(f"it is an ensemble of {run.pack.size}, member_0, member_1, …: average their probabilities.")
    return notes


def _reading(run: FinishedRun) -> list[str]:
    """Return how the model reads a pair and what its logits mean."""
    experiment, backbone = run.experiment, run.pack.backbone
    notes = [f"pairs are truncated to {experiment.data.max_length} tokens, the longer text first."]
    if backbone.peft_task != "SEQ_CLS":
        columns = [(name, ["…"]) for name in experiment.data.text_columns]
        notes.append(f"the model reads one text, made of the columns: {backbone.render(columns)[0][0]!r}.")
    if backbone.peft_task == "TOKEN_CLS":
        notes.append("the logits of a pair are the mean of its tokens' logits, padding left out.")
    if backbone.peft_task == "SEQ_2_SEQ_LM":
        words = ", ".join(getattr(experiment.model, "label_words", ()))
        notes.append(f"its logits are the decoder's first scores of the first tokens of: {words}.")
    return notes


def _write_readme(folder: Path, form: str, notes: Sequence[str]) -> None:
    """Write what the folder holds, and how to score with it."""
    what = "A LoRA-type adapter in PEFT's format" if form == "peft" else "A Hugging Face model"
    lines = [f"# {what}", "", "Written by `lora-bench export`. For the scores of `lora-bench predict`:", ""]
    lines += [f"- {note[0].upper()}{note[1:]}" for note in notes]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    network.config = pack.backbone.plain_config(label_names)
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
        code=Code.UNSUPPORTED,
    )


def _refuse_taken(output: Path) -> None:
    try:
        free = not os.path.lexists(output) or (not output.is_symlink() and output.is_dir() and not os.listdir(output))
    except OSError as error:
        raise _unwritable(output, error) from None
    if not free:
        raise UserError(
            "is there already",
            key="output",
            value=output,
            remedy="Give a folder that is not there yet.",
            code=Code.EXISTS,
        )


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
    return UserError(
        reason, key="output", value=output, remedy="Give a folder where you may write.", code=Code.UNWRITABLE
    )
