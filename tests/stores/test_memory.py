import gc
import threading
import time

import numpy as np

from kvlab.hostmemory import PAGE
from kvlab.stores import open_store
from kvlab.stores.memory import MemoryStore
from kvlab.stores.memory.arena import Arena
from kvlab.testing import BudgetTests, StoreTests
from kvlab.testing.machines import pattern


class TestMemoryStore(StoreTests, BudgetTests):
    overhead = PAGE

    def open(self, where, max_bytes):
        return MemoryStore(max_bytes)


def test_a_leased_value_is_in_place_aligned_and_stays(tmp_path):
    with MemoryStore(4 * PAGE, wait_s=0.01) as store:
        store.put("a", pattern(2 * PAGE))
        with store.lease("a") as held:
            assert held.readonly
            assert np.frombuffer(held, np.uint8).__array_interface__["data"][0] % PAGE == 0
            for index in range(10):
                assert store.put(f"k{index}", pattern(PAGE, index))
            assert store.put("too much beside the leased", pattern(3 * PAGE)) is False
            assert bytes(held) == pattern(2 * PAGE)
            assert store.contains("a")
        assert store.put("now it fits", pattern(4 * PAGE))
        with store.lease("a") as held:
            assert held is None


def test_a_value_deleted_or_replaced_under_its_reader_stays_readable_and_counted():
    with MemoryStore(8 * PAGE) as store:
        store.put("a", pattern(PAGE, 1))
        with store.lease("a") as old:
            store.put("a", pattern(PAGE, 2))
            assert bytes(old) == pattern(PAGE, 1)
            assert bytes(store.get("a")) == pattern(PAGE, 2)
            assert store.used_bytes == 2 * PAGE
            with store.lease("a") as new:
                assert store.delete("a")
                assert store.get("a") is None
                assert bytes(new) == pattern(PAGE, 2)
                assert store.used_bytes == 2 * PAGE
        assert store.used_bytes == 0
        store.put("a", pattern(8 * PAGE))
        assert store.put("b", pattern(8 * PAGE)), "nothing is leased any more"


def test_a_put_waits_for_room_a_bounded_while():
    with MemoryStore(2 * PAGE, wait_s=5.0) as store:
        store.put("a", pattern(2 * PAGE))
        leased, release = threading.Event(), threading.Event()

        def read():
            with store.lease("a"):
                leased.set()
                release.wait(10)

        reader = threading.Thread(target=read)
        reader.start()
        leased.wait(10)
        threading.Timer(0.05, release.set).start()
        assert store.put("b", pattern(2 * PAGE)) is True
        reader.join()
    with MemoryStore(2 * PAGE, wait_s=0.05) as store:
        store.put("a", pattern(2 * PAGE))
        with store.lease("a"):
            start = time.monotonic()
            assert store.put("b", pattern(PAGE)) is False
            assert time.monotonic() - start >= 0.05
        assert store.counters.refused == 1


def test_the_arena_gives_back_whole_holes():
    arena = Arena(10 * PAGE)
    regions = [arena.take(PAGE) for _ in range(10)]
    assert arena.take(1) is None
    for region in regions[::2] + regions[1::2]:
        arena.free(region)
    assert arena.used == 0
    assert arena.largest_hole == 10 * PAGE
    assert arena.take(10 * PAGE).span == 10 * PAGE


def test_pinning_takes_exactly_the_arena_or_tells_that_it_cannot(caplog):
    import torch

    with open_store("memory://?size=1000kB&pinned=true") as store:
        store.put("k", pattern(1000))
        assert store.stats()["pinned"] == int(torch.cuda.is_available())
        if torch.cuda.is_available():
            with store.lease("k") as held:
                assert torch.frombuffer(held, dtype=torch.uint8).is_pinned()
        else:
            assert "not pinned" in caplog.text


def test_a_put_that_is_refused_evicts_nothing():
    """A leased value in the middle leaves no stretch that is long enough, whatever else leaves."""
    with MemoryStore(10 * PAGE, wait_s=0.01) as store:
        for index in range(10):
            store.put(f"k{index}", b"x")
        with store.lease("k5"):
            assert store.put("large", pattern(7 * PAGE)) is False
            assert store.put("k1", pattern(7 * PAGE)) is False
            assert sorted(store.keys()) == [f"k{index}" for index in range(10)]
            assert (store.counters.evictions, store.counters.refused) == (0, 2)
            assert store.put("as long as what lies before it", pattern(5 * PAGE))
        assert store.put("large", pattern(10 * PAGE))


def test_a_value_that_replaced_a_leased_one_can_leave():
    with MemoryStore(4 * PAGE, wait_s=0.01) as store:
        store.put("a", pattern(PAGE))
        with store.lease("a"):
            store.put("a", pattern(3 * PAGE))
            assert store.put("b", pattern(3 * PAGE))


def test_memory_that_is_pinned_is_given_back_by_a_store_that_is_forgotten(monkeypatch):
    """Where it is not, CUDA maps nothing more in this process."""
    from kvlab.stores.memory import arena

    told = []
    monkeypatch.setattr(arena, "pin", lambda memory: lambda: told.append("unpinned"))
    store = MemoryStore(1 << 20, pinned=True)
    assert store.stats()["pinned"] == 1
    del store
    gc.collect()
    assert told == ["unpinned"]
    with MemoryStore(1 << 20, pinned=True) as store:
        store.close()
    assert store.stats()["pinned"] == 0
    assert told == ["unpinned"] * 2
