"""PairFeatures: its features by hand, its start against scikit-learn, and members with it beside members without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.t5 import T5TextToText
from lora_bench.data.batching import Batch, collate
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import tokenize
from lora_bench.errors import Code
from lora_bench.head.pair_features import RIDGE, PairFeatures, compute_pair_features, fit_logistic_regression
from lora_bench.run.finished_run import FinishedRun
from lora_bench.run.settings import Experiment
from tests.adapters.tools import adapter
from tests.backbones.test_decoders import config_of
from tests.backbones.tools import END, byte_tokenizer, enliven, save, tiny_distilbert
from tests.command_line import lora_bench, refused, toy_run
from tests.helpers import composed

if TYPE_CHECKING:
    from collections.abc import Callable

ASKED = toy_run("trainer.max_steps=6", "trainer.batch_size=8", "head.pair_features=true")


def test_features_are_those_of_two_mean_vectors_at_length_one() -> None:
    hidden = torch.tensor([[[9.0, 9.0], [3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    first, second = torch.tensor([[0, 1, 1, 0, 0]]), torch.tensor([[0, 0, 0, 1, 0]])
    assert compute_pair_features(hidden, first, second).tolist()[0] == pytest.approx([0, 0, 2**0.5, 2**0.5])
    same = compute_pair_features(hidden, first, first)[0]
    assert same.tolist() == pytest.approx([2, 0, 0, 0])  # D · u ⊙ u, and no difference
    signed = [compute_pair_features(hidden, *texts, signed=True)[0] for texts in ((first, second), (second, first))]
    assert [row.tolist() for row in signed] == [
        pytest.approx([0, 0, 2**0.5, -(2**0.5)]),
        pytest.approx([0, 0, -(2**0.5), 2**0.5]),
    ]
    single = compute_pair_features(-hidden, first, 0 * second)[0]
    assert single.tolist() == pytest.approx([0, 0, -(2**0.5), 0])  # √D · u, signed
    assert torch.isfinite(compute_pair_features(hidden, 0 * first, second)).all()  # a text without tokens


def test_it_begins_as_the_regression_on_the_cosine() -> None:
    cosines = np.random.default_rng(0).uniform(-0.2, 1, 300)
    labels = np.random.default_rng(1).random(300) < 1 / (1 + np.exp(-(6 * cosines - 3)))
    slope, intercept = fit_logistic_regression(torch.from_numpy(cosines), torch.from_numpy(labels))
    reference = LogisticRegression(C=1 / (RIDGE * 300), tol=1e-9).fit(cosines[:, None], labels)
    assert slope == pytest.approx(reference.coef_[0, 0], rel=1e-3)
    assert intercept == pytest.approx(reference.intercept_[0], rel=1e-3)
    matching = PairFeatures(4, torch.device("cpu"))
    features = torch.cat([torch.from_numpy(cosines)[:, None].repeat(1, 4), torch.ones(300, 4)], 1).float()
    matching.initialise(features, torch.from_numpy(labels))
    added = matching(features)
    odds = torch.from_numpy(reference.decision_function(cosines[:, None])).float()
    torch.testing.assert_close(added[:, 1] - added[:, 0], odds, atol=1e-2, rtol=0)


@pytest.mark.parametrize("labels", [torch.zeros(8), torch.ones(8), (torch.arange(8) > 3).float()])
def test_the_regression_is_finite_where_labels_are_alike_or_told_apart(labels: torch.Tensor) -> None:
    slope, intercept = fit_logistic_regression(torch.linspace(0, 1, 8).double(), labels)
    assert np.isfinite([slope, intercept]).all()
    assert abs(slope) < 100


def test_where_it_can_see_one_label_alone_it_begins_at_zero_and_the_record_says_so(in_tmp: Path) -> None:
    for split in ("train", "validation"):
        rows = "".join(f"what is {i}\twhy is {i}\t{int(i > 0)}\n" for i in range(65))
        Path(f"{split}.tsv").write_text(f"question1\tquestion2\tlabel\n{rows}")
    asked = [text for text in ASKED if not text.startswith("data")]
    asked += [
        "data=pairs",
        "data.path=.",
        "data.selection_size=8",
        "data.train_size=16",
        "adapter=enhanced",
        "hydra.run.dir=run",
    ]
    answer = lora_bench("train", *asked)
    assert answer.code == 0, answer
    warnings = json.loads(Path("run/run.json").read_text())["data"]["warnings"]
    for key, data in (("adapter", ("16 ", "label 1", "init=kaiming")), ("head.pair_features", ("16 ", "label 1"))):
        (warning,) = (text for text in warnings if text.startswith(f"{key}: "))
        assert warning in " ".join(answer.out.split())
        for datum in data:
            assert datum in warning


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_roberta"])
def test_texts_are_told_apart(backbone: Callable[..., Any], model: str) -> None:
    made = backbone(model)
    pairs = [("what is it", "why"), ("who", "what is it not")]
    read = made.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    ids = read["input_ids"]
    batch = Batch(ids, read["attention_mask"], read.get("token_type_ids"), None, full=False)
    for row, (pair, first, second) in enumerate(zip(pairs, *made.text_masks(batch), strict=True)):
        whole = made.tokenizer(*pair)["input_ids"]
        end = 2 + len(made.tokenizer(pair[0], add_special_tokens=False)["input_ids"])
        assert ids[row][first].tolist() == whole[:end]
        assert ids[row][second].tolist() == whole[end:]


def test_a_member_with_it_and_one_without_learn_what_they_learn_alone(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *ASKED, "head.pair_features=true,false", "seed=0,1", "hydra.sweep.dir=sweep")
    assert answer.code == 0, answer
    for job in range(4):
        alone = [f"head.pair_features={('true', 'false')[job // 2]}", f"seed={job % 2}", f"hydra.run.dir=alone{job}"]
        assert lora_bench("train", *ASKED, *alone).code == 0
        one, other = (json.loads(Path(f"{f}/run.json").read_text()) for f in (f"sweep/{job}", f"alone{job}"))
        assert one["cost"]["pack_size"] == 4
        assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-5)
        assert one["cost"]["train_flops"] == other["cost"]["train_flops"]
        saved = load_file(f"sweep/{job}/adapter/adapter_model.safetensors")
        assert ("base_model.model.matching.weight" in saved) == (job < 2)
        size = 2 * 32 + 1 if job < 2 else 0
        assert one["params"]["head"] - other["params"]["head"] == 0
        assert (sum(t.numel() for n, t in saved.items() if ".matching." in n)) == size


@pytest.mark.parametrize("method", ["full", "head_only", "adalora"])
def test_every_method_takes_it_and_is_put_together_again(in_tmp: Path, method: str) -> None:
    answer = lora_bench("train", *ASKED, f"adapter={method}", "hydra.run.dir=run")
    assert answer.code == 0, answer
    Path("pairs.tsv").write_text("question1\tquestion2\nwhat is it\twhy is it\n")
    assert lora_bench("predict", "run=run", "input=pairs.tsv", "output=out.tsv").code == 0
    answer = lora_bench("eval", "run=run", "data=toy", "data.validation_rows=16")
    assert answer.code == 0, answer
    error = refused("export", "run=run", "format=merged", "output=x")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "head.pair_features", "true")


def model_of(kind: str, folder: Path) -> list[str]:
    """Return the overrides that choose T5, an encoder of the generic family, or a decoder in words."""
    if kind == "t5":
        return ["model=tiny_t5"]
    if kind == "encoder":
        return ["model=deberta", f"model.path={tiny_distilbert(folder)}"]
    tokenizer = byte_tokenizer(eos_token=END)
    save(folder, enliven(transformers.AutoModelForCausalLM.from_config(config_of("llama", tokenizer))), tokenizer)
    return ["model=llama", f"model.path={folder}", "model.form=text_to_text", 'model.template="{fields}\n"']


@pytest.mark.parametrize("kind", ["t5", "encoder", "decoder"])
def test_any_model_takes_it_and_is_put_together_again(in_tmp: Path, kind: str) -> None:
    """The features are those of the network's own last hidden states, and they change what is predicted."""
    asked = [text for text in ASKED if not text.startswith("model=")]
    model = model_of(kind, in_tmp / "model")
    answer = lora_bench("train", *asked, *model, "data.max_length=160", "hydra.run.dir=run")
    assert answer.code == 0, answer
    run = FinishedRun.load("run")
    pairs = [("what is it", "why"), ("who", "what is it not or is it"), ("", "a")]
    scores = run.predict(pairs)
    np.testing.assert_array_equal(FinishedRun.load("run").predict(pairs), scores)
    np.testing.assert_allclose(np.concatenate([run.predict([pair]) for pair in pairs]), scores, atol=1e-6)
    features: Any = run.pack.pair_features["0"]
    examples = Examples(np.arange(3), tuple(map(list, zip(*pairs, strict=True))), None)
    table = tokenize(examples, ["question1", "question2"], run.pack.backbone, 160, cached=False)
    batch = collate(table, np.arange(3), int(table.lengths.max()), run.pack.backbone.tokenizer.pad_token_id)
    with torch.no_grad():
        logits = run.pack(batch)[0]
        network: Any = run.pack.network
        base = network.encoder if kind == "t5" else network.base_model
        hidden = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        added = features(compute_pair_features(hidden, *run.pack.backbone.text_masks(batch)))
        assert added.abs().max() > 1e-3
        features.weight.zero_()
        features.bias.zero_()
        torch.testing.assert_close(run.pack(batch)[0] + added, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "signed"),
    [
        (["data.relation=entailment"], True),
        (["data.relation=paraphrase"], False),
        (["data.relation=null"], False),
        (["data.relation=entailment", "head.differences=absolute"], False),
        (["head.differences=signed"], True),
    ],
)
def test_differences_are_signed_where_the_order_counts(settings: list[str], signed: bool) -> None:
    config = composed("model=tiny_bert", "data=toy", "head.pair_features=true", *settings)
    (member,) = Experiment.build(config).members()
    assert member.signed_differences is signed


def test_members_with_signed_and_absolute_differences_are_independent(backbone: Callable[..., Any]) -> None:
    """In a pack each has its own differences; those of the signed one change with the order of the texts."""
    members = [Member(adapter("lora"), 0, pair_features=True, signed_differences=signed) for signed in (False, True)]
    pack = Pack(backbone("tiny_bert"), members)
    for features in pack.pair_features.values():
        features.weight.data[32:] = torch.linspace(-1, 1, 32)
    pairs = [("what is it", "why"), ("why", "what is it")]
    read = pack.backbone.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    batch = Batch(read["input_ids"], read["attention_mask"], read.get("token_type_ids"), None, full=False)
    with torch.no_grad():
        together = pack(batch)  # (2, 2, 2)
        for k in (0, 1):
            with pack.only([k]):
                torch.testing.assert_close(pack(batch)[0], together[k])
            pack.pair_features[str(k)].weight.zero_()
        added = together - pack(batch)
    order_effect = (added[:, 0, 1] - added[:, 1, 1]).abs()
    assert order_effect[1] > 5 * order_effect[0]


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_bert"])
def test_null_turns_it_on(model: str, backbone: Callable[..., Any]) -> None:
    assert len(Pack(backbone(model), [Member(adapter("lora"), 0, pair_features=None)]).pair_features) == 1


def test_it_is_refused_where_there_are_no_two_texts(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T5TextToText, "needs_text_ids", False)  # as a family of another package may be
    error = refused("train", *(o for o in ASKED if "model=" not in o), "model=tiny_t5")
    assert (error.code, error.key, error.value) == (Code.UNSUPPORTED, "head.pair_features", "true")


@pytest.mark.parametrize("classes", [2, 3])
def test_the_mean_vector_of_a_single_text_is_learned_and_saved(in_tmp: Path, classes: int) -> None:
    rows = "".join(f"what is {i}\t{i % classes}\n" for i in range(48))
    Path("train.tsv").write_text(f"sentence\tlabel\n{rows}")
    single = [o for o in ASKED if not o.startswith("data")]
    data = ["data=files", "data.path=.", "data.text_columns=[sentence]", "data.selection_size=8", "data.report=false"]
    answer = lora_bench("train", *single, *data, "hydra.run.dir=run")
    assert answer.code == 0, answer
    run = FinishedRun.load("run")
    features: Any = run.pack.pair_features["0"]
    D = run.pack.backbone.hidden_size
    weight = features.weight.view(-1, 2, D)  # (1 or classes, products and vector, D)
    assert weight[:, 0].abs().max() == 0
    assert (weight[:, 1].abs().amax(-1) > 0).all()
