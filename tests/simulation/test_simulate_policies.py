"""`evict` and `touch_all` are `victim` with `discard`, and `touch`, done at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.stores.eviction import POLICIES, get_policy

STEPS = st.lists(st.tuples(st.sampled_from("aaate"), st.integers(0, 15), st.integers(1, 3)), max_size=150)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=STEPS)
def test_at_once_is_the_same(name, steps):
    one, other = get_policy(name), get_policy(name)
    for what, key, size in steps:
        if what == "a":
            one.admit(key, size)
            other.admit(key, size)
        elif what == "t":
            keys = [key, key + 1, key + 2, key]
            one.touch_all(keys)
            for each in keys:
                other.touch(each)
        else:
            leaving = other.victim()
            other.discard(leaving)
            assert one.evict() == leaving
    while (leaving := other.victim()) is not None:
        other.discard(leaving)
        assert one.evict() == leaving
    assert one.evict() is None
