"""What every eviction policy promises, as tests. Subclass, say how to make yours, inherit the tests::

class TestMyPolicy(PolicyTests):
    def policy(self):
        return MyPolicy()
"""

from collections.abc import Hashable
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.simulation.simulate import BOUND, simulate
from kvlab.stores.eviction import EvictionPolicy, get_policy
from kvlab.stores.memory import MemoryStore
from kvlab.testing.wanted import to_define

KEYS: list[Hashable] = ["a", "b", 7, b"bytes", ("a", 1), "", 0, "鍵"]
# What a tier does: admit, touch, discard and evict a key, or pin one, so that no victim may be it.
STEPS = st.lists(st.tuples(st.sampled_from("aaatdep"), st.integers(0, 7), st.integers(0, 1 << 40)), max_size=120)


class PolicyTests:
    """The suite. `policy` makes a new, empty one each time."""

    examples: ClassVar[int] = 200  # of the model tests

    def policy(self) -> EvictionPolicy:
        """A new, empty policy."""
        raise to_define(self, "policy(self)", "a new, empty policy")

    def test_one_who_holds_nothing_has_no_victim(self) -> None:
        policy = self.policy()
        assert policy.victim() is None, "victim() of an empty policy must be None"
        assert policy.victim({"a"}) is None
        assert policy.evict() is None
        policy.touch("a")
        policy.touch_all(["a", "b"])
        policy.discard("a")
        assert policy.victim() is None, "touch and discard of an absent key must admit nothing"

    def test_every_key_leaves_once(self) -> None:
        policy = self.policy()
        for size, key in enumerate(KEYS):
            policy.admit(key, size)
        left = [policy.evict() for _ in KEYS]
        assert sorted(map(repr, left)) == sorted(map(repr, KEYS)), "evict() must give each key once"
        assert policy.evict() is None

    def test_a_key_that_enters_again_is_there_once(self) -> None:
        """A store replaces a value by one of another size: the same key, admitted twice."""
        policy = self.policy()
        for size in (10, 1 << 50, 0):
            policy.admit("a", size)
        assert policy.evict() == "a"
        assert policy.victim() is None, "admit of a key that is here must only change its size"

    def test_a_victim_stays_until_it_is_discarded(self) -> None:
        policy = self.policy()
        for key in ("a", "b", "c"):
            policy.admit(key, 1)
        victim = policy.victim()
        assert victim in ("a", "b", "c")
        assert policy.victim() == victim, "victim() must only choose; discard() makes the key leave"
        policy.discard(victim)
        assert policy.victim() != victim

    def test_what_is_pinned_is_no_victim(self) -> None:
        policy = self.policy()
        for key in ("a", "b", "c"):
            policy.admit(key, 1)
        for key in ("a", "b", "c"):
            assert policy.victim({"a", "b", "c"} - {key}) == key, "victim(pinned) must be the one key not pinned"
        assert policy.victim({"a", "b", "c"}) is None, "victim(pinned) must be None where all are pinned"
        assert policy.victim() is not None, "a pin counts for one call only"

    def test_a_key_that_left_may_come_back(self) -> None:
        policy = self.policy()
        for _ in range(3):
            policy.admit("a", 5)
            policy.discard("a")
            policy.discard("a")
            assert policy.victim() is None
        policy.admit("a", 5)
        assert policy.victim() == "a"

    def test_evict_and_touch_all_are_their_parts(self) -> None:
        """`evict` is victim and discard, `touch_all` is touch of each: a faster one of yours must agree."""
        whole, parts = self.policy(), self.policy()
        for policy in (whole, parts):
            for key in range(30):
                policy.admit(key, key)
        uses = [key * 7 % 31 for key in range(100)]
        whole.touch_all(iter(uses))
        for key in uses:
            parts.touch(key)
        for _ in range(30):
            victim = parts.victim()
            parts.discard(victim)
            assert whole.evict() == victim

    def test_it_holds_for_any_sequence(self) -> None:
        """A victim is here and not pinned, there is one as long as there can be one, and all of them leave."""

        @settings(max_examples=self.examples, deadline=None, database=None)
        @given(steps=STEPS)
        def check(steps: list[tuple[str, int, int]]) -> None:
            _run(self.policy(), steps)

        check()

    def test_the_same_calls_give_the_same_victims(self) -> None:
        """No clock and no chance: a simulation must predict what a store does."""

        @settings(max_examples=self.examples, deadline=None, database=None)
        @given(steps=STEPS)
        def check(steps: list[tuple[str, int, int]]) -> None:
            assert _run(self.policy(), steps) == _run(self.policy(), steps)

        check()

    def test_a_store_keeps_its_budget(self) -> None:
        with MemoryStore(100_000, policy=type(self.policy())) as store:
            for index in range(60):
                assert store.put(f"k{index % 23}", bytes([index]) * (index * 977 % 20_000))
                store.get(f"k{index % 7}")
                assert store.used_bytes <= 100_000
            assert store.counters.evictions > 0

    def test_it_does_not_beat_the_bound(self) -> None:
        how = {"trace": "chat", "tiers": "500 blocks", "chunk_tokens": 16}
        mine = simulate(**how, policy=type(self.policy()))  # type: ignore[arg-type]
        bound = simulate(**how, policy=BOUND)  # type: ignore[arg-type]
        assert 0 <= mine.row["block_hit_rate"] <= bound.row["block_hit_rate"]

    def test_it_is_made_without_arguments(self) -> None:
        """A store makes it by name or class."""
        assert get_policy(type(self.policy())).victim() is None


def _run(policy: EvictionPolicy, steps: list[tuple[str, int, int]]) -> list[Hashable]:
    """Drive `policy` beside a set; the keys in the order in which they left."""
    held: set[Hashable] = set()
    pinned: set[Hashable] = set()
    left: list[Hashable] = []

    def leaves(pins: set[Hashable]) -> bool:
        victim = policy.victim(pins)
        assert (victim is None) == (not held - pins), f"victim({pins}) is {victim!r} where {held} are here"
        if victim is None:
            return False
        assert victim in held, f"victim {victim!r} is not here; {held} are"
        assert victim not in pins, f"victim {victim!r} is pinned"
        policy.discard(victim)
        held.remove(victim)
        left.append(victim)
        return True

    for what, key, size in steps:
        if what == "a":
            policy.admit(key, size)
            held.add(key)
        elif what == "t":
            policy.touch(key)
        elif what == "d":
            policy.discard(key)
            held.discard(key)
        elif what == "p":
            pinned ^= {key}
        else:
            leaves(pinned)
    while leaves(set()):
        pass
    assert not held
    return left
