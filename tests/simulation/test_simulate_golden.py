"""Hit rates against simulations written independently: plain ones here, and published figures of public traces."""

import heapq

import numpy as np
import pytest
from request_traces import FOUND, NAMES, traffic

from kvlab.simulation.reuse import reuse_distances, reuse_histogram
from kvlab.simulation.simulate import simulate

RATES = ("block_hit_rate", "token_hit_rate", "request_hit_rate")

# In percent; computed by other code than this project's, from the public files of the same names.
UNBOUNDED = {
    "mooncake_conversation_trace": (36.64, 37.36, 40.94),
    "mooncake_synthetic_trace": (63.96, 65.12, 43.15),
}
LRU = {
    "mooncake_conversation_trace": {1000: 4.45, 10_000: 21.16, 30_000: 32.57, 50_000: 35.46, 100_000: 36.37},
    "mooncake_synthetic_trace": {1000: 8.41, 10_000: 42.39, 30_000: 62.42, 50_000: 63.96},
}
BOUND = {
    "mooncake_conversation_trace": {1000: 19.07, 10_000: 36.64},
    "mooncake_synthetic_trace": {1000: 27.67, 10_000: 61.80, 30_000: 63.96},
}
KNOWN = sorted(UNBOUNDED.keys() & FOUND.keys())

if KNOWN:  # beside what is checked everywhere, on made-up traffic, below

    @pytest.mark.parametrize("name", KNOWN)
    def test_published_rates_of_an_unbounded_cache(name):
        row = simulate(traffic(name)).row
        assert [100 * row[rate] for rate in RATES] == pytest.approx(UNBOUNDED[name], abs=0.006)
        if name == "mooncake_conversation_trace":
            assert traffic(name).num_blocks.sum() == 288_500
            assert traffic(name).num_unique_blocks == 182_790

    @pytest.mark.parametrize(("name", "blocks"), [(name, blocks) for name in KNOWN for blocks in LRU[name]])
    def test_published_rates_of_lru(name, blocks):
        rate = simulate(traffic(name), f"{blocks} blocks").row["block_hit_rate"]
        assert 100 * rate == pytest.approx(LRU[name][blocks], abs=0.006)

    @pytest.mark.parametrize(("name", "blocks"), [(name, blocks) for name in KNOWN for blocks in BOUND[name]])
    def test_published_rates_of_the_bound(name, blocks):
        rate = simulate(traffic(name), f"{blocks} blocks", policy="belady").row["block_hit_rate"]
        assert 100 * rate == pytest.approx(BOUND[name][blocks], abs=0.006)


def plain_unbounded(some):
    """The three rates, prompt by prompt, of a cache that forgets nothing."""
    seen, found_blocks, found_tokens, shares = set(), 0, 0, []
    for request in some.requests:
        hit = 0
        while hit < len(request.block_ids) and request.block_ids[hit] in seen:
            hit += 1
        seen.update(request.block_ids)
        tokens = min(hit * some.block_tokens, request.num_tokens)
        found_blocks, found_tokens = found_blocks + hit, found_tokens + tokens
        shares.append(tokens / request.num_tokens)
    blocks = sum(len(request.block_ids) for request in some.requests)
    tokens = sum(request.num_tokens for request in some.requests)
    return found_blocks / blocks, found_tokens / tokens, sum(shares) / len(shares)


def plain_lru(some, capacity):
    """Hits per prompt of an LRU cache; a stamp per block, the oldest looked for in a heap."""
    clock, stamp, heap, hits = 0, {}, [], []

    def use(block):
        nonlocal clock
        clock += 1
        stamp[block] = clock
        heapq.heappush(heap, (clock, block))

    for request in some.requests:
        ids = request.block_ids
        hit = 0
        while hit < len(ids) and ids[hit] in stamp:
            hit += 1
        hits.append(hit)
        for block in ids[:hit]:
            use(block)
        for block in [block for block in ids if block not in stamp]:
            while len(stamp) >= capacity:
                when, oldest = heapq.heappop(heap)
                if stamp.get(oldest) == when:
                    del stamp[oldest]
            use(block)
        for block in reversed(ids):
            if block in stamp:
                use(block)
    return hits


@pytest.mark.parametrize("name", NAMES)
def test_unbounded_rates_equal_a_plain_count(name):
    row = simulate(traffic(name), chunk_tokens=traffic(name).block_tokens).row
    assert [row[rate] for rate in RATES] == pytest.approx(plain_unbounded(traffic(name)), rel=1e-12)
    assert row["block_hit_rate"] == pytest.approx(traffic(name).summary()["reuse"], rel=1e-12)


@pytest.mark.parametrize("share", [0.002, 0.03, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_lru_hits_equal_a_plain_implementation_prompt_by_prompt(name, share):
    some = traffic(name).head(3000)
    capacity = max(int(some.num_unique_blocks * share), 1)
    done = simulate(some, f"{capacity} blocks", chunk_tokens=some.block_tokens)
    assert done.hit_blocks.tolist() == plain_lru(some, capacity)


@pytest.mark.parametrize("name", NAMES)
def test_reuse_distances_equal_a_plain_stack(name):
    some = traffic(name).head(60)
    stack, expected = [], []
    for request in some.requests:
        expected += [stack.index(block) if block in stack else -1 for block in reversed(request.block_ids)]
        for block in reversed(request.block_ids):
            if block in stack:
                stack.remove(block)
            stack.insert(0, block)
    assert reuse_distances(some).tolist() == expected
    rows = reuse_histogram(some)
    assert sum(row["accesses"] for row in rows) == len(expected)
    assert rows[0]["accesses"] == some.num_unique_blocks
    assert sum(row["accesses"] for row in rows[1:] if row["below_blocks"] <= 64) == sum(0 <= d < 64 for d in expected)


@pytest.mark.parametrize("name", NAMES)
def test_distances_predict_what_lru_answers(name):
    """A distance below C is a hit in C blocks."""
    some = traffic(name)
    distances = reuse_distances(some)
    longest = int(some.num_blocks.max())
    for capacity in (longest, 4 * longest, 16 * longest):
        rate = simulate(some, f"{capacity} blocks", chunk_tokens=some.block_tokens).row["block_hit_rate"]
        predicted = float(np.mean((distances >= 0) & (distances < capacity)))
        assert rate == pytest.approx(predicted, abs=1e-12)
