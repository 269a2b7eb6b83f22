"""The kept prefix: the same training with it as without, the same bits cold and warm, and a store that stays small."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.data.batching import collate, join_orders, micro_batches
from lora_bench.errors import Code, RunFailedError
from lora_bench.files.cache import TRAILER_BYTES
from lora_bench.training import prefix_cache
from lora_bench.training.prediction import predict
from lora_bench.training.prefix_cache import PrefixCache
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, trainer
from tests.backbones.tools import FORMS
from tests.command_line import refuses
from tests.training.tools import fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.tokenization import TokenTable

TOP = adapter("lora", "layers=top:1", "rank=3")
LIMIT = 1e9


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prefix"


def with_cache(a_pack: Pack, limit: float = LIMIT) -> tuple[dict[str, TokenTable], PrefixCache]:
    train, selection = tables(a_pack.backbone)
    cache = PrefixCache("the tiny backbone", limit)
    return cache.with_cached_hidden_states(a_pack, {"train": train, "selection": selection}), cache


def train_states(
    a_pack: Pack, train: TokenTable, selection: TokenTable, **changes: Any
) -> list[dict[str, torch.Tensor]]:
    fit(a_pack, [optimizer()] * a_pack.size, trainer(**changes), train, selection)
    return [a_pack.state(k) for k in range(a_pack.size)]


@pytest.mark.parametrize("form", FORMS)
def test_training_with_it_equals_training_without(form: str) -> None:
    members = ((TOP, 0), (adapter("lora", "layers=top:1", "rank=2"), 1))
    plain = pack(form, *members)
    expected = train_states(plain, *tables(plain.backbone))
    a_pack = pack(form, *members)
    cached, _ = with_cache(a_pack)
    assert all(table.hidden is not None for table in cached.values())
    states = train_states(a_pack, cached["train"], cached["selection"])
    for state, reference in zip(states, expected, strict=True):
        assert_close(state, reference, atol=1e-4)
    np.testing.assert_allclose(
        predict(a_pack, cached["selection"], 5), predict(plain, tables(plain.backbone)[1], 5), atol=1e-5
    )


def test_a_step_no_longer_runs_the_layers_below(monkeypatch: pytest.MonkeyPatch) -> None:
    a_pack = pack("bert", (TOP, 0))
    cached, cache = with_cache(a_pack)
    assert cache.flops > 0

    monkeypatch.setattr(type(a_pack.backbone), "prefix", never)
    train_states(a_pack, cached["train"], cached["selection"], micro_batch_size=3)


def never(*arguments: Any) -> None:
    raise AssertionError("the prefix was computed again")


def test_the_arithmetic_of_filling_is_counted() -> None:
    a_pack = pack("bert", (TOP, 0))
    train, _ = tables(a_pack.backbone)
    cache = PrefixCache("the tiny backbone", LIMIT)
    with FlopCounterMode(display=False) as counter:
        cache.with_cached_hidden_states(a_pack, {"train": train})
    with FlopCounterMode(display=False) as probes:
        PrefixCache("the tiny backbone", LIMIT).cached_tables(a_pack, {"train": train})
    assert cache.flops == pytest.approx(counter.get_total_flops() - probes.get_total_flops())


def test_a_warm_run_gets_the_bits_of_the_cold_one(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, cold = with_cache(pack("bert", (TOP, 0)))
    written = {path.name: path.read_bytes() for path in store.iterdir()}
    assert len(written) == 2
    monkeypatch.setattr(prefix_cache, "_fill", never)
    second, warm = with_cache(pack("bert", (adapter("dora", "layers=top:1"), 5)))
    assert (warm.flops, warm.used_bytes) == (cold.flops, cold.used_bytes)  # what a run costs does not hang on the cache
    assert {path.name: path.read_bytes() for path in store.iterdir()} == written
    rows = np.array([5, 0, 3])
    one, two = (collate(cached["train"], rows, 40, 0).hidden for cached in (first, second))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)


def test_stored_states_are_the_prefix_of_each_row_whatever_it_travels_with() -> None:
    a_pack = pack("bert", (TOP, 0))
    cached, _ = with_cache(a_pack)
    table = cached["train"]
    rows = np.array([7, 1, 20])
    batch = collate(table, rows, int(table.lengths[rows].max()) + 2, 0)
    assert batch.hidden is not None
    expected = a_pack.backbone.prefix(replace(batch, hidden=None), a_pack.depth)
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(batch.hidden[kept], expected[kept], atol=1e-5, rtol=0)
    assert not batch.hidden[~kept].any()
    picked = list(micro_batches(join_orders(batch, batch), 2))
    assert picked[0].hidden is not None
    assert torch.equal(picked[0].hidden, batch.hidden[[0, 1, 0, 1]])


def test_another_depth_backbone_precision_or_text_has_files_of_its_own(store: Path) -> None:
    with_cache(pack("bert", (TOP, 0)))
    a_pack = pack("bert", (adapter("head_only"), 0))
    with_cache(a_pack)
    assert len(list(store.iterdir())) == 4
    a_pack.network.bfloat16()
    a_pack.backbone.compute_dtype = torch.bfloat16
    cached, _ = with_cache(a_pack)
    assert len(list(store.iterdir())) == 6
    batch = collate(cached["train"], np.array([0]), 40, 0)
    assert batch.hidden is not None
    assert batch.hidden.dtype == torch.bfloat16
    train, _ = tables(a_pack.backbone)
    PrefixCache("another backbone", LIMIT).with_cached_hidden_states(a_pack, {"train": train})
    assert len(list(store.iterdir())) == 7
    PrefixCache("another backbone", LIMIT).with_cached_hidden_states(
        a_pack, {"train": replace(train, values=train.values + 1)}
    )
    assert len(list(store.iterdir())) == 8


@pytest.mark.parametrize("settings", [adapter("lora"), adapter("full")])
def test_nothing_is_kept_where_the_first_layer_is_trained(settings: Any, store: Path) -> None:
    cached, cache = with_cache(pack("bert", (settings, 0)))
    assert all(table.hidden is None for table in cached.values())
    assert not cache.used_bytes
    assert not store.exists()


def test_what_exceeds_the_limit_is_computed_as_before_and_old_files_make_room(store: Path) -> None:
    a_pack = pack("bert", (TOP, 0))
    cached, cache = with_cache(a_pack)
    token_bytes = a_pack.backbone.hidden_size * 4
    train, selection = (int(len(t.values) * token_bytes + TRAILER_BYTES) for t in cached.values())
    assert cache.used_bytes == train + selection
    assert with_cache(a_pack, 0)[0]["train"].hidden is None
    cached, _ = with_cache(a_pack, train)  # what training looks at comes first, and nothing is kept without it
    assert (cached["train"].hidden is None, cached["selection"].hidden) == (False, None)
    cached, _ = with_cache(a_pack, selection)
    assert all(table.hidden is None for table in cached.values())
    cached, _ = with_cache(a_pack)
    other = pack("bert", (adapter("head_only"), 0))
    old = collate(cached["selection"], np.array([0]), 40, 0).hidden
    with_cache(other, train + selection)
    assert sum(path.stat().st_size for path in store.iterdir()) <= train + selection
    again = collate(cached["selection"], np.array([0]), 40, 0).hidden
    assert old is not None
    assert again is not None
    assert torch.equal(old, again)  # who reads a file that made room goes on reading it


def test_both_orders_of_a_pair_are_kept_or_neither(store: Path) -> None:
    a_pack = pack("bert", (TOP, 0))
    train, selection = tables(a_pack.backbone)
    requested = {"train": train, "second_view": train, "selection": selection}
    one = len(train.values) * a_pack.backbone.hidden_size * 4 + TRAILER_BYTES
    assert PrefixCache("the tiny backbone", 1.5 * one).cached_tables(a_pack, requested) == []
    assert PrefixCache("the tiny backbone", 2 * one).cached_tables(a_pack, requested) == ["train", "second_view"]
    augmented = {**requested, "second_view": replace(train, augmentation=object())}  # type: ignore[arg-type]
    assert PrefixCache("the tiny backbone", LIMIT).cached_tables(a_pack, augmented) == []


def test_a_pack_stays_cut_where_its_members_began_when_one_of_them_ends() -> None:
    a_pack = pack("bert", (TOP, 0), (adapter("head_only"), 0))
    cached, _ = with_cache(a_pack)
    depth = a_pack.depth
    a_pack.active = [1]
    assert a_pack.depth == depth
    expected = pack("bert", (adapter("head_only"), 0))
    np.testing.assert_allclose(
        predict(a_pack, cached["selection"], 5),
        predict(expected, tables(expected.backbone)[1], 5),
        atol=1e-5,
    )


def test_without_room_on_the_disk_nothing_is_kept_and_nothing_left(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("posix_fallocate", "pwrite", "fsync"):
        a_pack = pack("bert", (TOP, 0))
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            cached, cache = with_cache(a_pack)
        assert all(table.hidden is None for table in cached.values())
        assert (a_pack.prefix_depth, a_pack.training, cache.flops, cache.used_bytes) == (None, True, 0, 0)
        assert not list(store.iterdir())
        assert "No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["bit", "cut", "zeros", "other"])
def test_a_damaged_file_is_named_and_filled_again(store: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    with_cache(pack("bert", (TOP, 0)))
    sound = {path: path.read_bytes() for path in sorted(store.iterdir())}
    (path, content), (_, other) = sound.items()
    middle = len(content) // 2
    path.write_bytes(
        {
            "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "cut": content[:middle],
            "zeros": bytes(len(content)),
            "other": other,
        }[damage]
    )
    cached, _ = with_cache(pack("bert", (TOP, 0)))
    assert all(table.hidden is not None for table in cached.values())
    assert capfd.readouterr().err.count(str(path)) == 1
    assert {path: path.read_bytes() for path in sorted(store.iterdir())} == sound


def test_a_file_that_is_cut_while_it_is_used_ends_the_run_with_its_name(store: Path) -> None:
    encoded, _ = with_cache(pack("bert", (TOP, 0)))
    for path in store.iterdir():
        os.truncate(path, 100)  # a mapped file would end the process
    with refuses(Code.UNREADABLE) as caught:
        collate(encoded["train"], np.array([5, 0, 3]), 40, 0)
    assert isinstance(caught.value, RunFailedError)
    assert caught.value.file in store.iterdir()


def test_a_file_is_filled_beside_its_place(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is half filled can be read, whenever the process is killed."""

    def stop(*arguments: Any) -> None:
        if list(store.glob("*.hidden")):
            raise AssertionError("a file is at its place before it is complete")
        raise KeyboardInterrupt

    for name in ("write", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(prefix_cache.HiddenStatesWriter, name, stop)
            a_pack = pack("bert", (TOP, 0))
            with pytest.raises(KeyboardInterrupt):
                with_cache(a_pack)
            assert a_pack.training
        assert not list(store.iterdir())


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Pack], object]] = {
    "torch": lambda patch, a_pack: patch.setattr(torch, "__version__", "2.0.0"),
    "transformers": lambda patch, a_pack: patch.setattr(prefix_cache, "version", lambda name: f"{name} 9"),
    "processor": lambda patch, a_pack: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE"),
    "precision": lambda patch, a_pack: setattr(a_pack.backbone, "compute_dtype", torch.bfloat16),
    "attention": lambda patch, a_pack: setattr(a_pack.backbone.network.config, "_attn_implementation", "other"),
    "padding": lambda patch, a_pack: setattr(a_pack.backbone.tokenizer, "pad_token", "[UNK]"),
    "batches": lambda patch, a_pack: patch.setattr(prefix_cache, "ROWS", 32),
    "family": lambda patch, a_pack: setattr(a_pack.backbone, "__class__", type("Other", (type(a_pack.backbone),), {})),
    "device": lambda patch, a_pack: patch.setattr(prefix_cache, "_processor", lambda device: ("cuda", "H100")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_bits_changes_the_key(
    change: Callable[[pytest.MonkeyPatch, Pack], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_pack = pack("bert", (TOP, 0))
    table, _ = tables(a_pack.backbone)
    cache = PrefixCache("the tiny backbone", LIMIT)
    before = cache._key(a_pack, table)
    assert cache._key(pack("bert", (TOP, 1)), table) == before
    change(monkeypatch, a_pack)
    assert cache._key(a_pack, table) != before


def test_every_token_and_its_place_is_in_the_key() -> None:
    a_pack = pack("bert", (TOP, 0))
    table, _ = tables(a_pack.backbone)
    cache = PrefixCache("the tiny backbone", LIMIT)
    assert table.types is not None
    types = np.array(table.types)
    types[-1] ^= 1
    same_lengths = replace(table, offsets=table.offsets[::-1].copy())
    others = [replace(table, types=types), replace(table, types=None), table.take(np.arange(5)), same_lengths]
    keys = {cache._key(a_pack, entry) for entry in (table, *others)}
    assert len(keys) == 5


def test_a_read_only_cache_that_is_warm_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(30, "Read-only file system")

    with_cache(pack("bert", (TOP, 0)))
    for name in ("utime", "mkdir", "unlink", "replace", "pwrite"):
        monkeypatch.setattr(os, name, refuse)
    cached, _ = with_cache(pack("bert", (TOP, 0)))
    assert all(table.hidden is not None for table in cached.values())
