"""Adapter files: what we write peft loads and says the same, and what is not whole is refused by its name."""

from __future__ import annotations

import json
import math
import pickle
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from lora_bench.adapters.peft import files
from lora_bench.errors import Code
from tests.adapters.peft_tools import CLASSES, bodies
from tests.adapters.peft_tools import on_folder as backbone_on
from tests.adapters.tools import adapter, pack, stir
from tests.backbones.tools import FORMS, held, random_batch, reference, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.errors import UserError

WRAPPERS = {
    "bert": peft.PeftModelForSequenceClassification,
    "roberta": peft.PeftModelForSequenceClassification,
    "t5": peft.PeftModelForSeq2SeqLM,
    "t5_encoder": peft.PeftModelForTokenClassification,
}
# peft asks transformers for a property that is going away.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bodies(tmp_path_factory.mktemp("bodies"))


def on_folder(form: str, folder: Path, *members: Any) -> Pack:
    return pack(form, *members, backbone=backbone_on(form, folder))


@of_peft
@pytest.mark.parametrize("settings", [("rank=3", "alpha=5"), ("target_modules=qv", "layers=top:1", "dropout=0.2")])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_peft_loads_what_we_write_and_says_the_same(
    form: str, settings: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    # The second member of two: the files are of one member alone.
    made = stir(on_folder(form, folders[form], (adapter("lora"), 0), (adapter("lora", *settings), 1))).eval()
    files.save(tmp_path / "adapter", made, 1, str(folders[form]))
    base = CLASSES[form].from_pretrained(folders[form])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert type(theirs) is WRAPPERS[form]
    batch = random_batch(made.backbone)
    logits = made(batch)[1]
    assert spread(logits) > 1e-3
    expected = reference(theirs.get_base_model().eval(), batch, getattr(made.backbone, "label_tokens", None))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("form", "task", "head"),
    [
        ("bert", "SEQ_CLS", ["bert.pooler", "classifier"]),
        ("roberta", "SEQ_CLS", ["classifier"]),
        ("t5", "SEQ_2_SEQ_LM", None),
        ("t5_encoder", "TOKEN_CLS", ["classifier"]),
    ],
)
def test_the_config_is_in_pefts_words(form: str, task: str, head: list[str] | None, tmp_path: Path) -> None:
    made = pack(form, (adapter("lora", "rank=3", "alpha=5", "dropout=0.1", "target_modules=qv"), 0))
    files.save(tmp_path, made, 0, "some/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.1,
        "bias": "none",
        "base_model_name_or_path": "some/model",
        "task_type": task,
        "inference_mode": True,
        "target_modules": made.targets[0],
        "modules_to_save": head,
    }
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_method_that_peft_has_no_name_for_says_so(tmp_path: Path) -> None:
    files.save(tmp_path, pack("bert", (adapter("head_only"), 0)), 0, "")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["target_modules"]) == (None, [])
    assert len(held(tmp_path / "adapter_model.safetensors")) == 4


def test_what_peft_has_no_name_for_can_be_left_out(tmp_path: Path) -> None:
    made = stir(pack("bert", (adapter("lora_xs"), 0)))
    files.save(tmp_path / "own", made, 0, "")
    files.save(tmp_path / "for_peft", made, 0, "", for_peft=True)
    own, less = (held(tmp_path / each / "adapter_model.safetensors") for each in ("own", "for_peft"))
    assert {name.rpartition(".")[2] for name in own.keys() - less.keys()} == {"latent"}
    assert all(torch.equal(tensor, own[name]) for name, tensor in less.items())
    assert sum("lora_" in name for name in less) == 24
    assert sum("classifier" in name or "pooler" in name for name in less) == 4


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_full_fine_tuning_leaves_a_plain_model(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    made = stir(on_folder(form, folders[form], (adapter("full"), 0))).eval()
    files.save(tmp_path / "adapter", made, 0, "")
    batch = random_batch(made.backbone)
    (logits,) = made(batch)
    assert spread(logits) > 1e-3
    theirs = CLASSES[form].from_pretrained(tmp_path / "adapter").eval()
    expected = reference(theirs, batch, getattr(made.backbone, "label_tokens", None))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    again = on_folder(form, tmp_path / "adapter", (adapter("full"), 1)).eval()  # and is a backbone like any other
    assert again.backbone.new_parameters == set()
    torch.testing.assert_close(again(batch)[0], logits, atol=1e-6, rtol=0)


# -- what is refused --

LOST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    files.save(tmp_path / "adapter", stir(pack("bert", (adapter("lora"), 0))), 0, "")
    return tmp_path / "adapter"


def refusal(folder: Path, method: str = "lora", *settings: str) -> UserError:
    """Return the error about a damaged file, after which the pack has to be as it was."""
    loaded = pack("bert", (adapter(method, *settings), 0))
    before = loaded.state(0)
    with refuses(Code.DAMAGED) as caught:
        files.load(folder, loaded, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state(0).items())
    return caught.value


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def garble(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def put_a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({LOST: [0.0]}))


def put_a_checkpoint(file: Path) -> None:
    torch.save(held(file), file)


def put_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut_short, garble, empty, remove, put_a_pickle, put_a_checkpoint, put_a_folder])
def test_a_file_that_is_none_is_refused(damage: Callable[[Path], None], saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    damage(file)
    error = refusal(saved)
    assert error.file == file
    assert "lora_" not in str(error)  # else it would have read the tensors


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[LOST]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.bert.embeddings.word_embeddings.lora_A.weight"] = torch.zeros(8, 32)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LOST] = tensors[LOST][:4].clone()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LOST][0, 0] = math.nan


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.classifier.bias"][0] = -math.inf


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lose, "query.lora_A"),
        (add, "word_embeddings"),
        (reshape, "query.lora_A"),
        (poison, "query.lora_A"),
        (overflow, "classifier.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], named: str, saved: Path
) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = held(file)
    change(tensors)
    save_file(tensors, file)
    error = refusal(saved)
    assert error.file == file
    assert named in str(error)


def test_an_adapter_of_another_method_or_rank_is_refused(saved: Path) -> None:
    assert refusal(saved, "full").file == saved / "model.safetensors"
    for other in (("head_only",), ("lora", "rank=4")):
        error = refusal(saved, *other)
        assert error.file == saved / "adapter_model.safetensors"
        assert "lora_A" in str(error)
