import logging
from types import SimpleNamespace

import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.stores import circuit_breaker, open_stores
from kvlab.stores.disk import DiskStore
from kvlab.stores.disk.names import path_of
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.testing import StoreTests
from kvlab.testing.machines import pattern
from tests.support.gate import Gate


class TestTieredStore(StoreTests):
    persistent = True
    examples = 20

    def open(self, where, max_bytes):
        return TieredStore([MemoryStore(max_bytes), DiskStore(where, max_bytes)])


class TestSmallAboveLarge(StoreTests):
    """The upper tier forgets all the time; the stack must not."""

    persistent = True
    examples = 20

    def open(self, where, max_bytes):
        return TieredStore([MemoryStore(40_000), DiskStore(where, max_bytes)])


@pytest.fixture
def two(tmp_path):
    memory, disk = MemoryStore(1 << 20), DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([memory, disk], first_wait_s=0.02, longest_wait_s=0.1) as store:
        yield store, memory, disk


@pytest.fixture
def clock(monkeypatch):
    """The time that circuit breakers see, in seconds: it passes only where a test says so."""
    clock = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(circuit_breaker, "time", SimpleNamespace(monotonic=lambda: clock.s))
    return clock


def test_a_hit_below_is_copied_above(two):
    store, memory, disk = two
    disk.put("k", pattern(5000))
    assert bytes(store.get("k")) == pattern(5000)
    assert memory.contains("k")
    disk.put("l", pattern(600))
    room = bytearray(1000)
    assert store.get_into("l", memoryview(room)) == 600
    assert bytes(memory.get("l")) == pattern(600)


def test_each_tier_is_asked_only_for_what_those_above_lack(two):
    store, memory, disk = two
    memory.put("a", b"1")
    disk.put("b", b"2")
    asked = []
    inner = disk.contains_many
    disk.contains_many = lambda keys: asked.append(list(keys)) or inner(keys)
    assert store.contains_many(["a", "b", "c"]) == [True, True, False]
    assert asked == [["b", "c"]]


def test_a_broken_value_leaves_the_tier_it_came_from_and_a_good_copy_stays(two):
    store, memory, disk = two
    memory.put("k", b"broken")
    disk.put("k", b"good")
    assert bytes(store.get("k")) == b"broken"
    store.quarantine("k", "checksum")
    assert bytes(store.get("k")) == b"good"


def test_a_broken_value_that_was_promoted_leaves_both_tiers(two):
    store, memory, disk = two
    disk.put("k", b"broken")
    store.get("k")
    assert memory.contains("k")
    store.quarantine("k", "checksum")
    assert not memory.contains("k")
    assert not disk.contains("k")


def break_disk(disk):
    """Make every write fail, for root too: a file where the folder for files in the making was."""
    writing = disk.root / ".kvlab" / "writing"
    writing.rmdir()
    writing.write_bytes(b"")
    return writing.unlink


def test_a_failing_tier_costs_no_call_is_told_once_and_comes_back(two, caplog, clock):
    store, _, disk = two
    heal = break_disk(disk)
    with caplog.at_level(logging.WARNING):
        for index in range(20):
            assert store.put(f"k{index}", pattern(100, index)) is True
    assert len([record for record in caplog.records if "tier disk's writes failed" in record.message]) == 1
    tier = store.tiers[1]
    assert tier.is_up, "it can be read"
    assert tier.write_health.failures == 1, "it is left alone until the wait is over"
    row = store.rows()[1]
    assert (row["up"], row["takes_writes"], row["outages"]) == (1, 0, 1)
    assert "could not write" in row["last_error"]
    assert bytes(store.get("k3")) == pattern(100, 3)

    heal()
    clock.s += 0.1
    assert store.put("after", b"v")
    assert tier.write_health.is_up
    assert disk.contains("after")
    assert store.why_missing("absent") == "never_stored"


def test_the_wait_grows_with_each_failure_in_a_row(two):
    store, _, disk = two
    heal = break_disk(disk)
    waits = []
    for _ in range(5):
        store.tiers[1].write_health.hurry()
        store.put("k", b"v")
        waits.append(store.tiers[1].write_health.wait_s)
    assert waits == [0.02, 0.04, 0.08, 0.1, 0.1]
    heal()


def test_a_store_that_raises_anything_at_all_is_a_miss(two):
    store, memory, _ = two

    def fail(*_):
        raise RuntimeError("a bug in somebody's tier")

    memory.get = memory.put = memory.contains_many = memory.size_of = fail
    assert store.put("k", b"v")
    assert bytes(store.get("k")) == b"v"
    assert store.contains_many(["k", "l"]) == [True, False]


def test_open_stores(tmp_path):
    with open_stores(["memory://?size=1MiB", f"file://{tmp_path}/a", f"file://{tmp_path}/b"]) as store:
        assert [row["tier"] for row in store.rows()] == ["memory", "disk1", "disk2"]
        store.put("k", b"v")
        assert (tmp_path / "a" / path_of("k")).read_bytes() == b"v"
        assert (tmp_path / "b" / path_of("k")).read_bytes() == b"v"
    with open_stores(["memory://"]) as store:
        assert isinstance(store, MemoryStore)
    with pytest.raises(ConfigError):
        open_stores([])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        open_stores(["memory://", f"file://{tmp_path}/file/kv"])


class TestWriteBack(StoreTests):
    """What a put left to the background is found by the next store, for closing drains."""

    persistent = True
    examples = 10

    def open(self, where, max_bytes):
        return TieredStore([MemoryStore(max_bytes), DiskStore(where, max_bytes)], write="back", store_threshold=1)


def test_write_back_returns_first_and_drains(tmp_path):
    disk = DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([MemoryStore(1 << 20), gate := Gate(disk)], write="back") as store:
        for index in range(10):
            assert store.put(f"k{index}", pattern(1000, index)), "it does not wait for the disk"
        assert not disk.contains("k9")
        gate.is_open.set()
        assert store.drain(60)
        assert disk.contains("k9")
        store.put("last", pattern(1000))
        row = store.rows()[0]
        assert (row["writer_written"], row["writer_dropped"]) == (10, 0)
    with DiskStore(tmp_path / "kv", 1 << 20) as disk:
        assert disk.contains("last")


def test_write_back_drops_and_counts_what_the_queue_cannot_hold(tmp_path):
    gate = Gate(DiskStore(tmp_path / "kv", 1 << 20))
    with TieredStore([MemoryStore(1 << 20), gate], write="back", max_queued=2) as store:
        for index in range(10):
            store.put(f"k{index}", pattern(100, index))
        dropped = store.rows()[0]["writer_dropped"]
        assert dropped >= 7
        gate.is_open.set()
        store.drain()
        assert len(list(gate.inner.keys())) == 10 - dropped


@pytest.mark.parametrize("write", ["through", "back"])
def test_secondary_tiers_get_what_is_seen_again(tmp_path, write):
    memory, disk = MemoryStore(1 << 20), DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([memory, disk], write=write, store_threshold=2) as store:
        store.put("once", b"1")
        store.put("twice", b"2")
        store.put("put again", b"3")
        store.get("twice")
        store.put("put again", b"4")
        store.drain()
        assert sorted(disk.keys()) == ["put again", "twice"]
        assert bytes(disk.get("put again")) == b"4"


def test_what_the_first_tier_refuses_goes_down_at_once(tmp_path):
    disk = DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([MemoryStore(10_000), disk], write="back", store_threshold=3) as store:
        assert store.put("large", pattern(50_000))
        assert disk.contains("large")


def test_without_promotion_values_stay_where_they_are(tmp_path):
    memory, disk = MemoryStore(1 << 20), DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([memory, disk], promote=False) as store:
        disk.put("k", b"v")
        assert bytes(store.get("k")) == b"v"
        assert not memory.contains("k")


def test_settings_are_checked(tmp_path):
    for wrong in ({"write": "sometimes"}, {"store_threshold": 0}):
        with pytest.raises(ConfigError):
            TieredStore([MemoryStore(1)], **wrong)
    with pytest.raises(ConfigError):
        TieredStore([])


def test_a_tier_that_takes_no_writes_is_read_all_the_same(two, monkeypatch, clock):
    """A full disk, or a folder whose lock another process holds."""
    store, memory, disk = two
    assert store.put("old", b"value")
    memory.delete("old")
    puts, take = [], disk.put

    def refuse(key, value):
        puts.append(key)
        raise StoreError("planted", reason="enospc")

    monkeypatch.setattr(disk, "put", refuse)
    for _ in range(20):
        assert store.put("new", b"value")
        memory.delete("old")
        assert bytes(store.get("old")) == b"value"
        assert store.why_missing("absent") == "never_stored"
    assert puts == ["new"], "it is left alone until the wait is over"
    row = store.rows()[1]
    assert (row["up"], row["takes_writes"], row["outages"]) == (1, 0, 1)
    assert "planted" in row["last_error"]
    monkeypatch.setattr(disk, "put", take)
    clock.s += 0.1
    assert store.put("new", b"value")
    assert disk.contains("new")
    assert store.rows()[1]["takes_writes"] == 1


def test_a_tier_that_does_not_take_a_value_loses_the_one_before():
    stack = TieredStore([MemoryStore(64 << 10), MemoryStore(1 << 20)])
    assert stack.put("k", b"old")
    assert stack.put("k", b"new" * 60_000)
    assert bytes(stack.get("k")) == b"new" * 60_000


def test_a_slower_tier_that_does_not_take_a_written_back_value_loses_the_one_before():
    with TieredStore([MemoryStore(1 << 20), MemoryStore(64 << 10)], write="back") as stack:
        assert stack.put("k", b"old")
        assert stack.drain()
        assert stack.put("k", b"new" * 60_000)
        assert stack.drain()
        stack.tiers[0].store.delete("k")
        assert stack.get("k") is None
