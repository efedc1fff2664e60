"""Questions to secondary tiers: who waits for the answer, and what is learned from one that nobody waited for."""

from collections import Counter

import pytest

from kvlab.chunking import Chunker
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.messages import WorkerReport
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.lookup import KEPT_KEYS, KnownSecondary, Lookup
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.connectors.vllm.scheduler.saves import Write
from kvlab.connectors.vllm.scheduler.scheduler import Scheduler
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.hashing import Namespace
from kvlab.stores.memory import MemoryStore
from tests.support.gate import Gate

NAMESPACE = Namespace("model")
CHUNKS = [bytes([at]) * 32 for at in range(16)]  # hashes of one chunk of 16 blocks


@pytest.fixture
def asked():
    gate, admission, known_secondary = Gate(MemoryStore(1 << 20)), LoadAdmission(), KnownSecondary()
    gate.inner.put(NAMESPACE.key(CHUNKS[-1]), b"kv")
    lookup = Lookup(gate, Chunker(), [NAMESPACE], 60.0, admission, known_secondary, Counter())

    def ask(state: RequestState, num_tokens: int = 256):
        return lookup.ask(state, None, lambda key: False, num_tokens)

    yield gate, admission, known_secondary, ask
    gate.is_open.set()
    lookup.close()


def state() -> RequestState:
    return RequestState(request=None, extras={}, hashes=list(CHUNKS))


def finish(one: RequestState) -> None:
    one.lookup.result(timeout=20)


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
    assert not one.not_awaited


def test_as_long_as_nothing_is_known_a_request_waits(asked):
    gate, _, _, ask = asked
    one = state()
    assert ask(one) is None
    assert ask(one) is None
    gate.is_open.set()
    finish(one)
    assert ask(one)[CHUNKS[-1]] is True


def test_who_would_win_little_does_not_wait_and_all_the_same_the_answer_counts(asked):
    gate, admission, known_secondary, ask = asked
    knows(admission, prefill_s=0.016, held=False)
    one, long, other = state(), state(), state()
    assert ask(one) == {}, "one in 66 of 8 ms, against a step of 8 ms"
    assert one.not_awaited
    assert ask(long, 100_000) is None, "one in 66 of 3 s"
    assert not long.not_awaited
    gate.is_open.set()
    finish(one)
    finish(long)
    ask(other)
    assert CHUNKS[-1] in known_secondary, "what is there is not saved again"
    assert CHUNKS[0] not in known_secondary
    assert sum(admission._answers) == 2


def test_a_busy_engine_waits_again_once_answers_are_hits(asked):
    _, admission, _, ask = asked
    knows(admission, prefill_s=0.024, held=True)
    assert ask(state()) is None


def test_what_is_held_below_is_the_latest_word():
    known_secondary = KnownSecondary()
    known_secondary.learn([b"a", b"b", b"c"], {b"a": True, b"b": True, b"c": False})
    assert [key in known_secondary for key in (b"a", b"b", b"c")] == [True, True, False]
    known_secondary.add(b"d")
    known_secondary.learn([b"a", b"c", b"d"], {b"a": False, b"c": True})  # not asked of d, which lies behind a
    known_secondary.discard(b"never seen")
    assert [key in known_secondary for key in (b"a", b"b", b"c", b"d")] == [False, True, True, False]


def test_of_what_is_held_below_the_latest_is_kept():
    known_secondary = KnownSecondary()
    for number in range(KEPT_KEYS):
        known_secondary.add(number.to_bytes(4, "big"))
    known_secondary.add((0).to_bytes(4, "big"))  # seen again
    known_secondary.add(b"new")
    assert (0).to_bytes(4, "big") in known_secondary
    assert (1).to_bytes(4, "big") not in known_secondary
    assert b"new" in known_secondary


def test_what_one_rank_could_not_hand_on_is_not_held_below():
    ranks = [Namespace("model", {"rank": rank}) for rank in range(2)]
    scheduler = Scheduler(
        ConnectorConfig(tiers=("memory://?size=1MiB", "redis://none")), Chunker(), KVGroups((None,), 16), SlotIndex(8),
        MemoryStore(1 << 20), ranks, lambda loads: set(), at_once=False,
    )  # fmt: skip
    for first_refuses in (True, False, True):
        entry = scheduler.index.reserve(CHUNKS[0], 1)
        scheduler.index.lease(entry)
        scheduler.saves.unsettled[entry.generation] = Write(entry, "", 2)
        for rank in range(2):
            report = WorkerReport(settled=Counter([entry.generation]))
            if first_refuses and rank == 0:
                report.refused.add(entry.generation)
            assert entry.leases == 1
            scheduler.absorb(report)
        assert entry.leases == 0
        assert (CHUNKS[0] in scheduler._known_secondary) is not first_refuses
        scheduler._known_secondary.discard(CHUNKS[0])
        scheduler.index.drop(entry)
    scheduler.close()
