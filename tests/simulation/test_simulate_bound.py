"""No policy beats the bound, the bound is the optimum, and who grows with capacity."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_traces import NAMES, traffic

from kvlab.simulation.belady import belady
from kvlab.simulation.replay_tiers import Admission
from kvlab.simulation.simulate import simulate
from kvlab.simulation.traffic import Request, Traffic
from kvlab.stores.eviction import POLICIES

SHARES = (0.003, 0.03, 0.2)


def singles(sequence):
    """Traffic of prompts of one block each."""
    return Traffic("singles", 1, [Request(float(i), 1, 0, [block]) for i, block in enumerate(sequence)])


@st.composite
def small_traffic(draw, prompts=14, depth=5):
    """Prompts that branch: each goes on from some point of an earlier one."""
    seen, num_blocks, requests = [[]], 0, []
    for index in range(draw(st.integers(2, prompts))):
        earlier = draw(st.sampled_from(seen))
        ids = earlier[: draw(st.integers(0, len(earlier)))]
        new = draw(st.integers(0 if ids else 1, depth - min(len(ids), depth - 1)))
        ids = ids + list(range(num_blocks, num_blocks + new))
        num_blocks += new
        seen.append(ids)
        requests.append(Request(float(index), 4 * len(ids), 0, ids))
    return Traffic("small", 4, requests)


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_beats_the_bound(name):
    some = traffic(name).head(2500)
    for share in SHARES:
        tier = f"{max(int(some.num_unique_blocks * share), 1)} blocks"
        how = {"chunk_tokens": some.block_tokens}
        bound = simulate(some, tier, policy="belady", **how).row["block_hit_rate"]
        reached = [simulate(some, tier, policy=policy, **how).row["block_hit_rate"] for policy in POLICIES]
        reached += [simulate(some, tier, policy="lru", admission=2, **how).row["block_hit_rate"]]
        assert max(reached) <= bound
        assert bound <= simulate(some).row["block_hit_rate"] + 1e-12


@given(some=small_traffic(), capacity=st.integers(1, 12), chunk=st.sampled_from([4, 8]), data=st.data())
@settings(max_examples=200)
def test_no_policy_beats_the_bound_on_any_traffic(some, capacity, chunk, data):
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    tier = f"{capacity} blocks"
    reached = simulate(some, tier, policy=policy, chunk_tokens=chunk).hit_blocks.sum()
    assert reached <= simulate(some, tier, policy="belady", chunk_tokens=chunk).hit_blocks.sum()


def optimum(prompts, capacity):
    """Most hits any way of keeping at most `capacity` blocks between prompts can have: all ways are tried."""
    from itertools import combinations

    best = {frozenset(): 0}
    for ids in prompts:
        after = {}
        for held, hits in best.items():
            now = hits + len(held.intersection(ids))
            pool = held.union(ids)
            for kept in combinations(sorted(pool), min(capacity, len(pool))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
        best = after
    return max(best.values())


@given(some=small_traffic(prompts=6, depth=3), capacity=st.integers(1, 3))
@settings(max_examples=60)
def test_the_bound_is_the_optimum(some, capacity):
    prompts = [request.block_ids for request in some.requests]
    assert sum(belady(some, capacity).hit_blocks) == optimum(prompts, capacity)


@pytest.mark.parametrize("policy", ["lru", "belady"])
@pytest.mark.parametrize("name", NAMES)
def test_more_room_never_hurts(name, policy):
    some = traffic(name).head(2500)
    sizes = [max(int(some.num_unique_blocks * share), 1) for share in (0.001, 0.01, 0.05, 0.1, 0.3, 1)]
    rates = [
        simulate(some, f"{size} blocks", policy=policy, chunk_tokens=some.block_tokens).row["block_hit_rate"]
        for size in sizes
    ]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(some.summary()["reuse"])


@given(some=small_traffic(), spare=st.integers(0, 15))
@settings(max_examples=300)
def test_more_room_never_hurts_lru_that_holds_every_single_prompt(some, spare):
    capacity = int(some.num_blocks.max()) + spare
    less = simulate(some, f"{capacity} blocks", chunk_tokens=4).hit_blocks
    more = simulate(some, f"{capacity + 1} blocks", chunk_tokens=4).hit_blocks
    assert (less <= more).all()


def test_a_prompt_longer_than_the_cache_pushes_out_its_own_beginning():
    """So does the engine; and so LRU need not be a stack where it cannot hold a prompt."""
    prompts = [[0, 1, 2], [0, 1, 2, 3], [0, 1]]
    some = Traffic("long", 1, [Request(float(i), len(ids), 0, ids) for i, ids in enumerate(prompts)])
    hits = [simulate(some, f"{n} blocks", chunk_tokens=1).hit_blocks.tolist() for n in (2, 3, 4)]
    assert hits == [[0, 0, 1], [0, 3, 0], [0, 3, 2]]


def test_more_room_may_hurt_fifo():
    """The example of Belady, Nelson and Shedler (CACM 12(6), 1969): 9 misses with room for 3, 10 with room for 4."""
    some = singles([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5])
    hits = [simulate(some, f"{n} blocks", policy="fifo", chunk_tokens=1).hit_blocks.sum() for n in (3, 4)]
    assert hits == [3, 2]


def test_what_is_admitted():
    some = Traffic("three", 1, [Request(float(i), 2, 0, [1, 2]) for i in range(4)])
    hits = lambda admission: simulate(some, "9 blocks", chunk_tokens=1, admission=admission).hit_blocks.tolist()  # noqa: E731
    assert hits(None) == [0, 2, 2, 2]
    assert hits(2) == [0, 0, 2, 2]
    assert hits(3) == [0, 0, 0, 2]
    assert hits(Admission(min_tokens=2)) == [0, 2, 2, 2]
    assert hits(Admission(min_tokens=3)) == [0, 0, 0, 0]


@given(some=small_traffic(), capacity=st.integers(2, 20), chunk=st.sampled_from([4, 8]), data=st.data())
@settings(max_examples=100)
def test_the_fast_loop_equals_the_general_one(some, capacity, chunk, data):
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    how = {"policy": policy, "chunk_tokens": chunk}
    fast = simulate(some, f"{capacity} blocks", **how)
    slow = simulate(some, f"{capacity} blocks", admission=Admission(), **how)
    assert fast.rows() == slow.rows()
    assert fast.hit_blocks.tolist() == slow.hit_blocks.tolist()
