"""`lora-bench export`: write a finished run as an adapter for PEFT, a plain Hugging Face model, or a graph."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from lora_bench.adapters.peft import files
from lora_bench.adapters.peft.fused_rows import can_be_joined, has_parts
from lora_bench.adapters.peft.names import AUTO_CLASSES
from lora_bench.backbones.fused_linear import is_transposed
from lora_bench.backbones.load import public_location
from lora_bench.backbones.locate import local_folder
from lora_bench.backbones.quantized_modules import QuantizedWeight
from lora_bench.backbones.quantized_network import Quantization
from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.console.text import sanitise
from lora_bench.deployment.folder import GRAPH_FORMATS, write_deployment
from lora_bench.deployment.order_effect import describe_order_effect
from lora_bench.errors import Code, UserError, require_one_of
from lora_bench.files.paths import check_folder
from lora_bench.records.backfill import model_paths
from lora_bench.run.finished_run import FinishedRun
from lora_bench.run.prediction_request import resolve_threshold
from lora_bench.run.preflight import EXPORT_FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from omegaconf import DictConfig
    from rich.console import Console

    from lora_bench.adapters.base import Update
    from lora_bench.adapters.pack.pack import Pack


def run_export(cfg: DictConfig, *, console: Console) -> None:
    """Export the run of `cfg.run` in a format of `EXPORT_FORMATS` into the new folder `cfg.output`.

    A README.md is added. The line of code that loads the model is printed. After an error there is no output.

    Raises:
        UserError: the run cannot be loaded, has no such form, or the output exists or cannot be written.
    """
    output = Path(str(cfg.output))
    require_one_of("format", str(cfg.format), EXPORT_FORMATS)
    _refuse_taken(output)
    check_folder(output, "output")
    paths = model_paths(cfg.model)
    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **paths)
    for note in run.notes:
        console.print(sanitise(f"note: {note}"))
    if cfg.format in GRAPH_FORMATS:
        _export_graph(cfg, run, output, console)
    else:
        _export_model(cfg, run, output, console)


def _export_graph(cfg: DictConfig, run: FinishedRun, output: Path, console: Console) -> None:
    """Write the run as a graph with its tokenizer, settings and a script (`deployment/folder.py`)."""
    threshold = resolve_threshold(cfg.threshold, run.finished)
    notes = []
    if run.pack.weight_bytes(range(run.pack.size)):
        notes.append("the run was trained on quantised weights. The graph has them dequantised, in fp32.")
    if run.finished.precision != "float32":
        notes.append(f"the run was trained in {run.finished.precision}. The graph computes in fp32.")
    with _new_folder(output) as folder:
        default = DEFAULT_THRESHOLD if threshold is None else threshold
        write_deployment(folder, run, str(cfg.format), default, notes, console)
    for line in (f"written: {output}", *(f"note: {note}" for note in notes)):
        console.print(sanitise(line), soft_wrap=True)
    texts = " ".join("TEXT" for _ in run.experiment.data.text_columns)
    console.print(sanitise(f"try it: python {output / 'score.py'} {texts}"), soft_wrap=True)


def _export_model(cfg: DictConfig, run: FinishedRun, output: Path, console: Console) -> None:
    """Write the run as an adapter of PEFT or a plain Hugging Face model, an ensemble as a folder for each member.

    Raises:
        UserError: the run has pair features, or its method has no such form.
    """
    backbone = run.pack.backbone
    auto_class = f"transformers.{AUTO_CLASSES[backbone.peft_task]}"
    if run.pack.pair_features:
        reason = "adds pair features to the head, which neither PEFT nor a plain classifier supports"
        raise UserError(
            reason,
            key="head.pair_features",
            value="true",
            remedy="Use format=onnx or format=torch, whose graph has them; or train with head.pair_features=false.",
            code=Code.UNSUPPORTED,
        )
    if cfg.format == "peft":
        _refuse_unknown_to_peft(run.pack, str(run.record["choices"].get("adapter")))
    first_member = output if run.pack.size == 1 else output / "member_0"
    differences, reading = _differences(run, str(cfg.format), console), [*_reading(run), *_usage(run, str(cfg.format))]
    if cfg.format == "peft":
        base = public_location(run.experiment.model)
        with _new_folder(output) as folder:
            for k, member_folder in enumerate(_member_folders(folder, run.pack.size)):
                files.save(member_folder, run.pack, k, base, for_peft=True)
                backbone.save_tokenizer(member_folder)
            _write_readme(folder, cfg.format, [*differences, *reading])
        here = local_folder(run.experiment.model) or base or "BASE"
        outputs = _num_labels(run)
        load = f'peft.PeftModel.from_pretrained({auto_class}.from_pretrained("{here}"{outputs}), "{first_member}")'
    else:
        with _new_folder(output) as folder:
            for k, member_folder in enumerate(_member_folders(folder, run.pack.size)):
                if k > 0:  # writing the previous member has detached the pack
                    paths = model_paths(cfg.model)
                    run = FinishedRun.load(cfg.run, device="cpu", dtype=torch.float32, **paths)
                write_merged(member_folder, run.pack, k, run.experiment.data.label_names)
            _write_readme(folder, cfg.format, [*differences, *reading])
        load = f'{auto_class}.from_pretrained("{first_member}")'
    for line in (f"written: {output}", f"load it: {load}"):
        console.print(sanitise(line), soft_wrap=True)
    for difference in differences:
        console.print(sanitise(f"note: {difference}"), soft_wrap=True)


def _differences(run: FinishedRun, form: str, console: Console) -> list[str]:
    """Return notes on what `lora-bench predict` does beyond the exported model.

    It scores both orders, averages members, and computes with quantised weights, which an adapter for PEFT does not
    have. An empty list if it does none of it. The difference that both orders make is measured on the run's selection
    split.
    """
    experiment = run.experiment
    notes = []
    if form == "peft" and (quantized := run.pack.backbone.quantization) != Quantization():
        parts = {"linears": quantized.linears, "embeddings": quantized.embeddings}
        held = " and ".join(f"{quant_type} {part}" for part, quant_type in parts.items() if quant_type)
        notes.append(
            f"this run computed with {held} (model.quantize); beside a model without them the scores differ. "
            "format=merged writes the dequantised weights."
        )
    if experiment.trainer.scores_both_orders_of(experiment.data) and len(experiment.data.text_columns) > 1:
        notes.append(
            "this run scores both orders of the two texts (trainer.score_both_orders), an exported model one. "
            f"For the scores of lora-bench predict, score (a, b) and (b, a) and take the mean of {_SCORES[run.form]}, "
            "or export with format=onnx or format=torch."
        )
        notes.append(describe_order_effect(run, console))
    if run.pack.size > 1:
        scores = "numbers" if run.form == "regression" else "probabilities"
        notes.append(f"it is an ensemble of {run.pack.size}, member_0, member_1, …: average their {scores}.")
    return notes


_SCORES = {"binary": "P(label 1)", "multiclass": "the probabilities", "regression": "the numbers"}
"""The scores of `lora-bench predict`, by form of task."""


def _num_labels(run: FinishedRun) -> str:
    """Return the argument that gives a base model as many outputs as the run has.

    A base model with another number has a head of another shape, which PEFT does not replace. It is empty for text to
    text, and for the number that models of this type have by default: two, but three for BART.
    """
    outputs, backbone = run.experiment.data.outputs, run.pack.backbone
    config: Any = type(backbone.network.config)
    return "" if backbone.words or outputs == config().num_labels else f", num_labels={outputs}"


def _usage(run: FinishedRun, form: str) -> list[str]:
    """Return notes on the classes of an exported model, and how to use it.

    Args:
        run: the loaded run.
        form: `peft` or `merged`.
    """
    names, backbone = run.label_names, run.pack.backbone
    notes = []
    if names is None:
        notes.append("its one output is the predicted number.")
    else:
        classes = ", ".join(f"{label}: {name!r}" for label, name in enumerate(names))
        notes.append(f"its classes are {{{classes}}}.")
    if form == "peft":
        if arguments := _num_labels(run).removeprefix(", "):
            named = ", id2label={…}, label2id={…}" if names else ""
            notes.append(
                f"load the base model with {arguments}{named}, then this adapter with "
                "`peft.PeftModel.from_pretrained(model, FOLDER)`, which fills its head."
            )
    elif backbone.peft_task == "SEQ_CLS":
        is_pair = backbone.template is None and len(run.experiment.data.text_columns) > 1
        texts = '"text": A' + (', "text_pair": B' if is_pair else "")
        notes.append(
            f"`transformers.pipeline('text-classification', FOLDER)({{{texts}}}, top_k=None)` gives "
            + ("the number." if names is None else "the probability of each class by its name.")
        )
    return notes


_TRUNCATED = {
    "longest_first": "the longer text first",
    "first": "the first text",
    "second": "the second text",
    "middle": "the longer text in its middle",
}
"""The text that loses tokens, by `data.truncation`."""


def _reading(run: FinishedRun) -> list[str]:
    """Return notes on the model's input format and the meaning of its logits."""
    experiment, backbone = run.experiment, run.pack.backbone
    notes = [f"pairs are truncated to {experiment.data.max_length} tokens, {_TRUNCATED[experiment.data.truncation]}."]
    if broken := backbone.special_tokens.broken:
        example, *_ = backbone.special_tokens.break_in(broken)
        notes.append(
            "special tokens that a text contains are read as text: put a space behind their first character, so that "
            f"`{broken[0]}` becomes `{example}`."
        )
    if backbone.template is not None:
        columns = [(name, ["…"]) for name in experiment.data.text_columns]
        kept = ", whose own words are never truncated" if backbone.keeps_template else ""
        notes.append(f"the model reads one text, made of the columns{kept}: {backbone.render(columns)[0][0]!r}.")
    if backbone.peft_task == "TOKEN_CLS":
        notes.append("the logits of a pair are the mean of its tokens' logits, padding left out.")
    if backbone.words:
        words = ", ".join(getattr(experiment.model, "label_words", None) or experiment.data.label_names or ())
        tokens = ", ".join(map(str, backbone.words[0].first_tokens))
        scores = f"the scores of the next token after the text's last, of the first tokens ({tokens}) of"
        if backbone.peft_task == "SEQ_2_SEQ_LM":
            scores = f"the decoder's first scores of the first tokens ({tokens}) of"
        if not backbone.words[0].is_single_step:
            scores = (
                "the log-probabilities of whole words with their end token, where each token counts among those that "
                "continue one of the words"
            )
        notes.append(f"its logits are {scores}: {words}.")
    return notes


def _write_readme(folder: Path, form: str, notes: Sequence[str]) -> None:
    """Write README.md: the content of the folder, and how to reproduce the scores of `lora-bench predict`."""
    title = "A LoRA-type adapter in PEFT's format" if form == "peft" else "A Hugging Face model"
    lines = [f"# {title}", "", "Written by `lora-bench export`. For the scores of `lora-bench predict`:", ""]
    lines += [f"- {note[0].upper()}{note[1:]}" for note in notes]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _member_folders(folder: Path, members: int) -> list[Path]:
    """Return the folder of each member: `folder` itself for a single member, else `member_<k>` below it."""
    return [folder] if members == 1 else [folder / f"member_{k}" for k in range(members)]


@torch.no_grad()
def write_merged(folder: Path, pack: Pack, member: int, label_names: Sequence[str] | None) -> None:
    """Write a member as a plain Hugging Face model with its tokenizer; this detaches the pack and changes the backbone.

    Args:
        folder: is created.
        pack: on a backbone in fp32.
        member: its number in the pack.
        label_names: names of the classes; None: the model predicts a number.
    """
    trained = {name: p.detach().clone() for name, p in pack.head_parameters(member).items()}
    merged = {**pack.merged(member), **trained}
    pack.detach()
    pack.backbone.dequantize()
    network: Any = pack.network
    for name, tensor in merged.items():
        module, _, key = name.rpartition(".")
        getattr(network.get_submodule(module), key).copy_(tensor)  # no parameter where a weight is stored transposed
    network.config = pack.backbone.export_config(label_names)
    network.save_pretrained(folder)
    pack.backbone.save_tokenizer(folder)


def _refuse_unknown_to_peft(pack: Pack, choice: str) -> None:
    """Refuse a run whose adapter PEFT has no format for; the first member decides.

    Args:
        pack: the loaded run.
        choice: the run's choice of the group `adapter`, for the message.

    Raises:
        UserError: with the reason; the remedy is `format=merged`.
    """
    updates = pack.updates[0]
    settings = pack.members[0].adapter.peft_settings(updates)
    is_split = bool(settings) and has_parts(pack.network, updates)
    if settings and (not is_split or can_be_joined(settings)):
        return
    if is_split:
        reason = "adapts query and value of a fused linear, which PEFT can express for LoRA only"
    elif pack.trains_backbone:
        reason = "trains the backbone itself, so it has no adapter"
    elif not updates:
        reason = "has no adapter, only a head"
    elif _is_quantised(updates):
        reason = "adapts quantised weights, which a PEFT adapter does not include"
    else:
        reason = "is a method that PEFT does not have"
        if any(is_transposed(pack.network.get_submodule(f"{name}.base")) for name in updates):
            reason += " for weights that are stored as (in, out), as GPT-2's"
    raise UserError(
        f"adapter={choice} {reason}",
        key="format",
        value="peft",
        remedy="format=merged writes it as a plain Hugging Face model.",
        code=Code.UNSUPPORTED,
    )


def _is_quantised(updates: Mapping[str, Update]) -> bool:
    """Return whether a member's updates are beside quantised weights."""
    return any(isinstance(module, QuantizedWeight) for update in updates.values() for module in update.modules())


def _refuse_taken(output: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder; a link is refused.

    Raises:
        UserError: it exists, or cannot be looked up.
    """
    try:
        free = not os.path.lexists(output) or (not output.is_symlink() and output.is_dir() and not os.listdir(output))
    except OSError as error:
        raise _unwritable(output, error) from None
    if not free:
        raise UserError(
            "already exists",
            key="output",
            value=output,
            remedy="Give a new folder.",
            code=Code.EXISTS,
        )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that is renamed to it at the end, or removed after an error.

    Missing folders above are created.

    Raises:
        UserError: from any `OSError` or `SafetensorError` within the context.
    """
    path = Path(os.path.abspath(output))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        raise _unwritable(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(output: Path, error: Exception) -> UserError:
    """Return the error for an output that cannot be written, for this reason."""
    reason = f"cannot be written: {getattr(error, 'strerror', None) or error}"
    return UserError(
        reason, key="output", value=output, remedy="Give a folder where you may write.", code=Code.UNWRITABLE
    )
