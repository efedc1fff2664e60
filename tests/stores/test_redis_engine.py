"""Whatever Redis does, the engine answers with the right KV or with a miss that has a reason."""

import threading
import time

import pytest
import torch
from servers import Server, running, wait_for

from kvlab.chunking import Chunker
from kvlab.engine import CacheEngine
from kvlab.stores import open_store, open_stores
from kvlab.stores.redis.replies import name_of
from kvlab.stores.wrappers import WrapperStore

TOKENS = list(range(1000, 1128))


@pytest.fixture(scope="module")
def kv():
    """(layers, tokens, kv_heads, kv, head_dim) of 128 tokens."""
    return torch.randn(2, 128, 2, 2, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.fixture
def server(tmp_path):
    with running(Server(tmp_path / "s", "maxmemory 100mb")) as (server,):
        yield server


def engine_on(store):
    return CacheEngine(store, namespace="test-model", chunker=Chunker(chunk_tokens=32, block_tokens=16))


def check(engine, kv):
    """Retrieve: the longest prefix or less, never anything wrong. The number of tokens."""
    num_tokens, got = engine.load(TOKENS)
    assert (got is None) == (num_tokens == 0)
    assert got is None or torch.equal(got, kv[:, :num_tokens])
    return num_tokens


def test_through_death_and_return(server, kv):
    with open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=200&retry_ms=20&longest_retry_ms=50") as store:
        engine = engine_on(store)
        assert engine.save(TOKENS, kv) == 128
        assert check(engine, kv) == 128
        server.kill()
        for _ in range(5):
            assert check(engine, kv) == 0
            assert engine.save(TOKENS, kv) == 0
        assert store.errors["unreachable"] + store.errors["disconnected"] > 0
        server.start()
        wait_for(lambda: engine.save(TOKENS, kv) == 128, "the engine to store again")
        assert check(engine, kv) == 128


class OutOfStep(WrapperStore):
    """Every read gives the value that was asked for two reads before, as on a connection with stray replies, until it
    is renewed."""

    def __init__(self, inner):
        super().__init__(inner)
        self.late = None

    def get(self, key):
        if self.late is None:
            return self.inner.get(key)
        self.late.append(self.inner.get(key))
        return self.late.pop(0)

    def renew(self):
        self.late = None


def test_a_connection_out_of_step_costs_nothing(kv):
    store = OutOfStep(open_store("memory://?size=1MiB"))
    engine = engine_on(store)
    assert engine.save(TOKENS, kv) == 128
    store.late = [b"of nobody", b"of nobody"]
    assert check(engine, kv) == 128
    assert store.contains_many(list(engine.lookup(TOKENS).keys)) == [True] * 4
    assert engine.stats()["misses"] == 0


def test_killed_and_restarted_in_the_middle(server, kv):
    with open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=200&retry_ms=10&longest_retry_ms=20") as store:
        engine = engine_on(store)
        done = threading.Event()

        def upset():
            for _ in range(4):
                time.sleep(0.15)
                server.kill()
                time.sleep(0.05)
                server.start()
            done.set()

        thread = threading.Thread(target=upset)
        thread.start()
        lengths = []
        while not done.is_set():
            engine.save(TOKENS, kv)
            lengths.append(check(engine, kv))
        thread.join()
        wait_for(lambda: engine.save(TOKENS, kv) == 128, "the engine to store again")
        assert check(engine, kv) == 128
        assert max(lengths) == 128


def test_paused_beyond_the_deadline(server, kv):
    with open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=100&retry_ms=50&longest_retry_ms=100") as store:
        engine = engine_on(store)
        wait_for(lambda: engine.save(TOKENS, kv) == 128, "the engine to store")
        before = store.errors["timeout"]
        with server.paused():  # for as long as the calls take
            assert check(engine, kv) == 0
            assert store.errors["timeout"] > before
        wait_for(lambda: check(engine, kv) == 128, "the hits to come back")


def test_overwritten_by_garbage_or_by_another_object(server, kv):
    with open_store(f"redis://127.0.0.1:{server.port}") as store, server.client() as client:
        engine = engine_on(store)
        damages = [
            lambda raw, other: b"garbage",
            lambda raw, other: b"",
            lambda raw, other: raw[:-5],
            lambda raw, other: raw[:-1] + bytes([raw[-1] ^ 1]),
            lambda raw, other: other,
            lambda raw, other: (1 << 60).to_bytes(8, "little") + raw[8:],
        ]
        for damage in damages:
            store.clear()
            engine.save(TOKENS, kv)
            keys = engine.lookup(TOKENS).keys
            raw, other = client.get(name_of(keys[1])), client.get(name_of(keys[0]))
            client.set(name_of(keys[1]), damage(raw, other))
            assert check(engine, kv) == 32
            assert not store.contains(keys[1])
        reasons = engine.counters.misses
        assert {"truncated", "checksum", "wrong_key", "corrupt"} <= reasons.keys()
        assert store.counters.dropped == len(damages)


def test_full_with_and_without_eviction(tmp_path, kv):
    with (
        running(Server(tmp_path / "full", "maxmemory 3mb", "maxmemory-policy allkeys-lru")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}") as store,
        server.client() as client,
    ):
        engine = engine_on(store)
        for index in range(200):
            engine.save([index, *TOKENS[1:]], kv)
        engine.save(TOKENS, kv)
        assert check(engine, kv) > 0
        assert client.info("stats")["evicted_keys"] > 0
        client.config_set("maxmemory-policy", "noeviction")
        for index in range(1000, 1200):
            engine.save([index, *TOKENS[1:]], kv)
        assert store.errors["maxmemory"] > 0
        assert engine.counters.save_failures["no_room"] == store.errors["maxmemory"]
        check(engine, kv)


@pytest.mark.parametrize("user", [":wrong", ""])
def test_wrong_password(tmp_path, kv, user):
    with (
        running(Server(tmp_path / "closed", "requirepass secret")) as (server,),
        open_store(f"redis://{user}@127.0.0.1:{server.port}") as store,
    ):
        engine = engine_on(store)
        assert engine.save(TOKENS, kv) == 0
        assert check(engine, kv) == 0
        assert store.errors["auth"] + store.errors["noauth"] >= 1


def test_beneath_a_memory_tier_nothing_is_felt(server, kv, tmp_path):
    tail = f"redis://127.0.0.1:{server.port}?timeout_ms=200&retry_ms=20&longest_retry_ms=50"
    with open_stores(["memory://?size=64MiB", f"file://{tmp_path}/kv?size=64MiB", tail]) as store:
        engine = engine_on(store)
        server.kill()
        assert engine.save(TOKENS, kv) == 128
        assert check(engine, kv) == 128
        rows = {row["tier"]: row for row in store.rows()}
        assert (rows["memory"]["up"], rows["disk"]["up"], rows["redis"]["up"]) == (1, 1, 0)
        assert engine.lookup(list(range(64))).miss == "tier_down"


def test_two_engines_share_what_one_computed(server, kv, tmp_path):
    for urls in ([f"redis://127.0.0.1:{server.port}"], [f"file://{tmp_path}/kv"]):
        with open_stores(urls) as one, open_stores(urls) as two:
            assert engine_on(one).save(TOKENS, kv) == 128
            assert check(engine_on(two), kv) == 128
