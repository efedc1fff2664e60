"""Questions to secondary tiers: who waits for the answer, and what is learned from one that nobody waited for."""

import time
from collections import Counter

import pytest

from kvlab.chunking import Chunker
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.messages import WorkerReport
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.lookup import Lookup
from kvlab.connectors.vllm.scheduler.requests import RequestState, SkipReason
from kvlab.connectors.vllm.scheduler.residency import KEPT_KEYS, LatestKeys, Residency, Where
from kvlab.connectors.vllm.scheduler.saves import Write
from kvlab.connectors.vllm.scheduler.scheduler import Scheduler
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.hashing import Namespace
from kvlab.stores.memory import MemoryStore
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Opening
from tests.support.gate import Gate
from tests.support.tiers import workers_in_threads

NAMESPACE = Namespace("model")
CHUNKS = [bytes([at]) * 16 for at in range(16)]  # hashes of one chunk of 16 blocks


@pytest.fixture
def asked():
    gate, admission = Gate(MemoryStore(1 << 20)), LoadAdmission()
    residency = Residency(SlotIndex(8), keeps_memory=True)
    gate.inner.put(NAMESPACE.key(CHUNKS[-1]), b"kv")
    with workers_in_threads(gate):
        tiers = TierClient(Opening([], "naive", None, [{"model": "model", "fields": {}}]))
    lookup = Lookup(tiers, Chunker(), 60.0, admission, residency, Counter())

    def ask(state: RequestState, num_tokens: int = 256):
        state.tiers = tiers
        return lookup.ask(state, None, num_tokens)

    yield gate, admission, residency, ask
    gate.is_open.set()
    tiers.close()


def state() -> RequestState:
    return RequestState(request=None, extras={}, hashes=list(CHUNKS))


def finish(one: RequestState) -> None:
    deadline = time.monotonic() + 20
    while not one.lookup.is_answered:
        assert time.monotonic() < deadline
        one.tiers.wait(0.01)


def knows(admission: LoadAdmission, *, prefill_s: float, held: bool) -> None:
    """A busy engine whose step takes 8 ms, and whose tiers held all that was asked for lately, or nothing."""
    admission.forward(0, 0.008)
    admission.forward(256, prefill_s)
    admission.is_busy = True
    for _ in range(64):
        admission.answered(held=held)


def test_an_answer_in_time_is_taken(asked):
    gate, _, _, ask = asked
    gate.is_open.set()
    one = state()
    while (known := ask(one)) is None:
        finish(one)
    assert known[CHUNKS[-1]] is True
    assert one.skip is None


def test_what_a_store_raises_reaches_no_scheduler(asked, monkeypatch):
    gate, _, _, ask = asked

    class Panic(BaseException):
        pass

    def panic(keys):
        raise Panic("planted")

    monkeypatch.setattr(gate, "contains_many", panic)
    one = state()
    while (known := ask(one)) is None:
        finish(one)
    assert known == {}


def answered(ask, one):
    while (known := ask(one)) is None:
        finish(one)
    return known


def test_the_answer_says_why_an_object_is_missing(asked, monkeypatch):
    gate, _, _, ask = asked
    gate.is_open.set()
    monkeypatch.setattr(gate, "why_missing", lambda key: "evicted" if key == NAMESPACE.key(CHUNKS[-1]) else "wrong key")
    gate.inner.delete(NAMESPACE.key(CHUNKS[-1]))
    one = state()
    answered(ask, one)
    assert one.missing == {CHUNKS[-1]: "evicted"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), ValueError("x")])
def test_a_reason_that_cannot_be_had_costs_no_hit(asked, monkeypatch, error):
    gate, _, _, ask = asked
    gate.is_open.set()
    gate.inner.delete(NAMESPACE.key(CHUNKS[-1]))
    gate.inner.put(NAMESPACE.key(CHUNKS[3]), b"kv")

    def fail(key):
        raise error

    monkeypatch.setattr(gate, "why_missing", fail)
    one = state()
    assert answered(ask, one)[CHUNKS[3]] is True
    assert one.missing == {CHUNKS[-1]: f"raised_{type(error).__name__}"}


def test_as_long_as_nothing_is_known_a_request_waits(asked):
    gate, _, _, ask = asked
    one = state()
    assert ask(one) is None
    assert ask(one) is None
    gate.is_open.set()
    finish(one)
    assert ask(one)[CHUNKS[-1]] is True


def test_who_would_win_little_does_not_wait_and_all_the_same_the_answer_counts(asked):
    gate, admission, residency, ask = asked
    knows(admission, prefill_s=0.016, held=False)
    one, long = state(), state()
    assert ask(one) == {}, "one in 66 of 8 ms, against a step of 8 ms"
    assert one.skip is SkipReason.NOT_WORTH_WAITING
    assert ask(long, 100_000) is None, "one in 66 of 3 s"
    assert long.skip is None
    gate.is_open.set()
    finish(one)
    finish(long)
    assert residency.is_written(CHUNKS[-1]), "what is there is not saved again"
    assert not residency.is_written(CHUNKS[0])
    assert sum(admission._answers) == 2


def test_a_busy_engine_waits_again_once_answers_are_hits(asked):
    _, admission, _, ask = asked
    knows(admission, prefill_s=0.024, held=True)
    assert ask(state()) is None


def test_the_latest_answer_says_what_is_written():
    residency = Residency(SlotIndex(8), keeps_memory=True)
    residency.learn([b"a", b"b", b"c"], {b"a": True, b"b": True, b"c": False})
    assert [residency.is_written(key) for key in (b"a", b"b", b"c")] == [True, True, False]
    residency.written(b"d")
    residency.learn([b"a", b"c", b"d"], {b"a": False, b"c": True})  # not asked of d, which lies behind a
    assert [residency.is_written(key) for key in (b"a", b"b", b"c", b"d")] == [False, True, True, False]


def test_the_latest_keys_are_kept():
    keys = LatestKeys()
    for number in range(KEPT_KEYS):
        keys.add(number.to_bytes(4, "big"))
    keys.add((0).to_bytes(4, "big"))  # seen again
    keys.add(b"new")
    keys.discard(b"never seen")
    assert (0).to_bytes(4, "big") in keys
    assert (1).to_bytes(4, "big") not in keys
    assert b"new" in keys


@pytest.mark.parametrize("keeps_memory", [True, False])
def test_where_an_object_is(keeps_memory):
    index = SlotIndex(8)
    residency = Residency(index, keeps_memory=keeps_memory)
    answer = {b"a": True, b"corrupt": True, b"pending": True}
    assert residency.where(b"a", answer) is Where.SECONDARY
    assert residency.where(b"a", {}) is residency.where(b"b", answer) is Where.MISSING
    entry = index.reserve(b"pending", 1, ready=False)
    assert residency.where(b"pending", answer) is Where.PENDING
    entry.ready = True
    assert residency.where(b"pending", answer) is (Where.MEMORY if keeps_memory else Where.SECONDARY)
    residency.written(b"corrupt")
    residency.corrupt(b"corrupt")
    assert residency.where(b"corrupt", answer) is Where.CORRUPT
    assert not residency.is_written(b"corrupt"), "it is written again"
    residency.written(b"corrupt")
    assert residency.where(b"corrupt", answer) is Where.SECONDARY
    residency.clear()
    assert len(index) == 0
    assert not residency.is_written(b"corrupt")


def test_what_one_rank_could_not_hand_on_is_not_held_below():
    with workers_in_threads(MemoryStore(1 << 20)):
        tiers = TierClient(
            Opening([], "naive", None, [{"model": "model", "fields": {"rank": rank}} for rank in range(2)])
        )
    scheduler = Scheduler(
        ConnectorConfig(tiers=("memory://?size=1MiB", "redis://none")), Chunker(), KVGroups((None,), 16), SlotIndex(8),
        tiers, 2, lambda loads: set(), at_once=False,
    )  # fmt: skip
    for first_refuses in (True, False, True):
        entry = scheduler.index.reserve(CHUNKS[0], 1)
        scheduler.index.lease(entry)
        scheduler.saves.in_flight[entry.generation] = Write(entry, "", 2)
        for rank in range(2):
            report = WorkerReport(written=Counter([entry.generation]))
            if first_refuses and rank == 0:
                report.failed_writes.add(entry.generation)
            assert entry.leases == 1
            scheduler.absorb(report)
        assert entry.leases == 0
        assert scheduler.residency.is_written(CHUNKS[0]) is not first_refuses
        scheduler.residency.learn(CHUNKS[:1], {})
        scheduler.index.drop(entry)
    tiers.close()
