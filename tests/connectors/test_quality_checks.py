"""`quality_check`: hits that are computed instead, and what host memory holds of them against what was computed."""

import logging

import pytest
import torch

from kvlab.chunking import Chunker, Span
from kvlab.connectors import vllm_config
from kvlab.connectors.vllm.metrics import Counters, KVLabStats
from kvlab.connectors.vllm.scheduler.checks import CheckPlanner
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState, SkipReason
from kvlab.connectors.vllm.worker.checks import MOST, errors_of
from kvlab.errors import ConfigError
from tests.connectors.engine import BLOCK, connector, engine, generate, prompt, worker


def test_errors_are_in_units_of_what_differs_between_tokens():
    source = torch.Generator().manual_seed(0)
    kv = torch.randn(3, 4096, 2, 2, 8, generator=source)
    held = kv.clone()
    held[1, ..., 0, :] += 0.5
    held[2, ..., 1, :] = 0.0
    errors = errors_of(kv + 100.0 * torch.arange(8), held + 100.0 * torch.arange(8))  # a constant changes nothing
    assert torch.allclose(errors, torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 1.0]]), atol=0.02)
    held[0, 7, 0, 0, 0] = float("nan")
    assert errors_of(kv, held)[0, 0] == MOST, "no number is as far as can be told"
    assert errors_of(torch.ones_like(kv), kv).min() == MOST, "nothing differs between these tokens"
    assert not errors_of(torch.ones_like(kv), torch.ones_like(kv)).any()


def test_comparisons_are_told_one_by_one():
    counters = Counters()
    for errors in ({"k": 0.1, "v": 0.2}, {"k": 0.3, "v": 0.4}):
        counters.checked(errors)
    told = counters.take_increments()
    assert told.aggregate(KVLabStats({"checks": [{"k": 1.0, "v": 1.0}], "quality_checks": 1})).data == {
        "quality_checks": 3,
        "checks": [{"k": 0.1, "v": 0.2}, {"k": 0.3, "v": 0.4}, {"k": 1.0, "v": 1.0}],
    }
    assert told.reduce() == {"quality_checks": 3}


@pytest.mark.parametrize(("serde", "low", "high"), [("naive", 0.0, 1e-4), ("int8", 1e-4, 0.03)])
def test_hits_are_computed_and_what_is_held_is_compared(serde, low, high, expected, caplog):
    with engine([f"memory://?size=64MiB&serde={serde}"], quality_check=1.0) as llm:
        scheduler = connector(llm).scheduler
        for length in (90, 300):
            generate(llm, [prompt(length)])
            answer = generate(llm, [prompt(length)])[0]
            assert (answer.hit, answer.row["miss"]) == (0, "quality_check")
            assert answer.tokens == expected(prompt(length))
            assert set(answer.row["quality"]) == {"k", "v"}
            assert all(low <= error <= high for error in answer.row["quality"].values()), answer.row
        assert scheduler.counters["quality_checks"] == 3, "the second prompt begins with a chunk of the first"
        scheduler.saves.checks._share = 0.0
        assert generate(llm, [prompt(300)])[0].hit == 299, "what is compared stays"

        scheduler.saves.checks._share = 1.0
        caplog.set_level(logging.WARNING, "vllm.kvlab")
        held = {slot for entry in scheduler.index._entries.values() for slot in entry.slots}
        arena = worker(llm).transfer.arena
        arena[sorted(held)] = arena[sorted(held)].flip(0)  # another block's KV
        for _ in range(2):
            answer = generate(llm, [prompt(300)])[0]
            assert answer.tokens == expected(prompt(300))
            assert max(answer.row["quality"].values()) > 0.5
        told = [record.getMessage() for record in caplog.records if "host memory differs" in record.getMessage()]
        assert len(told) == 1, "one warning"
        assert not connector(llm).hook_errors


def test_a_share_is_checked_and_others_are_served(monkeypatch):
    with engine(["memory://?size=64MiB&serde=int8"], quality_check=0.25) as llm:
        generate(llm, [prompt(300)])
        drawn = iter([0.9, 0.24, 0.25])
        monkeypatch.setattr("kvlab.connectors.vllm.scheduler.checks.random.random", lambda: next(drawn))
        assert [generate(llm, [prompt(300)])[0].hit for _ in range(3)] == [299, 0, 299]


def test_a_request_is_drawn_once_and_what_is_drawn_stays_so(monkeypatch):
    drawn = iter([0.9, 0.1])
    monkeypatch.setattr("kvlab.connectors.vllm.scheduler.checks.random.random", lambda: next(drawn))
    planner = CheckPlanner(0.5, Chunker(64, BLOCK), None, None)
    whole, partial = ObjectRef(Span(2, 4), b"a", 128, True), ObjectRef(Span(4, 5), b"b", 130, True)
    served, chosen = RequestState(None, {}), RequestState(None, {})
    elsewhere = ObjectRef(Span(2, 4), b"a", 128, False)
    for plan, computed in (([partial], 0), ([elsewhere], 0), ([whole], 96)):
        assert not planner.takes(served, plan, computed), "nothing that the request computes in full is held"
    assert [planner.takes(served, [whole], 64) for _ in range(2)] == [False, False]
    assert [planner.takes(chosen, [whole, partial], 64) for _ in range(2)] == [True, True]
    assert (chosen.check, chosen.skip) == (whole, SkipReason.QUALITY_CHECK)
    inexact = RequestState(None, {}, is_exact=False)
    assert not planner.takes(inexact, [whole], 0), "it may be computed from what was decoded"


def test_what_cannot_be_compared_is_refused(monkeypatch):
    from kvlab.connectors.vllm import pages
    from kvlab.paged import Opaque

    with pytest.raises(ConfigError, match="quality_check compares what host memory holds: give memory://"):
        vllm_config(["file:///nowhere?size=1GiB"], quality_check=0.1)
    with pytest.raises(ConfigError, match="quality_check must be a number from 0 to 1, got 2"):
        vllm_config(quality_check=2)
    monkeypatch.setattr(pages, "understand", lambda scratch: Opaque("its swizzle"))
    told = pytest.raises(ConfigError, match="quality_check compares K and V, and these pages are opaque: its swizzle")
    with told, engine(["memory://?size=64MiB"], quality_check=0.1):
        pass
