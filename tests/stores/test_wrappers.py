import time

import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.stores.wrappers import CountingStore, FaultStore, LatencyStore
from kvlab.testing import StoreTests
from kvlab.testing.machines import pattern


class TestCountingStore(StoreTests):
    examples = 10

    def open(self, where, max_bytes):
        return CountingStore(MemoryStore(max_bytes))


class TestLatencyStore(StoreTests):
    examples = 10

    def open(self, where, max_bytes):
        return LatencyStore(MemoryStore(max_bytes), latency_s=1e-6, bytes_per_s=10e9)


class TestFaultStoreAtRest(StoreTests):
    examples = 10

    def open(self, where, max_bytes):
        return FaultStore(MemoryStore(max_bytes))


def test_counting():
    store = CountingStore(MemoryStore(1 << 20))
    store.put("k", [b"ab", b"c"])
    store.get("k")
    store.contains_many(["k", "l"])
    assert store.calls == {"put": 1, "get": 1, "contains_many": 1}
    assert store.bytes["put"] == store.bytes["get"] == 3
    assert store.stats()["calls_put"] == 1


def test_latency_is_felt_and_the_line_is_shared():
    store = LatencyStore(MemoryStore(1 << 20), latency_s=0.02, bytes_per_s=1e6)
    start = time.monotonic()
    store.put("k", pattern(10_000))
    assert time.monotonic() - start >= 0.03
    with pytest.raises(ConfigError):
        LatencyStore(MemoryStore(1), bytes_per_s=0)


def test_faults_are_injected_reproducibly():
    def run(seed):
        store = FaultStore(MemoryStore(1 << 20), fail=0.3, corrupt=0.3, truncate=0.2, lose=0.2, seed=seed)
        log = []
        for index in range(300):
            try:
                store.put("k", pattern(100, index))
                got = store.get("k")
                log.append(None if got is None else bytes(got))
            except StoreError as error:
                log.append(error.reason)
        return log, dict(store.injected)

    assert run(1) == run(1)
    assert run(1) != run(2)
    _, injected = run(1)
    assert all(injected[kind] > 5 for kind in ("fail", "corrupt", "truncate", "lose"))


def test_a_stack_over_a_faulty_tier_never_raises():
    faulty = FaultStore(MemoryStore(1 << 20), fail=0.5, seed=3)
    with TieredStore([MemoryStore(1 << 20), faulty], first_wait_s=0.0001, longest_wait_s=0.001) as store:
        for index in range(200):
            assert store.put(f"k{index % 7}", pattern(50, index))
            assert bytes(store.get(f"k{index % 7}")) == pattern(50, index)
        assert store.rows()[1]["outages"] > 10
