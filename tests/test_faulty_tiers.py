"""Whatever a store of another package raises or answers is a miss, which is counted, and reaches no caller."""

import pytest
import torch

from kvlab import CacheEngine
from kvlab.errors import StoreError
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.stores.wrappers import FaultStore

IDS = list(range(64))
KV = torch.zeros(2, 64, 1, 2, 4, dtype=torch.bfloat16)
ERRORS = [RuntimeError("planted"), StoreError("planted", reason="eio")]
METHODS = "put get get_into get_pieces get_head size_of contains_many delete keys touch renew quarantine why_missing"


def failing(error):
    def fail(*_args):
        raise error

    return fail


def is_quiet(engine):
    """Every call of an engine gives an answer."""
    ids = [*IDS, 99]
    assert engine.save(ids, torch.zeros(2, 65, 1, 2, 4)) in (0, 64)
    hit = engine.lookup(ids)
    assert hit.num_tokens in (0, 64)
    assert engine.load(ids)[0] in (0, 64)
    assert isinstance(engine.why_missing(ids), str)
    assert engine.contains_many(engine.hashes(ids)) in ([False] * 4, [True] * 4, [False, False, False, True])
    out = torch.zeros(2, 64, 1, 2, 4)
    key = engine.namespace.key(engine.hashes(ids)[-1])
    engine.load_object(key, out, axes=("layers", "tokens", "kv_heads", "kv", "head_dim"), first_token=0, end_token=64)
    assert engine.differing_fields(key) == []
    assert all(isinstance(count, int | float) for count in engine.stats().values())


@pytest.mark.parametrize("error", ERRORS, ids=["bug", "medium"])
@pytest.mark.parametrize("method", METHODS.split())
def test_a_method_that_raises(method, error):
    store = MemoryStore(1 << 20)
    engine = CacheEngine(store, namespace="model")
    setattr(store, method, failing(error))
    is_quiet(engine)
    store.clear = lambda: None
    stack = TieredStore([MemoryStore(1 << 20), store], first_wait_s=0, longest_wait_s=0)
    engine = CacheEngine(stack, namespace="model")
    is_quiet(engine)
    stack.tiers[0].store.clear()
    is_quiet(engine)


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("answer", [None, [True], [True] * 9, 5])
def test_an_answer_that_is_not_one_for_each_key(answer, is_stacked):
    store = MemoryStore(1 << 20)
    engine = CacheEngine(store, namespace="model")
    engine.save(IDS, KV)
    store.contains_many = lambda _keys: answer
    if is_stacked:
        stack = TieredStore([MemoryStore(1 << 20), store], first_wait_s=0, longest_wait_s=0)
        engine = CacheEngine(stack, namespace="model")
        assert stack.contains_many(["a", "b"]) == [False, False]
        assert stack.rows()[1]["failures"] == 1
    assert engine.lookup(IDS).num_tokens == 0
    if not is_stacked:
        assert sum(engine.counters.tier_failures.values()) == 1
    assert engine.save(IDS, KV) == 64


@pytest.mark.parametrize("error", ERRORS, ids=["bug", "medium"])
def test_failures_are_counted_by_call_and_reason_and_told_once(error, caplog):
    reason = {RuntimeError: "error", StoreError: "eio"}[type(error)]
    store = MemoryStore(1 << 20)
    engine = CacheEngine(store, namespace="model")
    for method in ("put", "contains_many", "touch", "why_missing"):
        setattr(store, method, failing(error))
    assert engine.save(IDS, KV) == engine.save(IDS, KV) == 0
    assert engine.lookup(IDS).miss == f"tier_{reason}"
    assert engine.counters.save_failures == {f"tier_{reason}": 2}
    assert engine.counters.tier_failures == {
        f"lookup_{reason}": 3,
        f"touch_{reason}": 3,
        f"why_missing_{reason}": 1,
    }
    assert caplog.text.count("lookup in tier memory failed: planted") == 1
    assert caplog.text.count("was not saved") == 1


def test_why_missing_over_a_tier_that_lists_no_keys():
    engine = CacheEngine(FaultStore(MemoryStore(1 << 20), fail=1.0), namespace="model")
    assert engine.why_missing(IDS) == "never_stored"
    assert sum(count for what, count in engine.counters.tier_failures.items() if what.startswith("keys")) == 1


class Unsized(MemoryStore):
    @property
    def max_bytes(self):
        raise RuntimeError("planted")

    @max_bytes.setter
    def max_bytes(self, _value):
        pass


def test_a_stack_counts_the_budgets_that_tiers_tell():
    stack = TieredStore([MemoryStore(1 << 20), Unsized(1 << 20)])
    assert stack.max_bytes == 1 << 20
    assert stack.stats()["max_bytes"] == 1 << 20


@pytest.mark.parametrize("answer", ["text", 5])
def test_a_value_that_is_no_bytes_is_a_miss_in_a_stack(answer):
    store = MemoryStore(1 << 20)
    store.get = lambda _key: answer
    store.get_head = lambda _key, _num_bytes: answer
    stack = TieredStore([store, MemoryStore(1 << 20)], first_wait_s=0, longest_wait_s=0)
    stack.tiers[1].store.put("k", b"value")
    assert bytes(stack.get("k")) == b"value"
    assert bytes(stack.get_head("k", 3)) == b"val"


def test_a_tier_that_cannot_be_closed_leaves_no_other_open(caplog):
    closed = []
    upper, lower = MemoryStore(1 << 20), MemoryStore(1 << 20)
    upper.close = failing(RuntimeError("planted"))
    lower.close = lambda: closed.append(lower)
    TieredStore([upper, lower]).close()
    assert closed == [lower]
    assert "planted" in caplog.text
