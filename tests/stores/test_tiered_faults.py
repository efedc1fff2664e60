"""A tier that fails in the middle of a write keeps what it had before: that is no answer to a read."""

import random
import subprocess
import sys

import pytest

from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore, guarded
from kvlab.stores.wrappers import FaultStore, WrapperStore
from tests.support.gate import Gate


@pytest.fixture
def stack():
    upper, lower = FaultStore(MemoryStore(1 << 20)), FaultStore(MemoryStore(1 << 20))
    with TieredStore([upper, lower], first_wait_s=0, longest_wait_s=0) as stack:
        yield stack, upper, lower


def test_a_write_that_a_tier_missed_is_not_answered_with_the_value_before(stack):
    store, upper, lower = stack
    assert store.put("k", b"old")
    lower.fail = 1.0
    assert store.put("k", b"new")
    lower.fail = 0.0
    upper.inner.clear()
    assert store.contains_many(["k"]) == [False]
    assert store.size_of("k") is None
    assert list(store.keys()) == []
    assert store.get("k") is None
    assert store.get_into("k", memoryview(bytearray(9))) is None
    assert not lower.contains("k"), "the old one was deleted when the tier could be asked again"
    assert store.put("k", b"newest")
    upper.inner.clear()
    assert bytes(store.get("k")) == b"newest"


@pytest.mark.parametrize("which", [0, 1])
def test_a_delete_that_a_tier_missed_stays_a_delete(stack, which):
    store = stack[0]
    faulty = stack[1 + which]
    store.put("k", b"old")
    faulty.fail = 1.0
    store.delete("k")
    assert store.get("k") is None
    faulty.fail = 0.0
    assert not store.contains("k")
    assert store.get("k") is None


def test_a_clear_that_a_tier_missed_leaves_it_out_until_one_succeeds(stack):
    store, _, lower = stack
    store.put("k", b"old")
    lower.fail = 1.0
    store.clear()
    lower.fail = 0.0
    assert not store.contains("k")
    assert store.get("k") is None
    assert store.rows()[1]["up"] == 0
    store.clear()
    assert store.rows()[1]["up"] == 1
    lower.put("l", b"value")
    assert bytes(store.get("l")) == b"value"


def test_a_tier_that_missed_too_many_writes_is_left_out(stack, monkeypatch, caplog):
    """What it missed is remembered in bounded memory."""
    monkeypatch.setattr(guarded, "MOST_MISSED", 100)
    store, upper, lower = stack
    for index in range(102):
        lower.put(f"k{index}", b"old")
    lower.fail = 1.0
    for index in range(101):
        store.put(f"k{index}", b"new")
    lower.fail = 0.0
    upper.inner.clear()
    assert [store.get(f"k{index}") for index in range(102)] == [None] * 102
    assert store.why_missing("k0") == "tier_down"
    assert caplog.text.count("it is left out") == 1
    store.clear()
    assert store.put("k0", b"new")
    upper.inner.clear()
    assert bytes(store.get("k0")) == b"new"


def test_a_tier_that_takes_no_writes_at_all_is_read_on(stack, monkeypatch):
    """As a folder that is mounted read-only: what it never had is not worth remembering for ever."""
    monkeypatch.setattr(guarded, "MOST_MISSED", 10)
    store, upper, lower = stack
    lower.put("old", b"value")
    monkeypatch.setattr(lower, "_around", lambda method, _: 1 / 0 if method in ("put", "delete") else None)
    for index in range(100):
        assert store.put(f"k{index}", b"new")
    upper.inner.clear()
    assert bytes(store.get("old")) == b"value"
    assert store.rows()[1]["up"] == 1


def test_a_tier_that_is_left_out_is_left_alone(stack, monkeypatch):
    store, _, lower = stack
    lower.put("k", b"of others")
    lower.fail = 1.0
    store.clear()
    lower.fail = 0.0
    assert store.get("k") is None
    assert lower.contains("k")


def test_a_value_on_its_way_down_hides_no_newer_one():
    """It was read before the newer one came, of which the tier must go on to know that it has missed it."""
    store = MemoryStore(1 << 20)
    tier = guarded.GuardedStore(store)
    take = store.put
    store.put = lambda key, value: tier.miss(key) or take(key, value)
    assert tier.put("k", b"older")
    assert tier.misses("k")
    del store.put
    assert tier.put("k", b"newer")
    assert not tier.misses("k")


def test_what_a_sound_tier_missed_is_deleted_there_before_it_is_forgotten(monkeypatch):
    monkeypatch.setattr(guarded, "MOST_MISSED", 10)
    lower = MemoryStore(1 << 20)
    gate = Gate(lower)
    gate._around = lambda method, num_bytes: gate.is_open.wait(200) if method == "put" else None
    with TieredStore([MemoryStore(1 << 20), gate], write="back", max_queued=1) as store:
        for index in range(40):
            lower.put(f"k{index}", b"old")
        for index in range(40):
            store.put(f"k{index}", b"new")
        store.tiers[0].store.clear()
        gate.is_open.set()
        store.drain()
        found = {bytes(value) for index in range(40) if (value := store.get(f"k{index}")) is not None}
        assert found <= {b"new"}
        assert store.rows()[1]["up"] == 1


@pytest.mark.parametrize("faults", [0.0, 0.2])
@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("seed", range(8))
def test_a_read_is_the_last_value_put_or_a_miss(seed, write, faults):
    draw, truth = random.Random(seed), {}
    upper = FaultStore(MemoryStore(40 * 4096, wait_s=0), seed=seed)
    lower = FaultStore(MemoryStore(400 * 4096, wait_s=0), seed=seed + 1)
    with TieredStore([upper, lower], write=write, first_wait_s=0, longest_wait_s=0, max_queued=2) as store:
        for _ in range(600):
            draw.choice((upper, lower)).fail = draw.choice((0.0, faults))
            key, act = f"k{draw.randrange(30)}", draw.random()
            if act < 0.4:
                value = bytes([draw.randrange(256)]) * draw.choice((10, 5_000, 60_000, 200_000))
                stored = store.put(key, value)
                truth[key] = value if stored else None
            elif act < 0.9:
                store.drain()
                got = store.get(key)
                assert got is None or bytes(got) == truth.get(key)
            else:
                store.delete(key)
                truth[key] = None
        upper.fail = lower.fail = 0.0


def test_a_first_put_while_the_interpreter_ends_does_not_hang():
    """No thread can be started then: the value stays in the first tier."""
    program = """
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
class Last:
    def __del__(self):
        print(stack.put("k", b"x"), stack.drain(), bytes(stack.get("k")), stack.delete("k"), stack.close(), flush=True)
stack = TieredStore([MemoryStore(1 << 20), MemoryStore(1 << 20)], write="back")
{before}
last = Last()
"""
    for before in ("", 'stack.put("earlier", b"x")'):
        command = [sys.executable, "-c", program.replace("{before}", before)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (ended.stdout, ended.stderr) == ("True True b'x' True None\n", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), RuntimeError("x")])
def test_what_a_lower_tier_raises_ends_no_writer_and_no_close(error):
    lower, closed = MemoryStore(1 << 20), []

    def fail(*args):
        raise error

    stack = TieredStore([MemoryStore(1 << 20), lower], write="back", first_wait_s=0, longest_wait_s=0)
    take, lower.put = lower.put, fail
    assert stack.put("a", b"value")
    assert stack.drain(60)
    lower.put = take
    assert stack.put("b", b"value")
    assert stack.drain(60), "the writer's thread lives on"
    assert lower.contains("b")
    lower.close = lambda: closed.append(True)
    stack.tiers[0].store.close = fail
    stack.close()
    assert closed == [True], "the tiers below are closed too"


def test_numbers_of_a_server_that_does_not_answer_are_no_sign_of_life():
    """Asked alone for its numbers, a tier may give the last known ones."""

    class Remembering(WrapperStore):
        is_up = True

    remote = Remembering(MemoryStore(1 << 20), name="remote")
    with TieredStore([MemoryStore(1 << 20), remote], first_wait_s=1e-9, longest_wait_s=1e-9) as store:
        store.put("key", b"value")
        assert [row["up"] for row in store.rows()] == [1, 1]
        remote.is_up = False
        for _ in range(3):
            _, row = store.rows()
            assert row["up"] == 0
            assert row["used_bytes"] == remote.used_bytes, "the last that is known"
            assert store.used_bytes
        remote.is_up = True
        assert [row["up"] for row in store.rows()] == [1, 1]
