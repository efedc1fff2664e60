"""The memory tier's index against a plain model: no slot has two owners, pins hold, runs are found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.connectors.vllm.slots import SlotIndex
from kvlab.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["reserve", "drop", "pin", "unpin", "touch"]), st.integers(0, 9), st.integers(1, 6)),
        max_size=60,
    )
)
def test_no_slot_has_two_owners(steps):
    index = SlotIndex(16)
    pins: dict[bytes, int] = {}
    for what, name, count in steps:
        key = bytes([name])
        held = index.get(key)
        if what == "reserve" and held is None:
            entry = index.reserve(key, count)
            pinned = sum(len(index.get(k).slots) for k in pins)
            assert (entry is not None) == (count <= 16 - pinned)
        elif what == "drop":
            index.drop(key)
            pins.pop(key, None)
        elif what == "pin" and held is not None:
            index.pin(key)
            pins[key] = pins.get(key, 0) + 1
        elif what == "unpin" and pins.get(key):
            index.unpin(key)
            pins[key] -= 1
            if not pins[key]:
                del pins[key]
        elif what == "touch":
            index.touch([key])
        owned = [slot for n in range(10) if (e := index.get(bytes([n]))) for slot in e.slots]
        assert len(owned) == len(set(owned)) == 16 - index.num_free
        assert all(0 <= slot < 16 for slot in owned)
        assert all(index.get(k) is not None for k in pins), "what is pinned stays"
        free_runs = [s for start, n in index._runs.items() for s in range(start, start + n)]
        assert sorted(free_runs + owned) == list(range(16))


def test_slots_come_in_one_run_where_there_is_one():
    index = SlotIndex(10)
    for name in range(5):
        index.reserve(bytes([name]), 2)
    index.drop(bytes([1]))
    index.drop(bytes([3]))
    index.drop(bytes([2]))
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
