"""The same greedy tokens with the cache as without, and the hit as long as it can be."""

import pytest

from kvlab.judge.engine import preemptions
from tests.connectors.conftest import EDGES
from tests.connectors.engine import (
    BLOCK,
    MAX_TOKENS,
    connector,
    empty_memory,
    engine,
    generate,
    prompt,
    shared,
    worker,
)
from tests.connectors.models import TOKEN_BYTES

MEMORY = ["memory://?size=512MiB"]


@pytest.fixture
def fresh():
    llm = shared(*MEMORY)
    empty_memory(llm)
    return llm


@pytest.mark.parametrize("length", EDGES)
def test_repeated_prompt_at_block_edges(fresh, expected, length):
    p = prompt(length)
    first, second = generate(fresh, [p])[0], generate(fresh, [p])[0]
    assert first.tokens == second.tokens == expected(p)
    assert first.hit == 0
    assert second.hit == length - 1  # all but the token that must be computed


def test_a_request_of_one_token_is_told_its_hit(fresh):
    first, second = (generate(fresh, [prompt(200)], max_tokens=1)[0] for _ in range(2))
    assert (first.hit, second.hit, second.row["tier"]) == (0, 199, "memory")


def test_shared_prefix_with_another_ending(fresh, expected):
    generate(fresh, [prompt(300, ending=0)])
    other = generate(fresh, [prompt(300, ending=1)])[0]
    assert other.tokens == expected(prompt(300, ending=1))
    assert other.hit == 256  # four chunks of 64; the tail differs


def test_longer_prompt_reuses_the_tail_of_a_shorter_one(fresh, expected):
    generate(fresh, [prompt(300)])
    longer = generate(fresh, [prompt(480)])[0]
    assert longer.tokens == expected(prompt(480))
    assert longer.hit == 288  # four chunks and the 32-token tail


def test_eight_prompts_at_once(fresh, expected):
    prompts = [prompt(200, ending=e) for e in range(8)]
    first = generate(fresh, prompts)
    second = generate(fresh, prompts)
    for p, a, b in zip(prompts, first, second, strict=True):
        assert a.tokens == b.tokens == expected(p)
        assert b.hit == 199


def test_a_last_page_filled_in_part_serves_the_same_prompt_alone(fresh, expected):
    p = prompt(300)
    generate(fresh, [p])
    for q in (prompt(299), prompt(308)):  # ten pages as well, nine of them the same
        answer = generate(fresh, [q])[0]
        assert (answer.hit, answer.tokens) == (288, expected(q))
    with_salt = [generate(fresh, [p], salt="one")[0].hit for _ in range(2)]
    assert with_salt == [0, 299]
    counters = connector(fresh).scheduler.counters
    before = counters["saved_tokens"]
    assert generate(fresh, [p])[0].hit == 299
    assert counters["saved_tokens"] == before, "nothing is saved twice"
    generate(fresh, [prompt(33)])
    assert counters["saved_tokens"] == before + 32, "a token that must be computed anyway is not worth a page"


def test_whole_pages_only(expected):
    with engine(MEMORY, save_partial_block=False) as llm:
        for length in (31, 33, 64, 300):
            p = prompt(length)
            empty_memory(llm)
            assert [generate(llm, [p])[0].hit for _ in range(2)] == [0, (length - 1) // BLOCK * BLOCK]


def test_salts_do_not_share(fresh, expected):
    p = prompt(300)
    generate(fresh, [p], salt="one")
    other = generate(fresh, [p], salt="two")[0]
    none = generate(fresh, [p])[0]
    again = generate(fresh, [p], salt="one")[0]
    assert (other.hit, none.hit, again.hit) == (0, 0, 299)
    assert other.tokens == none.tokens == again.tokens == expected(p)


def test_prompt_logprobs_are_computed_not_served(fresh, expected):
    p = prompt(300)
    generate(fresh, [p])
    answer = generate(fresh, [p], prompt_logprobs=1)[0]
    assert answer.hit == 0
    assert answer.tokens == expected(p)


def test_an_error_in_any_hook_costs_only_the_hit(fresh, expected, monkeypatch):
    p = prompt(300)
    scheduler = connector(fresh).scheduler

    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    hooks = [(scheduler, name) for name in ("match", "allocated", "absorb", "finished")] + [(scheduler.loads, "place")]
    for owner, name in [*hooks, (scheduler.saves, "collect")]:
        generate(fresh, [p])
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert generate(fresh, [p])[0].tokens == expected(p), name
    scheduler._states.clear()
    assert generate(fresh, [p])[0].tokens == expected(p)


@pytest.mark.parametrize("method", ["load", "save"])
def test_an_error_in_a_copy_costs_only_the_hit(fresh, expected, monkeypatch, method):
    p = prompt(300)
    if method == "load":
        generate(fresh, [p])

    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(worker(fresh).transfer, method, broken)
        assert generate(fresh, [p])[0].tokens == expected(p)
    after = generate(fresh, [p])[0]
    assert after.tokens == expected(p)


def test_chunked_prefill(expected):
    with engine(MEMORY, {"max_num_batched_tokens": 128, "enable_chunked_prefill": True}) as llm:
        for length in (480, 700):
            p = prompt(length)
            first, second = generate(llm, [p])[0], generate(llm, [p])[0]
            assert first.tokens == second.tokens == expected(p)
            assert second.hit == length - 1
            empty_memory(llm)


def test_together_with_prefix_caching(expected):
    long, short = prompt(480), prompt(129)
    with engine(MEMORY, {"enable_prefix_caching": True}) as llm:
        generate(llm, [long])
        both = generate(llm, [long])[0]
        assert both.tokens == expected(long)
        assert both.hit == 479 - 448  # the engine's own cache holds whole pages only
        assert llm.reset_prefix_cache()
        generate(llm, [short])  # now the engine's own cache is shorter than ours
        shorter_local = generate(llm, [long])[0]
        assert shorter_local.tokens == expected(long)
        assert shorter_local.hit == 479 - 128
        empty_memory(llm)
        generate(llm, [prompt(480, ending=0)])
        longer_local = generate(llm, [long])[0]  # and now ours is
        assert longer_local.tokens == expected(long)
        assert longer_local.hit == 0


def test_preemption(expected):
    prompts = [prompt(200, ending=e) for e in range(8)]
    # 40 blocks for eight requests that need eight each at their end
    few = {"kv_cache_memory_bytes": 40 * BLOCK * TOKEN_BYTES, "max_model_len": 512}
    with engine(MEMORY, few) as llm, preemptions(llm) as preempted:
        for _ in range(2):
            answers = generate(llm, prompts, max_tokens=40)
            for p, answer in zip(prompts, answers, strict=True):
                assert answer.tokens[:MAX_TOKENS] == expected(p)
        assert preempted
