"""Tokenizers from files: read as they stand, refused where they are damaged, known again by a run."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from tokenizers import Tokenizer

from lora_bench.backbones import identity as identities
from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones import tokenizer as tokenizers
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.errors import Code, UserError
from lora_bench.training.padding import check_padding
from tests.backbones.tools import enliven, make, model_settings, save
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = "How do I Cook 3 Rice in  São Paulo?", "@user [SEP] 日本"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def folder_of(place: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, kind: str = "bert") -> Path:
    """A bare folder: config.json of `kind` and a BERT tokenizer.json, changed."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=141, **SIZES)
    config.save_pretrained(place)
    content = json.loads(tiny_tokenizers.tokenizer("bert").backend_tokenizer.to_str())
    change(content)
    (place / "tokenizer.json").write_text(json.dumps(content))
    return place


def read(place: Path, model: str = "bert") -> Any:
    return load_tokenizer(model_settings(model, f"model.path={place}"))


def refusal(folder: Path, code: Code = Code.DAMAGED, *, key: str | None = None) -> UserError:
    with refuses(code, key=key) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def keep_case(content: dict[str, Any]) -> None:
    content["normalizer"].update(lowercase=False, strip_accents=False)


def split_at_spaces(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def drop_the_template(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def split_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = split

    return change


def normalize_by(charsmap: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})


# -- read as it stands --


@pytest.mark.parametrize("change", [lambda _: None, keep_case, split_at_spaces, drop_the_template, split_by("o+")])
def test_tokenizer_json_is_read_as_it_stands(change: Any, tmp_path: Path) -> None:
    tokenizer = read(folder_of(tmp_path, change))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(*TEXT)
    found = tokenizer.backend_tokenizer.encode(*TEXT)
    assert (found.ids, found.type_ids) == (expected.ids, expected.type_ids)
    assert (tokenizer.pad_token, tokenizer.sep_token, tokenizer.pad_token_id) == ("[PAD]", "[SEP]", 0)
    assert "token_type_ids" in tokenizer.model_input_names


def test_another_reading_by_the_class_is_noted(tmp_path: Path) -> None:
    assert read(folder_of(tmp_path / "same")).reading_notes == []
    (note,) = read(folder_of(tmp_path / "cased", keep_case)).reading_notes
    assert "BertTokenizer" in note


def test_what_is_saved_is_read_the_same_by_transformers(tmp_path: Path) -> None:
    tokenizer = read(folder_of(tmp_path / "model", split_at_spaces))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(*TEXT).input_ids == tokenizer.backend_tokenizer.encode(*TEXT).ids


def test_a_vocabulary_without_the_special_tokens_of_its_class_is_refused(tmp_path: Path) -> None:
    error = refusal(folder_of(tmp_path, kind="roberta"), Code.UNSUPPORTED, key="model.tokenizer")
    assert error.value == str(tmp_path)
    assert "pad_token" in str(error.remedy)


def test_a_truncation_and_padding_section_changes_nothing(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Left", "max_length": 5, "strategy": "OnlyFirst", "stride": 1}
        content["padding"] = {
            "strategy": {"Fixed": 50},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        }

    one, other = (read(folder_of(tmp_path / name, how)) for name, how in (("a", change), ("b", lambda _: None)))
    assert identities.tokenizer_digests(one) == identities.tokenizer_digests(other)


# -- refused --


def id_of(key: str, value: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"]["vocab"].update({key: value})


def added(i: int) -> Callable[[dict[str, Any]], None]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return lambda content: content["added_tokens"].append({"id": i, "content": "zz", "normalized": True, **flags})


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        (split_by(r"(a+)+$"), Code.DAMAGED, "model.tokenizer"),  # it is loaded, and fails on short texts
        (split_by("(a"), Code.UNSUPPORTED, "model.path"),
        (normalize_by("AAAA"), Code.UNSUPPORTED, "model.path"),
        (id_of("a", -5), Code.UNSUPPORTED, "model.path"),
        (lambda content: content["model"].update(vocab=[]), Code.UNSUPPORTED, "model.path"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    change: Any, code: Code, key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(folder_of(tmp_path, change), code, key=key).value == str(tmp_path)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (id_of("a", 2**40), ["1099511627776"]),
        (id_of("a", 2**32 - 1), ["4294967295"]),
        (added(2**31), ["2147483648"]),
        (id_of("a", 6), ["'a'", " 6"]),
        (added(100_000), ["'zz'", "100000"]),
    ],
)
def test_impossible_ids_are_refused_and_named(change: Any, data: list[str], tmp_path: Path) -> None:
    error = refusal(folder_of(tmp_path, change))
    assert error.file == tmp_path / "tokenizer.json"
    assert all(datum in error.reason for datum in data)


def test_a_random_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_tokenizers.tokenizer("roberta").save_pretrained(tmp_path)
    transformers.RobertaConfig(**SIZES).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    error = refusal(tmp_path, Code.UNSUPPORTED)
    assert error.file == tmp_path / "tokenizer.json"
    assert "model.dropout=0.5" in error.reason


def test_a_repeated_token_is_refused(tmp_path: Path) -> None:
    file = folder_of(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace('"vocab": {', '"vocab": {"a": 5, ', 1))
    error = refusal(tmp_path)
    assert error.file == file
    assert "'a'" in error.reason


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[]", b"null", b'"text"', b"{}", b"[" * 100_000])
def test_a_file_of_another_content_is_refused(content: bytes, tmp_path: Path) -> None:
    (folder_of(tmp_path) / "tokenizer.json").write_bytes(content)
    assert refusal(tmp_path, Code.UNSUPPORTED, key="model.path").value == str(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
@pytest.mark.parametrize("code", [Code.NOT_A_FILE, Code.UNREADABLE, Code.TOO_LARGE])
def test_what_is_no_file_is_refused(name: str, code: Code, tmp_path: Path) -> None:
    file = folder_of(tmp_path) / name
    file.unlink(missing_ok=True)
    if code is Code.NOT_A_FILE:
        os.mkfifo(file)
    elif code is Code.UNREADABLE:
        file.symlink_to("nowhere")
    else:
        with file.open("wb") as stream:
            stream.truncate(2**40)
    assert refusal(tmp_path, code).file == file


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    file = folder_of(tmp_path / "model") / "tokenizer.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert read(tmp_path / "model").pad_token_id == 0


def test_native_code_that_does_not_end_is_left_alone() -> None:
    import threading

    with pytest.raises(TimeoutError):
        tokenizers.call_with_timeout(threading.Event().wait, 0.05)


# -- ids that the network does not know --


def with_tokenizer(place: Path, change: Callable[[dict[str, Any]], None], **sizes: int) -> Path:
    config = transformers.BertConfig(**{"vocab_size": 141, **SIZES, **sizes})
    save(place, transformers.BertForSequenceClassification(config), tiny_tokenizers.tokenizer("bert"))
    content = json.loads((place / "tokenizer.json").read_text())
    change(content)
    (place / "tokenizer.json").write_text(json.dumps(content))
    return place


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (id_of("a", 150), ["'a'", "id 150", "141"]),
        (added(141), ["142 tokens", "141"]),
        (lambda content: content["post_processor"]["special_tokens"]["[CLS]"].update(ids=[999]), ["id 999", "141"]),
        (lambda content: content["post_processor"]["pair"][3]["Sequence"].update(type_id=7), ["type 7", "2"]),
    ],
)
def test_an_id_beyond_the_embeddings_is_refused(change: Any, data: list[str], tmp_path: Path) -> None:
    with refuses(Code.MISMATCH, key="model.tokenizer") as caught:
        make("bert", f"model.path={with_tokenizer(tmp_path, change)}")
    assert caught.value.value == str(tmp_path)
    assert all(datum in caught.value.reason for datum in data)


def test_roberta_reads_a_template_with_token_types_as_transformers_does(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(vocab_size=141, **SIZES)
    save(tmp_path, transformers.RobertaForSequenceClassification(config), tiny_tokenizers.tokenizer("bert"))
    check_padding(make("roberta", f"model.path={tmp_path}"))


# -- padding --


def classifier(kind: str, place: Path, **settings: Any) -> Any:
    """A backbone of family auto from a folder with a BERT tokenizer, whose padding id is 0."""
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 141, **SIZES, **settings})
    network = enliven(transformers.AutoModelForSequenceClassification.from_config(config))
    save(place, network, tiny_tokenizers.tokenizer("bert"))
    model = model_settings("auto", f"model.path={place}")
    backbone = load(model, load_tokenizer(model), task="qqp")
    check_padding(backbone)
    return backbone


def padding_notes(backbone: Any) -> list[str]:
    return [note for note in backbone.notes if "batch" in note]


@pytest.mark.parametrize("pad_id", [None, -1, 7, 100_000])
def test_a_score_does_not_depend_on_the_padding_id_of_the_config(pad_id: int | None, tmp_path: Path) -> None:
    classifier("gpt2", tmp_path, n_positions=64, pad_token_id=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_id}))
    model = model_settings("auto", f"model.path={tmp_path}")
    backbone = load(model, load_tokenizer(model), task="qqp")
    check_padding(backbone)
    assert padding_notes(backbone) == []
    assert backbone.network.config.pad_token_id == 0


def test_positions_that_are_counted_from_the_padding_id_stay(tmp_path: Path) -> None:
    backbone = classifier("roberta", tmp_path, pad_token_id=1)
    assert padding_notes(backbone) == []
    assert backbone.network.config.pad_token_id == 1


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_roberta", "tiny_t5"])
def test_the_families_score_a_pair_the_same_in_a_batch(model: str) -> None:
    backbone = make(model)
    check_padding(backbone)
    assert backbone.notes == []


def test_a_network_whose_scores_depend_on_the_batch_is_noted(tmp_path: Path) -> None:
    (note,) = padding_notes(classifier("fnet", tmp_path, tpu_short_seq_length=64))
    assert "FNetForSequenceClassification" in note


# -- identity --


def same_but_bytes(content: dict[str, Any]) -> None:
    reordered = dict(reversed(list(content.items())))
    content.clear()
    content.update(reordered)


def changed_vocabulary(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["~"], vocabulary["##~"] = vocabulary["##~"], vocabulary["~"]


def other(recorded: dict[str, Any], current: dict[str, str]) -> list[str]:
    return identities.refuse_other_tokenizer(
        recorded, current, lambda reason, remedy: UserError(reason, remedy=remedy, code=Code.MISMATCH)
    )


@pytest.mark.parametrize("change", [keep_case, split_at_spaces, drop_the_template, changed_vocabulary])
def test_other_token_ids_are_refused(change: Any, tmp_path: Path) -> None:
    before, after = (
        identities.tokenizer_digests(read(folder_of(tmp_path / name, how)))
        for name, how in (("before", lambda _: None), ("after", change))
    )
    with refuses(Code.MISMATCH) as caught:
        other(before, after)
    assert "model.tokenizer=DIR" in str(caught.value.remedy)


def test_the_same_content_in_other_bytes_is_the_same_tokenizer(tmp_path: Path) -> None:
    before, after = (
        identities.tokenizer_digests(read(folder_of(tmp_path / name, how)))
        for name, how in (("before", lambda _: None), ("after", same_but_bytes))
    )
    assert other(before, after) == []


def test_other_versions_are_noted_where_the_ids_agree() -> None:
    now = identities.tokenizer_digests(tiny_tokenizers.tokenizer("bert"))
    versions = {"tokenizers": "0.1", "transformers": transformers.__version__}
    (note,) = other({**now, "versions": versions}, now)
    assert "tokenizers 0.1" in note
    (note,) = other({**now, "tokenizer_sha256": "0"}, now)
    assert "files" in note


def test_an_older_record_says_nothing_of_its_tokenizer() -> None:
    assert other({}, identities.tokenizer_digests(tiny_tokenizers.tokenizer("bert"))) == []


def test_there_are_32_probe_texts() -> None:
    assert len([*identities.PAIRS, *identities.TEXTS]) == 32
