"""What every method of PEFT promises in our loop, on one tiny model: for tests and for `scripts/peft_checks.py`."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers

from lora_bench.adapters.pack.attachment import detach
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.member_modules import AdaptedLinear
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.config.groups import choices
from lora_bench.errors import UserError
from tests.adapters.peft_tools import bodies, in_peft, on_folder
from tests.adapters.tools import adapter, merged_logits, stir, train, trainer
from tests.backbones.architectures import ARCHITECTURES
from tests.backbones.tools import make, random_batch, reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.adapters.base import Adapter
    from lora_bench.data.batching import Batch

METHODS = tuple(choice for choice in choices("adapter") if choice.startswith("peft_"))
SMALLER = {
    "peft_adamss": ("rank=16",),
    "peft_c3a": ("settings.block_size=16",),
    "peft_fourierft": ("settings.n_frequency=200", "settings.scaling=15"),
    "peft_miss": ("rank=8",),
    "peft_psoft": ("rank=8",),
    "peft_road": ("settings.group_size=16",),
    "peft_shira": ("rank=4",),
    "peft_vblora": ("settings.vector_length=16",),
    "peft_waveft": ("settings.n_frequency=200",),
}
"""Settings for linears of 32 features, where the defaults need larger ones."""
STARTS_ELSEWHERE = {"peft_c3a", "peft_fourierft", "peft_unilora", "peft_vblora"}
"""Methods whose first function is not the backbone's: what they train is drawn at random."""
NOT_MERGED = {("peft_lily", None), ("peft_beft", "t5"), ("peft_beft", "t5_encoder"), ("peft_beft", "llama")}
"""Methods that no plain linear equals, on all models or on those whose linears have no bias."""
MODELS = ("bert", "roberta", "t5", "t5_encoder", "llama")
IN_FP32 = {"peft_adamss", "peft_frod", "peft_psoft"}
"""Methods that are refused on a backbone in bf16."""
LIMITS = {"identity": 1e-5, "reloaded": 0.0, "peft": 1e-5, "merged": 1e-5, "bf16": 0.1}
"""The largest difference allowed, in logits."""


@dataclass
class Result:
    """What one method does on one model. Differences are in logits, the largest over rows and classes."""

    parameters: int
    identity: float
    """Between the backbone's own function and the adapted one before training."""
    without_gradient: list[str]
    """Trained tensors that a backward pass leaves without a gradient."""
    is_unchanged: bool
    """Whether the backbone is bitwise as before, after training and detaching."""
    reloaded: float
    """Between the member and one that has loaded its file."""
    peft: float
    """Between the member and PEFT's own model with its file."""
    merged: float | None
    """Between the member and the plain model with merged weights; None if PEFT cannot merge it."""
    bf16: float | None
    """Between the member in fp32 and on a backbone in bf16: the rounding of bf16; None if it is refused there."""

    def failures(self, method: str, model: str) -> list[str]:
        """Return the names of the promises that are not kept."""
        failed = [key for key, limit in LIMITS.items() if not (getattr(self, key) or 0.0) <= limit]
        if method in STARTS_ELSEWHERE and self.identity > LIMITS["identity"]:
            failed.remove("identity")
        if (self.merged is None) != bool({(method, None), (method, model)} & NOT_MERGED):
            failed.append("merged")
        if self.without_gradient:
            failed.append("gradients")
        if not self.is_unchanged:
            failed.append("unchanged")
        if (self.bf16 is None) != (method in IN_FP32):
            failed.append("bf16")
        return failed

    def to_json(self, method: str, model: str) -> str:
        """Return the result as one line of JSON, with the promises that are not kept."""
        return json.dumps({"method": method, "model": model, **asdict(self), "failed": self.failures(method, model)})


class Models:
    """Tiny random models in folders, each made when it is first asked for.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, Path] = {}

    def folder(self, model: str) -> Path:
        """Return the folder of one of `MODELS`."""
        if model not in self.folders and model == "llama":
            (llama,) = (a for a in ARCHITECTURES if a.name == "Llama")
            self.folders[model] = llama.save(self.root / "llama")
        elif model not in self.folders:
            self.folders |= bodies(self.root)
        return self.folders[model]

    def backbone(self, model: str) -> Any:
        """Return a fresh backbone of one of `MODELS`."""
        folder = self.folder(model)
        return make("llama", f"model.path={folder}") if model == "llama" else on_folder(model, folder)

    def in_peft(self, model: str, file: Path) -> Any:
        """Return the model of transformers with an adapter that PEFT has loaded onto it."""
        if model != "llama":
            return in_peft(model, self.folder(model), file)
        import peft

        base = transformers.AutoModelForSequenceClassification.from_pretrained(self.folder(model))
        base.config.pad_token_id = self.backbone(model).network.config.pad_token_id
        return peft.PeftModel.from_pretrained(base, file).eval()


def settings_of(method: str) -> Adapter:
    """Return the settings of a choice of the group `adapter`, small enough for the tiny models."""
    return adapter(method, *SMALLER.get(method, ()))


def check(method: str, model: str, models: Models, folder: Path) -> Result:
    """Train, save, reload and merge one method on one model; the folder is for the adapter file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice, and what its methods do to get their results
        return _check(settings_of(method), model, models, folder)


def _check(settings: Adapter, model: str, models: Models, folder: Path) -> Result:
    backbone = models.backbone(model)
    batch = random_batch(backbone, padded=False)
    with torch.no_grad():
        before = backbone.hash()
        made = Pack(backbone, [Member(settings, 0)])
        (initial,) = made.eval()(batch)
        detach(made.network, AdaptedLinear)  # but not its head, which is new
        identity = _difference(initial, made(batch)[0])
        made._attach_updates()
    train(made, settings=trainer(2))
    stir(made).train()
    torch.nn.functional.cross_entropy(made(batch)[0], batch.labels).backward()  # type: ignore[arg-type]
    missing = [name for name, p in made.trainable(0).items() if p.grad is None or not p.grad.isfinite().all()]
    with torch.no_grad():
        (logits,) = made.eval()(batch)
        files.save(folder, made, 0, str(models.folder(model)))
        reloaded = _reloaded(made, models.backbone(model), folder)
        in_fp32 = _difference(reloaded.eval()(batch)[0], logits)
        in_bf16 = _in_bf16(made, models.backbone(model), folder, batch, logits)
        theirs = reference(
            models.in_peft(model, folder).get_base_model(), batch, getattr(backbone, "label_tokens", None)
        )
        in_pefts = _difference(theirs, logits)
        parameters = made.count_parameters(0)["adapter"]
        merged = _merged(made, batch, logits)
        made.detach()
    return Result(parameters, identity, missing, backbone.hash() == before, in_fp32, in_pefts, merged, in_bf16)


def _reloaded(made: Pack, backbone: Any, folder: Path) -> Pack:
    """Return a member of another seed with the tensors of a file."""
    other = Pack(backbone, [replace(made.members[0], seed=1, saved_ranks=made.ranks(0))])
    files.load(folder, other, 0)
    return other


def _in_bf16(made: Pack, backbone: Any, folder: Path, batch: Batch, logits: torch.Tensor) -> float | None:
    """Return how far a member's logits are from its own on a backbone in bf16; None if the method is refused there."""
    backbone.to(torch.device("cpu"), torch.bfloat16, trained=False)
    try:
        return _difference(_reloaded(made, backbone, folder).eval()(batch)[0], logits)
    except UserError:
        return None


def _merged(made: Pack, batch: Batch, logits: torch.Tensor) -> float | None:
    """Return how far the merged model's logits are from a member's; None if the method cannot be merged."""
    try:
        return _difference(merged_logits(made, 0, batch), logits)
    except UserError:
        return None


def _difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    return float((logits - others).abs().max())


def names(methods: Sequence[str]) -> list[str]:
    """Return the methods of these names, with or without their prefix; all if none is named."""
    return [method for method in METHODS if not methods or method.removeprefix("peft_") in methods or method in methods]
