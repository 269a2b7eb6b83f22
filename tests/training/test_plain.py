"""A hundred steps of our loop leave what plain code leaves: transformers' own model, peft's own layers."""

from __future__ import annotations

from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lora_bench.adapters.peft import files
from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.training.optim import learning_rate_factor
from tests.adapters.peft_tools import CLASSES, bodies, logits_of, on_folder
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, trainer
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch

STEPS = 100
SETTINGS = optimizer(
    5e-4, eps=1e-6
)  # quick enough to move weights by 0.05; eps keeps AdamW from making steps of rounding
# peft asks transformers for a property that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bodies(tmp_path_factory.mktemp("bodies"))


class Losses:
    def __init__(self) -> None:
        self.all: list[float] = []

    def stepped(self, step: int, losses: Any, pairs: int) -> None:
        self.all.append(losses[0])

    def evaluated(self, member: int, line: Any) -> None: ...


def train_with_plain_torch(model: nn.Module, a_pack: Pack, batches: Iterator[Batch]) -> list[float]:
    """The same steps, written out with nothing of ours but the batches and the schedule of rates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": SETTINGS.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=SETTINGS.lr, eps=SETTINGS.eps, foreach=False)
    losses = []
    for step, batch in enumerate(batches, 1):
        for group in adamw.param_groups:
            group["lr"] = SETTINGS.lr * learning_rate_factor(SETTINGS, step, STEPS)
        assert batch.labels is not None
        loss = F.cross_entropy(logits_of(model, a_pack.backbone, batch), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.grad_clip_norm or float("inf"))
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_with_lora_bench(a_pack: Pack) -> tuple[list[float], Iterator[Batch]]:
    """The losses of our loop, and the batches it saw."""
    train, selection = tables(a_pack.backbone)
    settings, losses = trainer(STEPS), Losses()
    fit(a_pack, [SETTINGS], settings, train, selection, watcher=losses)
    plan, pad = BatchPlan(train.lengths, settings.batch_size), a_pack.backbone.tokenizer.pad_token_id
    epochs = (training_batches(train, plan, [0], epoch, pad) for epoch in count())
    return losses.all, islice(chain.from_iterable(epochs), STEPS)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("bert", "dora"),
        ("roberta", "lora"),
        ("t5", "lora"),
        pytest.param("bert", "rslora", marks=pytest.mark.matrix),
        pytest.param("t5", "dora", marks=pytest.mark.matrix),
    ],
)
def test_an_adapter(form: str, method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    a_pack = pack(form, (adapter(method, "rank=3"), 0), backbone=on_folder(form, folders[form]))
    prepare(a_pack, trainer(STEPS), tables(a_pack.backbone)[0])
    files.save(tmp_path / "begin", a_pack, 0, str(folders[form]))
    losses, batches = train_with_lora_bench(a_pack)
    files.save(tmp_path / "end", a_pack, 0, str(folders[form]))
    base = CLASSES[form].from_pretrained(folders[form])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "begin", is_trainable=True).eval()
    assert train_with_plain_torch(theirs, a_pack, batches) == pytest.approx(losses, abs=1e-4)
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(theirs)
    expected = load_file(tmp_path / "end/adapter_model.safetensors")
    assert_close({name: weights[name].detach() for name in expected}, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_full_fine_tuning(form: str, folders: dict[str, Path]) -> None:
    a_pack = pack(form, (adapter("full"), 0), backbone=on_folder(form, folders[form]))
    for module in a_pack.network.modules():  # each of the two would draw its own dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    theirs = CLASSES[form].from_pretrained(folders[form]).eval()
    with torch.no_grad():
        for name, p in a_pack.trainable(0).items():
            theirs.get_parameter(name).copy_(p)
    losses, batches = train_with_lora_bench(a_pack)
    assert train_with_plain_torch(theirs, a_pack, batches) == pytest.approx(losses, abs=1e-4)
    # A key's bias changes no attention: its gradient is rounding, which AdamW makes steps of.
    expected = {name: tensor for name, tensor in a_pack.state(0).items() if not name.endswith("key.bias")}
    assert_close({name: theirs.get_parameter(name).detach() for name in expected}, expected, atol=1e-4)
