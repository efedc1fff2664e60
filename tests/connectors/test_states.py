"""Recurrent states under a real engine: a hit ends where the state of each layer and the KV before it are there."""

import pytest

import kvlab
from kvlab.connectors.captured import KV
from kvlab.judge.engine import preemptions
from tests.connectors.damage import GARBAGE, cut_short, flip_a_bit, objects
from tests.connectors.engine import (
    BLOCK,
    MAX_TOKENS,
    check_loads_under_eviction,
    connector,
    core,
    drain,
    empty_memory,
    engine,
    generate,
    prompt,
    worker,
)
from tests.connectors.recurrent import MODELS, overwritten, recurrent, without_states_within_a_step
from tests.connectors.test_attach import answer_ids

MEMORY = ["memory://?size=64MiB"]
LENGTHS = [31, 32, 33, 64, 65, 128, 129, 300, 480]
PROMPTS = [prompt(n) for n in LENGTHS] + [prompt(n, ending=e) for n, e in [(300, 0), (480, 0), (200, 1), (200, 2)]]
PAGE_BYTES = 2 * 4 * 32 * 4 * BLOCK  # of `granite4`: K and V, four heads of 32 floats


def last_end(length: int, block: int = BLOCK) -> int:
    """Where the last hit of a prompt ends: its last token is computed."""
    return (length - 1) // block * block


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Three groups of one Mamba-2 layer each and one of attention; steps of any length."""
    with without_states_within_a_step():
        yield recurrent(tmp_path_factory.mktemp("granite4"), "granite4") | {"max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def expected(settings):
    with engine(None, settings | {"enable_prefix_caching": False}) as llm:
        answers = {tuple(p): generate(llm, [p], detokenize=False)[0].tokens for p in PROMPTS}
    assert len({tuple(tokens) for tokens in answers.values()}) > len(answers) // 2
    return lambda p: answers[tuple(p)]


def ask(llm, *prompts, **params):
    """Without the engine's own prefix cache, which would answer first."""
    assert llm.reset_prefix_cache()
    return generate(llm, prompts, detokenize=False, **params)


@pytest.mark.parametrize("name", MODELS)
def test_a_hit_restores_every_state(tmp_path, name):
    """And a token depends on the states: with one group's page spoilt, answers change."""
    own = recurrent(tmp_path, name)
    prompts = [prompt(n) for n in (33, 200, 321)]
    with engine(None, own) as llm:
        right = [ask(llm, p)[0].tokens for p in prompts]
    with engine(MEMORY, own, chunk_tokens=64) as llm:
        scheduler, groups = connector(llm).scheduler, connector(llm).groups
        block = groups.block_tokens
        assert groups.recurrent
        assert scheduler.chunker.chunk_tokens == -(-64 // block) * block
        for p, tokens in zip(prompts, right, strict=True):
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == tokens
            assert (first.hit, second.hit) == (0, last_end(len(p), block))
        cache = kvlab.attach(llm)
        for p, tokens in zip(prompts, right, strict=True):  # by hand, to the token
            kv = cache.read(p)
            assert answer_ids(llm, cache.write(p, kv)) == (tokens, len(p) - 1)
        kv.save(tmp_path / "kv")
        assert all(not error.any() for error in kv.diff(KV.load(tmp_path / "kv")).values())
        cache.clear()
        assert not connector(llm).hook_errors
        original = worker(llm).transfer.load

        def load(slots, pages, num_tokens=()):
            original(slots, pages)
            (state,) = scheduler._states.values()
            table = core(llm).kv_cache_manager.get_block_ids(state.request.request_id)[min(groups.recurrent)]
            for layer in worker(llm).transfer.layout.pages:
                layer[table[-1]] = layer[table[-1]].flip(0)

        worker(llm).transfer.load = load
        spoilt = ask(llm, prompts[-1])[0]
        assert (spoilt.hit, spoilt.tokens == right[-1]) == (last_end(321, block), False)


@pytest.mark.parametrize("chunk_tokens", [32, 64, 256])
def test_hits_end_at_chunks_and_at_a_prompts_last_whole_block(settings, expected, chunk_tokens):
    with engine(MEMORY, settings, chunk_tokens=chunk_tokens) as llm, overwritten(llm) as freed:
        for p in PROMPTS[: len(LENGTHS)]:
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == expected(p)
            assert (first.hit, second.hit) == (0, last_end(len(p)))
        empty_memory(llm)
        ask(llm, prompt(300, ending=0))
        other = ask(llm, prompt(300))[0]  # 280 tokens are the same
        assert (other.hit, other.tokens) == (280 // chunk_tokens * chunk_tokens, expected(prompt(300)))
        longer = ask(llm, prompt(480))[0]
        assert (longer.hit, longer.tokens) == (288, expected(prompt(480)))
        assert longer.row["bytes"] == (288 // BLOCK + 3) * PAGE_BYTES  # KV of all blocks, one page of each state
        assert freed
        assert connector(llm).scheduler.counters["saves_dropped"] == 0
        assert not connector(llm).hook_errors
        # No slot holds what other requests left in the padding of a page, or in pages that lie under it.
        index, slots = connector(llm).scheduler.index, worker(llm).transfer.arena
        entries = list(index._entries.values())
        assert entries
        for entry in entries:
            for slot in entry.slots:
                assert not (slots[slot].view(-1, 8) == GARBAGE).all(1).any()


@pytest.mark.parametrize("budget", [48, 96, 250])
def test_prompts_computed_in_steps_that_end_anywhere(settings, expected, budget):
    with (
        engine(MEMORY, settings | {"max_num_batched_tokens": budget}, chunk_tokens=128) as llm,
        overwritten(llm) as freed,
    ):
        both = [prompt(200, ending=1), prompt(200, ending=2), prompt(300, ending=0)]
        for _ in range(2):
            answers = ask(llm, *both)
            assert [answer.tokens for answer in answers] == [expected(p) for p in both]
        assert [answer.hit for answer in answers] == [last_end(len(p)) for p in both]
        assert freed
        assert not connector(llm).hook_errors


def test_together_with_the_engines_own_prefix_cache(settings, expected):
    with engine(MEMORY, settings) as llm:
        for p in (prompt(480), prompt(480), prompt(129), prompt(480, ending=0), prompt(480)):
            assert generate(llm, [p], detokenize=False)[0].tokens == expected(p)
        ask(llm, prompt(129))
        longer = generate(llm, [prompt(480)], detokenize=False)[0]  # 128 tokens are the engine's own
        assert (longer.row["bytes"], longer.tokens) == (
            (448 - 128 + 3 * BLOCK) // BLOCK * PAGE_BYTES,
            expected(prompt(480)),
        )
        assert not connector(llm).hook_errors


def test_a_prefix_that_prompts_were_seen_to_share_ends_an_object(settings, expected):
    """vLLM sees it: it has the KV of another prompt's first tokens, and no state behind them."""
    with engine(MEMORY, settings, chunk_tokens=1024) as llm:
        ask(llm, prompt(300))
        assert generate(llm, [prompt(300, ending=0)], detokenize=False)[0].tokens == expected(prompt(300, ending=0))
        third = ask(llm, prompt(300, ending=1))[0]
        assert third.hit == 256  # 280 tokens are the same


def test_states_behind_generated_tokens(settings, expected):
    p = prompt(300)
    with engine(MEMORY, settings, save_generated=True, chunk_tokens=64) as llm:
        whole = ask(llm, p, max_tokens=60)[0].tokens
        assert whole[:MAX_TOKENS] == expected(p)
        next_turn = ask(llm, p + whole[:40], max_tokens=20)[0]
        assert (next_turn.hit, next_turn.tokens) == (320, whole[40:])


def test_preempted_requests(settings, expected):
    prompts = [prompt(200, ending=1), prompt(200, ending=2), prompt(300), prompt(300, ending=0)]
    few = {"kv_cache_memory_bytes": 48 * PAGE_BYTES, "max_model_len": 384}  # not for all of them at their ends
    with engine(MEMORY, settings | few) as llm, preemptions(llm) as preempted:
        for _ in range(3):
            answers = ask(llm, *prompts, max_tokens=80)
            assert [answer.tokens[:MAX_TOKENS] for answer in answers] == [expected(p) for p in prompts]
        assert preempted
        assert connector(llm).scheduler.counters["hit_requests"]
        assert not connector(llm).hook_errors


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit])
def test_a_new_engine_reads_the_disk_and_damage_is_computed_again(settings, expected, tmp_path, damage):
    tiers, p = [f"file://{tmp_path}?size=1GiB&serde=lossless"], prompt(480)
    with engine(tiers, settings, chunk_tokens=64) as llm:
        ask(llm, p)
        drain(llm)
    with engine(tiers, settings, chunk_tokens=64) as llm:
        answer = ask(llm, p)[0]
        assert (answer.hit, answer.row["tier"], answer.tokens) == (448, "disk", expected(p))
        drain(llm)
        files = objects(tmp_path)
        for file in files[:2]:
            damage(file, files)
        for _ in range(2):
            assert ask(llm, p)[0].tokens == expected(p)
            drain(llm)
        assert connector(llm).scheduler.counters["bad_objects"] >= 1
        assert not connector(llm).hook_errors


def test_evictions_while_loads_are_under_way(settings, expected, tmp_path):
    tiers = [f"memory://?size={40 * PAGE_BYTES}", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, settings, in_thread=True) as llm:
        check_loads_under_eviction(llm, ask, expected)


def test_an_error_in_a_copy_costs_only_the_hit(settings, expected, monkeypatch):
    p = prompt(300)

    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    with engine(MEMORY, settings) as llm:
        transfer, scheduler = worker(llm).transfer, connector(llm).scheduler
        faults = [(transfer, "save"), (transfer, "load"), (scheduler, "match"), (scheduler.loads, "place")]
        for owner, name in faults:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                assert ask(llm, p)[0].tokens == expected(p), name
            assert ask(llm, p)[0].tokens == expected(p), name
        with monkeypatch.context() as patch:
            patch.setattr(worker(llm)._padding, "clear", broken)
            assert ask(llm, prompt(480))[0].tokens == expected(prompt(480))
        for _ in range(2):  # pages that were not cleared may be saved at any later step: none is
            assert ask(llm, p, salt="another")[0].hit == 0


def test_without_the_engines_prefix_cache_it_is_refused(settings):
    off, why = (
        settings | {"enable_prefix_caching": False},
        r"add --enable-prefix-caching \(mamba_cache_mode is 'none'\)",
    )
    with pytest.raises(Exception, match=why), engine(MEMORY, off):
        pass
