"""The memory tier's index against a plain model: no slot has two owners, leases hold, runs are found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.errors import ConfigError


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "drop", "lease", "release", "touch"]), st.integers(0, 9), st.integers(1, 6)
        ),
        max_size=80,
    )
)
def test_no_slot_has_two_owners_and_none_is_reused_while_leased(steps):
    index = SlotIndex(16)
    leased = []  # an entry for each lease, also of objects that were dropped meanwhile
    for what, name, count in steps:
        key = bytes([name])
        held = index.get(key)
        if what == "reserve" and held is None:
            busy = {slot for entry in leased for slot in entry.slots}
            entry = index.reserve(key, count)
            assert (entry is not None) == (count <= 16 - len(busy))
            assert entry is None or not busy & set(entry.slots)
        elif what == "drop" and held is not None:
            index.drop(held)
            assert index.get(key) is index.generation(held.generation) is None
        elif what == "lease" and held is not None:
            index.lease(held)
            leased.append(held)
        elif what == "release" and leased:
            index.release(leased.pop(name % len(leased)))
        elif what == "touch":
            index.touch([key])
        held = [e for n in range(10) if (e := index.get(bytes([n])))]
        owned = [slot for e in {*held, *leased} for slot in e.slots]
        assert len(owned) == len(set(owned)) == 16 - index.num_free
        assert index.num_leased_slots == len({slot for e in leased for slot in e.slots})
        assert all(e in held or e.dropped for e in leased), "what is leased is not evicted"
        free_runs = [s for start, n in index._runs.items() for s in range(start, start + n)]
        assert sorted(free_runs + owned) == list(range(16))


def test_each_reservation_is_a_generation_of_its_own():
    index = SlotIndex(4)
    first = index.reserve(b"a", 2)
    index.lease(first)
    index.drop(first)
    second = index.reserve(b"a", 2)
    assert second.generation != first.generation
    assert not {*second.slots} & {*first.slots}
    assert index.reserve(b"b", 1) is not None  # evicts the second; the first's slots are still leased
    assert not index.can_reserve(3)
    index.release(first)
    assert index.can_reserve(4)
    with pytest.raises(ValueError, match="more often than it was leased"):
        index.release(first)


def test_slots_come_in_one_run_where_there_is_one():
    index = SlotIndex(10)
    for name in range(5):
        index.reserve(bytes([name]), 2)
    for name in (1, 3, 2):
        index.drop(index.get(bytes([name])))
    assert index.reserve(b"x", 6).slots == (2, 3, 4, 5, 6, 7)


def test_the_least_recently_used_leaves_first_and_is_remembered():
    index = SlotIndex(4)
    index.reserve(b"a", 2)
    index.reserve(b"b", 2)
    index.touch([b"a"])
    index.reserve(b"c", 2)
    assert index.get(b"b") is None
    assert b"b" in index.evicted
    assert index.get(b"a") is not None


def test_an_empty_arena_is_refused():
    with pytest.raises(ConfigError, match="at least one block"):
        SlotIndex(0)
