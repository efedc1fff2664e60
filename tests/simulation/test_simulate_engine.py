"""The simulator and the real engine: the same prompts, policy and capacity give the same hits, object by object."""

import pytest
import torch

from kvlab import CacheEngine, Chunker
from kvlab.simulation.generate import generate_traffic
from kvlab.simulation.simulate import simulate
from kvlab.simulation.traffic import prompts_of_traffic, traffic_of_prompts
from kvlab.stores.disk import DiskStore
from kvlab.stores.eviction import POLICIES
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore

BLOCK = 4
SPAN = 8192  # bytes of arena any object here takes: a header page and less than a page of KV


@pytest.fixture(scope="module", params=["chat", "agent"])
def prompts(request):
    some = generate_traffic(request.param, 70, reuse=0.6, seed=5, block_tokens=64)
    tokens = prompts_of_traffic(some)
    return [prompt[: len(prompt) // 24] for prompt in tokens]  # the same shapes, shorter; prefixes stay shared


def served(store, prompts, chunk_tokens):
    """Per prompt: tokens the engine loaded, and in how many objects."""
    engine = CacheEngine(store, namespace="m", chunker=Chunker(chunk_tokens, BLOCK))
    tokens, loads = [], []
    for prompt in prompts:
        before = engine.counters.hits
        num_tokens, kv = engine.load(prompt)
        assert (0 if kv is None else kv.shape[1]) == num_tokens
        tokens.append(num_tokens)
        loads.append(engine.counters.hits - before)
        engine.save(prompt, torch.zeros(1, len(prompt), 1, 2, 2, dtype=torch.bfloat16))
    return tokens, loads


@pytest.mark.parametrize("chunk_tokens", [BLOCK, 4 * BLOCK])
@pytest.mark.parametrize("objects", [7, 60, 400])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_same_hits_and_evictions_as_the_engine(prompts, policy, objects, chunk_tokens):
    store = MemoryStore(objects * SPAN, policy=policy)
    tokens, loads = served(store, prompts, chunk_tokens)
    done = simulate(
        traffic_of_prompts(prompts, block_tokens=BLOCK),
        objects * SPAN,
        policy=policy,
        chunk_tokens=chunk_tokens,
        object_bytes=lambda num_tokens: SPAN,
    )
    assert (done.hit_blocks * BLOCK).tolist() == tokens
    assert done.hit_tokens.tolist() == tokens
    assert done.tiers[0]["tier_loads"] == sum(loads)
    assert done.tiers[0]["tier_puts"] == store.counters.puts
    assert done.tiers[0]["tier_evictions"] == store.counters.evictions
    assert objects < 400 or sum(tokens) > 0  # of a prompt longer than the cache nothing is left when it returns


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_same_hits_as_a_stack_of_tiers(prompts, policy):
    stores = [MemoryStore(25 * SPAN, policy=policy), MemoryStore(150 * SPAN, policy=policy)]
    tokens, _ = served(TieredStore(stores), prompts, 2 * BLOCK)
    done = simulate(
        traffic_of_prompts(prompts, block_tokens=BLOCK),
        [25 * SPAN, 150 * SPAN],
        policy=policy,
        chunk_tokens=2 * BLOCK,
        object_bytes=lambda num_tokens: SPAN,
    )
    assert done.hit_tokens.tolist() == tokens
    assert sum(tokens) > 0
    for row, store in zip(done.tiers, stores, strict=True):
        assert (row["tier_loads"], row["tier_puts"]) == (store.counters.hits, store.counters.puts)
        assert row["tier_evictions"] == store.counters.evictions


def test_same_hits_where_objects_differ_in_size(prompts, tmp_path):
    """A folder packs without gaps, so that bytes alone decide."""
    size_of = {}
    for blocks in range(1, 5):
        probe = MemoryStore(1 << 20)
        kv = torch.zeros(1, blocks * BLOCK, 4, 2, 64, dtype=torch.bfloat16)
        CacheEngine(probe, namespace="m", chunker=Chunker(4 * BLOCK, BLOCK)).save(list(range(blocks * BLOCK)), kv)
        size_of[blocks * BLOCK] = probe.counters.put_bytes
    assert len(set(size_of.values())) == 4
    capacity = 50 * size_of[4 * BLOCK]
    with DiskStore(tmp_path / "kv", capacity, policy="lru") as store:
        engine = CacheEngine(store, namespace="m", chunker=Chunker(4 * BLOCK, BLOCK))
        tokens = []
        for prompt in prompts:
            tokens.append(engine.load(prompt)[0])
            engine.save(prompt, torch.zeros(1, len(prompt), 4, 2, 64, dtype=torch.bfloat16))
    done = simulate(
        traffic_of_prompts(prompts, block_tokens=BLOCK),
        capacity,
        chunk_tokens=4 * BLOCK,
        object_bytes=size_of.__getitem__,
    )
    assert done.hit_tokens.tolist() == tokens
    assert done.row["evictions"] > 0
    assert sum(tokens) > 0
