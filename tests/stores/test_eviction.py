"""Policies against independent, plain implementations on a real trace, and what makes each one itself."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvlab.bench.generate import generate_traffic
from kvlab.bench.trace_files import find_traces, load_traffic
from kvlab.errors import ConfigError
from kvlab.stores import open_store
from kvlab.stores.eviction import POLICIES, get_policy
from kvlab.stores.eviction.lazy_queue import LazyQueue

SIZES = [100, 500, 1000, 3000, 10_000]


@pytest.fixture(scope="module")
def accesses():
    """60,000 block ids in the order of use: of the public conversation trace where it is found, else made up."""
    found = find_traces().get("mooncake_conversation_trace")
    traffic = load_traffic(found) if found else generate_traffic("chat", 6000, reuse=0.4, block_tokens=64)
    ids = [block for request in traffic.requests for block in request.block_ids]
    assert len(ids) >= 60_000
    return ids[:60_000]


def hits_of(policy, accesses, capacity):
    """Hit count of a policy, every object of one byte."""
    held, hits = set(), 0
    for key in accesses:
        if key in held:
            hits += 1
            policy.touch(key)
            continue
        if len(held) == capacity:
            leaving = policy.victim()
            held.remove(leaving)
            policy.discard(leaving)
        held.add(key)
        policy.admit(key, 1)
    return hits


def plain_lru(accesses, capacity):
    """A list of stamps: who was used longest ago is looked for, not kept in order."""
    last, hits, heap = {}, 0, []
    import heapq

    for now, key in enumerate(accesses):
        if key in last:
            hits += 1
        elif len(last) == capacity:
            while True:
                stamp, oldest = heapq.heappop(heap)
                if last.get(oldest) == stamp:
                    del last[oldest]
                    break
        last[key] = now
        heapq.heappush(heap, (now, key))
    return hits


def plain_fifo(accesses, capacity):
    ring, held, hits, at = [None] * capacity, set(), 0, 0
    for key in accesses:
        if key in held:
            hits += 1
            continue
        held.discard(ring[at])
        ring[at] = key
        held.add(key)
        at = (at + 1) % capacity
    return hits


def plain_lfu(accesses, capacity):
    import heapq

    state, hits, heap = {}, 0, []
    for now, key in enumerate(accesses):
        if key in state:
            hits += 1
            state[key] = (state[key][0] + 1, now)
        else:
            if len(state) == capacity:
                while True:
                    uses, stamp, least = heapq.heappop(heap)
                    if state.get(least) == (uses, stamp):
                        del state[least]
                        break
            state[key] = (1, now)
        heapq.heappush(heap, (*state[key], key))
    return hits


def plain_s3fifo(accesses, capacity):
    """The paper's algorithm 1 on lists, everything of size one."""
    small, main, ghosts, uses, hits = [], [], [], {}, 0
    remembered = set()
    for key in accesses:
        if key in uses:
            hits += 1
            uses[key] = min(uses[key] + 1, 3)
            continue
        while len(uses) == capacity:
            if 10 * len(small) >= len(uses):
                oldest = small.pop(0)
                if uses[oldest] > 1:
                    main.append(oldest)
                    uses[oldest] = 0
                    continue
                ghosts.append(oldest)
                remembered.add(oldest)
                if len(ghosts) > max(len(main), 1):
                    remembered.remove(ghosts.pop(0))
                del uses[oldest]
            else:
                oldest = main.pop(0)
                if uses[oldest]:
                    main.append(oldest)
                    uses[oldest] -= 1
                else:
                    del uses[oldest]
        uses[key] = 0
        if key in remembered:
            remembered.remove(key)
            ghosts.remove(key)
            main.append(key)
        else:
            small.append(key)
    return hits


@pytest.mark.parametrize("capacity", SIZES)
@pytest.mark.parametrize(
    ("name", "oracle"), [("lru", plain_lru), ("fifo", plain_fifo), ("lfu", plain_lfu), ("s3fifo", plain_s3fifo)]
)
def test_hit_counts_equal_an_independent_implementation(accesses, name, oracle, capacity):
    hits = hits_of(get_policy(name), accesses, capacity)
    assert hits == oracle(accesses, capacity)
    assert 0 < hits < len(accesses)


def test_s3fifo_and_arc_beat_fifo_where_half_is_used_once():
    rng = random.Random(5)
    weights = [1 / (rank + 1) for rank in range(5000)]
    again = rng.choices(range(5000), weights, k=30_000)
    accesses = [key for i, popular in enumerate(again) for key in (popular, 10_000 + i)]
    fifo = hits_of(get_policy("fifo"), accesses, 1000)
    assert hits_of(get_policy("s3fifo"), accesses, 1000) > fifo
    assert hits_of(get_policy("arc"), accesses, 1000) > fifo


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=st.lists(st.tuples(st.sampled_from("aatvdp"), st.integers(0, 12), st.integers(0, 50)), max_size=120))
@example(steps=[("a", 0, 0), ("a", 0, 0), ("a", 0, 1), ("a", 1, 0)])
def test_any_sequence(name, steps):
    """A victim is always one that is here and not pinned, and there is one as long as there can be one."""
    policy = get_policy(name)
    held, pinned = {}, set()
    for what, key, size in steps:
        if what == "a":
            policy.admit(key, size)
            held[key] = size
        elif what == "t":
            policy.touch(key)
        elif what == "d":
            policy.discard(key)
            held.pop(key, None)
        elif what == "p":
            pinned ^= {key}
        else:
            victim = policy.victim(pinned)
            assert (victim is None) == (not held.keys() - pinned)
            assert victim is None or (victim in held and victim not in pinned)
            if victim is not None:
                policy.discard(victim)
                del held[victim]
    left = []
    while (victim := policy.victim()) is not None:
        assert policy.victim() == victim
        left.append(victim)
        policy.discard(victim)
    assert sorted(left) == sorted(held)


@given(steps=st.lists(st.tuples(st.sampled_from("eeelpv"), st.integers(0, 9)), max_size=200))
def test_a_line_left_from_the_middle_is_a_plain_list(steps):
    line, plain, unwanted, longest = LazyQueue(), [], set(), 0
    for what, key in steps:
        if what == "e" and key not in plain:
            line.order.append(key)
            plain.append(key)
        elif what == "l" and key in plain:
            line.leave(key)
            plain.remove(key)
        elif what == "p":
            unwanted ^= {key}
        elif what == "v" and plain:
            assert line.past_voids(line.order.popleft()) == plain.pop(0)
        longest = max(longest, len(plain))
        assert len(line) == len(plain)
        assert line.first(unwanted) == next((key for key in plain if key not in unwanted), None)
        assert len(line.order) <= 2 * longest
    while plain:
        assert line.first() == plain[0]
        line.leave(plain.pop(0))


@pytest.mark.parametrize(("name", "ghosts"), [("s3fifo", ("_ghosts",)), ("arc", ("_once_ghosts", "_again_ghosts"))])
def test_what_is_remembered_of_the_gone_is_bounded(accesses, name, ghosts):
    policy = get_policy(name)
    hits_of(policy, accesses, 200)
    remembered = sum(len(getattr(policy, ghost)) for ghost in ghosts)
    assert 0 < remembered <= 2 * 200


def test_prefixes_outlive_their_suffixes_when_touched_last_first():
    policy = get_policy("lru")
    prompt = ["p0", "p1", "p2"]
    for key in prompt:
        policy.admit(key, 1)
    for key in reversed(prompt):
        policy.touch(key)
    assert policy.victim() == "p2"


@pytest.mark.parametrize("name", ["s3fifo", "arc"])
def test_a_scan_does_not_drive_out_what_is_used(name):
    """Ten keys used over and over stay, while a thousand pass by once. LRU of the same size loses them."""

    def hot_hits(policy):
        hot, hits, held = [f"hot{i}" for i in range(10)], 0, set()
        stream = hot * 3
        for index in range(100):
            stream += [f"scan{index}.{i}" for i in range(30)] + (hot if index % 3 == 0 else [])
        for key in stream:
            if key in held:
                hits += key.startswith("hot")
                policy.touch(key)
                continue
            if len(held) == 40:
                leaving = policy.victim()
                held.remove(leaving)
                policy.discard(leaving)
            held.add(key)
            policy.admit(key, 1)
        return hits

    assert hot_hits(get_policy(name)) > 2 * hot_hits(get_policy("lru"))


def test_mru_keeps_a_loop():
    loop = list(range(15)) * 20
    assert hits_of(get_policy("mru"), loop, 10) > 150
    assert hits_of(get_policy("lru"), loop, 10) == 0


@pytest.mark.parametrize("scheme", ["memory://", "file://{}"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_tier_takes_its_policy_by_url(tmp_path, scheme, name):
    url = scheme.format(tmp_path / "kv") + f"?size=100kB&policy={name}"
    with open_store(url) as store:
        for index in range(20):
            store.put(f"k{index}", bytes([index]) * 15_000)
            store.get(f"k{index // 2}")
        held = list(store.keys())
        assert 4 <= len(held) <= 6
        assert all(bytes(store.get(key)) == bytes([int(key[1:])]) * 15_000 for key in held)
    with pytest.raises(ConfigError, match="known: arc, fifo"):
        open_store(scheme.format(tmp_path / "other") + "?policy=random")
