"""Why a request was not served in full, in its row: what was lost, and what the tiers could not say or do in time."""

from collections import Counter
from types import SimpleNamespace

import pytest

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.connectors.vllm.scheduler.misses import count_miss, miss_reason
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.errors import StoreError
from tests.connectors.engine import (
    BLOCK,
    connector,
    drain,
    empty_memory,
    engine,
    generate,
    objects_of,
    text_ids,
    worker,
)
from tests.connectors.models import TOKEN_BYTES
from tests.support.gate import Gate

READS = {"get", "get_into", "get_pieces", "get_head"}
BLOCKS = [bytes([at]) * 16 for at in range(8)]  # hashes of two chunks of four blocks


def reason_of(*, evicted=(), asks=True, **state):
    index = SlotIndex(8)
    index.evicted.update(dict.fromkeys(evicted))
    request = SimpleNamespace(num_tokens=129, all_token_ids=range(129))
    asked = RequestState(request, {}, hints=Hints(), hashes=list(BLOCKS), **state)
    residency = Residency(index, keeps_memory=True)
    return miss_reason(asked, [], Chunker(64, 16), residency, lossy=False, asks=asks)


@pytest.mark.parametrize(
    ("evicted", "said", "reason"),
    [
        ((), None, "not_asked"),
        ((), "never_stored", "never_stored"),
        (BLOCKS[3:4], None, "evicted"),
        (BLOCKS[3:4], "never_stored", "evicted"),
        (BLOCKS[1:2], "never_stored", "evicted"),  # a tail that began with the block
        (BLOCKS[4:], "never_stored", "never_stored"),
        (BLOCKS[3:4], "tier_down", "tier_down"),
        (BLOCKS[3:4], "deleted", "deleted"),
    ],
)
def test_what_the_tiers_say_goes_before_what_memory_has_lost(evicted, said, reason):
    assert reason_of(evicted=evicted, missing={} if said is None else {BLOCKS[3]: said}) == reason


def test_tiers_that_did_not_answer_may_hold_what_memory_has_lost():
    assert reason_of(evicted=BLOCKS[3:4], unanswered=True) == "not_asked"
    assert reason_of(evicted=BLOCKS[3:4], asks=False) == "evicted"


def test_a_request_counts_once_and_its_row_has_the_latest_reason():
    counters, state = Counter(), SimpleNamespace(row={})
    for reason in ("evicted", "load_overdue"):
        count_miss(state, reason, counters)
    assert (counters, state.row) == (Counter(miss_evicted=1), {"miss": "load_overdue"})


class Closed(Gate):
    """Some methods wait, or fail."""

    def __init__(self, inner):
        super().__init__(inner)
        self.waiting, self.failing = set(), set()

    def _around(self, method, num_bytes):
        if method in self.failing:
            raise StoreError("planted", reason="planted")
        if method in self.waiting:
            super()._around(method, num_bytes)


def test_a_row_tells_what_the_tiers_did_not_do_in_time(tmp_path):
    """Memory holds two of the prompts, the tier below all."""
    prompts = [list(text_ids()[150 * at : 150 * at + 150]) for at in range(5)]
    with engine([f"memory://?size={11 * BLOCK * TOKEN_BYTES}", f"file://{tmp_path}?size=64MiB"], in_thread=True) as llm:
        gate = objects_of(llm).store = Closed(objects_of(llm).store)
        lookup = connector(llm).scheduler._lookup

        def ask(at):
            answer = generate(llm, [prompts[at]])[0]
            assert answer.tokens == plain[at]
            return answer.row.get("miss"), answer.hit

        try:
            plain = []
            for tokens in prompts:
                plain.append(generate(llm, [tokens])[0].tokens)
                drain(llm)
            assert ask(0) == (None, 149)
            gate.waiting, patience = {"contains_many"}, lookup._timeout_s
            lookup._timeout_s = -1.0  # late at the first look
            assert [ask(at) for at in (1, 2)] == [("not_asked", 0)] * 2
            gate.is_open.set()
            lookup._timeout_s = patience
            drain(llm)
            assert ask(3) == (None, 149)
            drain(llm)
            gate.is_open.clear()
            gate.waiting, worker(llm)._load_timeout_s = READS, 0.0
            assert [ask(at) for at in (0, 1, 2)] == [("load_overdue", 0), ("load_overdue", 0), ("no_room", 0)]
        finally:
            gate.is_open.set()
        worker(llm)._load_timeout_s = 120.0
        drain(llm)
        assert ask(4) == (None, 149)
        drain(llm)
        empty_memory(llm)
        gate.failing = READS
        assert ask(1) == ("load_failed", 0)
        assert not connector(llm).hook_errors
