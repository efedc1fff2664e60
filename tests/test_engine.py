"""CacheEngine over a store: what went in comes out, what is damaged is a miss with its reason."""

import os

import pytest
import torch

from kvlab.chunking import Chunker
from kvlab.engine import CacheEngine
from kvlab.errors import ConfigError, StoreError
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Namespace
from kvlab.stores import open_store, open_stores
from kvlab.stores.base import cut
from kvlab.stores.disk.names import path_of

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
CHUNKER = Chunker(chunk_tokens=32, block_tokens=8)


def kv(num_tokens: int) -> torch.Tensor:
    return torch.randn(GEOMETRY.shape(num_tokens)).to(torch.bfloat16)


def tokens(value: torch.Tensor) -> dict[str, int]:
    """Where an object lies that begins a prompt."""
    return {"first_token": 0, "end_token": value.shape[1]}


def load(engine: CacheEngine, key: str, out: torch.Tensor) -> torch.Tensor | None:
    return engine.load_object(key, out, axes=AXES, **tokens(out))


@pytest.fixture
def engine():
    return CacheEngine(open_store("memory://?size=8MiB"), namespace="m", chunker=CHUNKER)


@pytest.mark.parametrize("num_tokens", [0, 7, 8, 31, 32, 33, 40, 63, 64, 100])
def test_every_full_block_comes_back(engine, num_tokens):
    ids, value = list(range(num_tokens)), kv(num_tokens)
    whole = num_tokens // 8 * 8
    assert engine.lookup(ids).num_tokens == 0
    assert engine.save(ids, value) == whole
    hit = engine.lookup(ids)
    assert (hit.num_tokens, hit.miss) == (whole, "")
    count, back = engine.load(ids)
    assert count == whole
    assert back is None if whole == 0 else torch.equal(back, value[:, :whole])


def test_a_shared_prefix_is_reused_to_the_chunk(engine):
    engine.save(list(range(100)), kv(100))
    other = [*range(70), *range(500, 530)]
    hit = engine.lookup(other)
    assert (hit.num_tokens, hit.miss) == (64, "never_stored")


def test_extras_and_namespaces_keep_apart(engine):
    ids = list(range(40))
    engine.save(ids, kv(40), extras={0: [("cache_salt", "a")]})
    assert engine.lookup(ids, extras={0: [("cache_salt", "a")]}).num_tokens == 40
    assert engine.lookup(ids, extras={0: [("cache_salt", "b")]}).num_tokens == 0
    assert engine.lookup(ids).num_tokens == 0
    other = CacheEngine(engine.store, namespace=Namespace("m", {"dtype": "fp8"}), chunker=CHUNKER)
    assert other.lookup(ids, extras={0: [("cache_salt", "a")]}).num_tokens == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda v: v[:-1], "truncated"),
        (lambda v: v[:5000] + bytes([v[5000] ^ 1]) + v[5001:], "checksum"),
        (lambda v: b"", "truncated"),
        (lambda v: b"garbage" * 1000, "corrupt"),
    ],
)
def test_damage_is_a_miss_with_its_reason(engine, damage, reason):
    ids, value = list(range(64)), kv(64)
    engine.save(ids, value)
    second = engine.lookup(ids).keys[1]
    engine.store.put(second, damage(bytes(engine.store.get(second))))
    count, back = engine.load(ids)
    assert count == 32
    assert torch.equal(back, value[:, :32])
    assert engine.counters.misses == {reason: 1}
    assert not engine.store.contains(second), "set aside: it is read once and no more"


def test_another_object_under_this_key_is_seen(engine):
    engine.save(list(range(64)), kv(64))
    first, second = engine.lookup(list(range(64))).keys
    engine.store.put(second, bytes(engine.store.get(first)))
    assert engine.load(list(range(64)))[0] == 32
    assert engine.counters.misses == {"wrong_key": 1}


def test_a_failing_tier_costs_misses_only(engine, monkeypatch):
    ids = list(range(64))
    engine.save(ids, kv(64))

    def down(*_a, **_k):
        raise StoreError("tier is down", reason="eio")

    monkeypatch.setattr(engine.store, "get_into", down)
    assert engine.load(ids) == (0, None)
    assert engine.counters.misses == {"tier_eio": 1}
    monkeypatch.setattr(engine.store, "put", down)
    assert engine.save(list(range(500, 564)), kv(64)) == 0
    assert engine.counters.save_failures == {"tier_eio": 1}
    monkeypatch.setattr(engine.store, "contains_many", down)
    assert engine.lookup(ids).num_tokens == 0


def test_a_value_larger_than_the_tier_is_refused_and_told():
    engine = CacheEngine("memory://?size=5kB", namespace="m", chunker=CHUNKER)
    assert engine.save(list(range(64)), kv(64)) == 0
    assert engine.stats()["save_failed_no_room"] == 1


def test_kv_of_another_length_is_one_clear_error(engine):
    with pytest.raises(ConfigError, match="10 tokens, got shape"):
        engine.save(list(range(10)), kv(9))


def test_a_disk_engine_survives_its_process(tmp_path):
    ids, value = list(range(40)), kv(40)
    with open_store(f"file://{tmp_path}?size=8MiB") as store:
        CacheEngine(store, namespace="m", chunker=CHUNKER).save(ids, value)
    with open_store(f"file://{tmp_path}?size=8MiB") as store:
        count, back = CacheEngine(store, namespace="m", chunker=CHUNKER).load(ids)
    assert count == 40
    assert torch.equal(back, value)


@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
def test_a_good_object_written_after_the_broken_one_was_read_stays(url, tmp_path, monkeypatch):
    with open_store(url.format(tmp_path)) as store:
        engine = CacheEngine(store, namespace="m", chunker=CHUNKER)
        engine.save(list(range(32)), kv(32))
        (key,) = engine.lookup(list(range(32))).keys
        good = bytes(store.get(key))
        store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
        missed = engine._missed
        monkeypatch.setattr(engine, "_missed", lambda *what: (store.put(key, good), missed(*what)))
        assert engine.load(list(range(32)))[0] == 0
        assert engine.counters.misses == {"checksum": 1}
        assert bytes(store.get(key)) == good


def test_no_memory_is_a_miss_with_its_reason(engine, monkeypatch, caplog):
    """Of a process whose memory is limited."""
    engine.save(list(range(32)), kv(32))

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("numpy.empty", no_memory)
    assert engine.load(list(range(32))) == (0, None)
    assert engine.counters.misses == {"tier_memory": 1}
    assert "Traceback" not in caplog.text
    assert engine.differing_fields(engine.lookup(list(range(32))).keys[0]) == []


@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
@pytest.mark.parametrize("serde", ["naive", "lossless"])
def test_objects_read_one_after_the_other_do_not_share_memory(url, serde, tmp_path):
    with open_store(url.format(tmp_path)) as store:
        engine = CacheEngine(store, namespace="m", chunker=CHUNKER, serde=serde)
        saved = {f"key-{i}": kv(32 + 8 * i) for i in range(3)}
        for key, value in saved.items():
            assert engine.save_object(key, value, AXES, **tokens(value))
        back = {key: load(engine, key, torch.empty_like(value)) for key, value in saved.items()}
        assert all(torch.equal(back[key], value) for key, value in saved.items())


def test_an_object_larger_than_its_place_is_a_miss_and_the_place_stays_usable(engine):
    small = kv(32)
    assert engine.save_object("large", kv(20_000), AXES, first_token=0, end_token=20_000)
    assert engine.save_object("small", small, AXES, **tokens(small))
    out = torch.empty_like(small)
    assert load(engine, "large", out) is None
    assert engine.stats()["miss_too_large"] == 1
    assert torch.equal(load(engine, "small", out), small)


@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
def test_bytes_are_read_to_where_they_belong_and_others_are_decoded(url, tmp_path):
    with open_store(url.format(tmp_path)) as store:
        engine = CacheEngine(store, namespace=Namespace("m"), chunker=CHUNKER)
        coded = CacheEngine(store, namespace=Namespace("m"), chunker=CHUNKER, serde="lossless")
        long = CacheEngine(store, namespace=Namespace("m", {"extra": "x" * 9000}), chunker=CHUNKER)
        value = kv(64)
        for name, writer in (("naive", engine), ("lossless", coded), ("long", long)):
            assert writer.save_object(name, value, AXES, **tokens(value))
            out = torch.zeros_like(value)
            back = load(long if name == "long" else engine, name, out)
            assert back is not None
            assert back.data_ptr() == out.data_ptr()
            assert torch.equal(out, value)
        assert load(engine, "long", torch.zeros_like(value)) is None
        assert engine.counters.misses == {"wrong_namespace": 1}


@pytest.mark.parametrize("at", [0, 9, 700, 4095, 4096, 5000, -1])
def test_damage_is_seen_where_bytes_are_read_to_where_they_belong(engine, at):
    value = kv(64)
    engine.save_object("k", value, AXES, **tokens(value))
    stored = bytearray(engine.store.get("k"))
    stored[at] ^= 1
    engine.store.put("k", stored)
    assert load(engine, "k", torch.zeros_like(value)) is None
    assert sum(engine.counters.misses.values()) == 1
    engine.save_object("k", value, AXES, **tokens(value))
    engine.store.put("k", bytes(engine.store.get("k"))[: at % 6000])
    assert load(engine, "k", torch.zeros_like(value)) is None


def numbered(num_tokens: int) -> torch.Tensor:
    """KV whose every number is its token's place."""
    places = torch.arange(num_tokens, dtype=torch.float32).to(torch.bfloat16).view(1, -1, 1, 1, 1)
    return places.expand(GEOMETRY.shape(num_tokens)).contiguous()


@pytest.mark.parametrize(("one", "other"), [(32, 64), (64, 32), (32, 48), (48, 32)])
@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
def test_chunks_of_another_size_are_never_taken_for_ones_own(one, other, url, tmp_path):
    ids, value = list(range(112)), numbered(112)
    with open_store(url.format(tmp_path)) as store:
        first = CacheEngine(store, namespace="m", chunker=Chunker(one, 8))
        second = CacheEngine(store, namespace="m", chunker=Chunker(other, 8))
        first.save(ids, value)
        assert second.lookup(ids).num_tokens == 0
        assert second.load(ids) == (0, None)
        assert second.save(ids, value) == 112
        for engine in (first, second):
            count, back = engine.load(ids)
            assert count == 112
            assert torch.equal(back, value)


def test_a_miss_names_the_field_in_which_another_namespace_differs(engine):
    ids, value = list(range(64)), kv(64)
    assert engine.why_missing(ids) == "never_stored"
    engine.save(ids[:40], value[:, :40])
    assert engine.why_missing(ids[:40]) == ""
    for chunker, model, named in (
        (Chunker(64, 8), Namespace("m"), "other_namespace:chunk_tokens"),
        (CHUNKER, Namespace("m", {"dtype": "fp8"}), "other_namespace:dtype"),
        (CHUNKER, Namespace("n"), "other_namespace:model"),
    ):
        other = CacheEngine(engine.store, namespace=model, chunker=chunker)
        assert other.why_missing(ids[:40]) == named
        assert other.why_missing(range(900, 964)) == "never_stored"
    for key in list(engine.store.keys()):
        engine.store.put(key, b"damaged")
    assert other.why_missing(ids[:40]) == "never_stored"


def test_a_hostile_file_is_not_read_whole_to_tell_its_namespace(tmp_path):
    """A sparse file takes no room on the disk."""
    with open_store(f"file://{tmp_path}/kv?size=1TiB") as store:
        engine = CacheEngine(store, namespace="m", chunker=CHUNKER)
        engine.save(list(range(32)), kv(32))
        (key,) = engine.lookup(list(range(32))).keys
        os.truncate(tmp_path / "kv" / path_of(key), 300 << 30)
        other = CacheEngine(store, namespace=Namespace("m", {"dtype": "fp8"}), chunker=CHUNKER)
        assert other.differing_fields(key) == []
        assert other.why_missing(list(range(32))) == "never_stored"


def test_what_is_broken_in_a_slower_tier_leaves_it_and_is_replaced(tmp_path):
    """A value is copied to faster tiers before it is checked: the copy must not become the source of the next read."""
    stack = open_stores(["memory://?size=1MiB", f"file://{tmp_path}/kv?size=1MiB"])
    engine, ids, value = CacheEngine(stack, namespace="m", chunker=CHUNKER), list(range(32)), kv(32)
    assert engine.save(ids, value) == 32
    (key,) = stack.keys()
    stack.tiers[0].store.delete(key)
    (file,) = [file for file in tmp_path.rglob("*.safetensors") if ".kvlab/" not in str(file)]
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert engine.lookup(ids).num_tokens == 32
    assert engine.load(ids) == (0, None)
    assert engine.lookup(ids).num_tokens == 0
    assert engine.save(ids, value) == 32
    stack.tiers[0].store.delete(key)
    assert torch.equal(engine.load(ids)[1], value)


def test_one_wrong_bit_on_the_way_from_a_slower_tier_is_read_again(tmp_path, monkeypatch):
    stack = open_stores(["memory://?size=1MiB", f"file://{tmp_path}/kv?size=1MiB"])
    engine, ids, value = CacheEngine(stack, namespace="m", chunker=CHUNKER), list(range(32)), kv(32)
    engine.save(ids, value)
    (key,) = stack.keys()
    top, below = (tier.store for tier in stack.tiers)
    top.delete(key)
    get_pieces, reads = below.get_pieces, []

    def wrong_once(asked, out):
        size = get_pieces(asked, out)
        reads.append(asked)
        if len(reads) == 1:
            cut(out, size)[-1][-9] ^= 1
        return size

    monkeypatch.setattr(below, "get_pieces", wrong_once)
    assert torch.equal(engine.load(ids)[1], value)
    assert reads == [key, key]


def test_memory_that_is_not_contiguous_is_refused_and_costs_no_object(engine):
    value = kv(32)
    engine.save(list(range(32)), value)
    (key,) = engine.store.keys()
    with pytest.raises(ConfigError, match="out must be contiguous"):
        load(engine, key, torch.empty_like(value).transpose(2, 4).contiguous().transpose(2, 4))
    assert engine.lookup(list(range(32))).num_tokens == 32
