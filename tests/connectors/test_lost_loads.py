"""Loads within a step that fail: the step is planned anew, and the engine computes what is not there."""

import pytest

from tests.connectors.engine import connector, drain, empty_memory, engine, generate, prompt, shared, worker

FIRST, OTHER = prompt(300), prompt(300, ending=0)  # the first four of five objects are the same


def another_owner(llm, monkeypatch):
    """The second chunk's slots hold something else."""
    owner = worker(llm)._owner
    second = list(dict.fromkeys(key for key in owner if key is not None))[1]
    for slot, key in enumerate(owner):
        if key == second:
            owner[slot] = -1


def fail_once(target, name, monkeypatch):
    original, calls = getattr(target, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("planted")
        return original(*args)

    monkeypatch.setattr(target, name, failing)


def no_copy(llm, monkeypatch):
    fail_once(worker(llm).transfer, "load", monkeypatch)


def no_plan(llm, monkeypatch):
    """The scheduler side fails after it has promised a load."""
    fail_once(connector(llm).scheduler, "allocated", monkeypatch)


@pytest.mark.parametrize("fault", [another_owner, no_copy, no_plan])
@pytest.mark.parametrize("secondary", [False, True], ids=["memory", "with-disk"])
def test_a_failed_load_poisons_nothing(secondary, fault, tmp_path, expected, monkeypatch):
    tiers = ["memory://?size=256MiB"] + ([f"file://{tmp_path}?size=1GiB"] if secondary else [])
    with engine(tiers) as llm:
        ours = connector(llm)
        generate(llm, [FIRST])
        drain(llm)
        fault(llm, monkeypatch)
        asked = [generate(llm, [p])[0] for p in (OTHER, OTHER, OTHER, FIRST)]
        assert [answer.tokens for answer in asked] == [expected(p) for p in (OTHER, OTHER, OTHER, FIRST)]
        assert ours.scheduler.counters["load_rollbacks"] == 1, "the fault came to pass"
        assert asked[2].hit == 299, "the cache goes on"
        drain(llm)
        if secondary:
            empty_memory(llm)
            again = [generate(llm, [p])[0] for p in (OTHER, FIRST)]
            assert [(answer.hit, answer.tokens) for answer in again] == [(299, expected(p)) for p in (OTHER, FIRST)]


def test_a_promise_that_cannot_be_kept_is_not_made_again(tmp_path, expected, monkeypatch):
    """Loads between steps: the engine asks again after each that failed."""

    def broken(*_args):
        raise RuntimeError("planted")

    with engine([f"file://{tmp_path}?size=1GiB"]) as llm:
        generate(llm, [FIRST])
        drain(llm)
        monkeypatch.setattr(connector(llm).scheduler.loads, "place", broken)
        answer = generate(llm, [FIRST])[0]
        assert (answer.hit, answer.tokens) == (0, expected(FIRST))
        assert connector(llm).hook_errors == {"update_state_after_alloc": 1}


def test_other_requests_of_the_step_are_not_touched(expected, monkeypatch):
    llm = shared("memory://?size=512MiB")
    empty_memory(llm)
    prompts = [OTHER, prompt(480, ending=0), prompt(200, ending=3)]
    generate(llm, [FIRST])
    rollbacks = connector(llm).scheduler.counters["load_rollbacks"]
    no_copy(llm, monkeypatch)
    for _ in range(3):
        assert [answer.tokens for answer in generate(llm, prompts)] == [expected(p) for p in prompts]
    assert connector(llm).scheduler.counters["load_rollbacks"] == rollbacks + 1


@pytest.mark.parametrize("budget", [64, 1024], ids=["in-chunks", "in-one-step"])
def test_nobody_finds_a_hole_in_the_prefix_cache(expected, monkeypatch, budget):
    """The engine's own cache holds pages from when they are promised: who shares them in the same step, or before they
    are computed, must not read them."""
    prompts = [FIRST, OTHER, prompt(300, ending=1), prompt(308), prompt(480)]
    settings = {"enable_prefix_caching": True, "max_num_batched_tokens": budget, "enable_chunked_prefill": True}
    with engine(["memory://?size=256MiB"], settings) as llm:
        generate(llm, [FIRST])
        assert llm.reset_prefix_cache()
        no_copy(llm, monkeypatch)
        counters = connector(llm).scheduler.counters
        assert [answer.tokens for answer in generate(llm, prompts)] == [expected(p) for p in prompts]
        assert counters["load_rollbacks"] > 1, "others shared the pages"
        before = counters["load_rollbacks"]
        assert [answer.tokens for answer in generate(llm, prompts)] == [expected(p) for p in prompts]
        assert counters["load_rollbacks"] == before, "they are computed by now"
