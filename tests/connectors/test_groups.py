"""A model whose layers see a window or the whole prefix, in KV cache groups of their own, under a real engine."""

import pytest

from kvlab.hashing import block_hashes
from kvlab.judge.engine import preemptions
from tests.connectors.damage import cut_short, flip_a_bit, objects, overwritten
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
from tests.connectors.models import WINDOW, gemma

PAGE_BYTES = 2 * 2 * 2 * 64 * 4 * BLOCK  # of the pool: two layers, K and V, two heads of 64 floats
MEMORY = ["memory://?size=64MiB"]
LENGTHS = [31, 32, 33, 63, 64, 65, 97, 128, 129, 144, 145, 161, 300, 480]
PROMPTS = [prompt(n) for n in LENGTHS] + [prompt(n, ending=e) for n, e in [(300, 0), (480, 0), (200, 1), (200, 2)]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Two groups of sliding-window layers and one of full attention, two layers each."""
    return gemma(tmp_path_factory.mktemp("gemma"), ["sliding_attention", "sliding_attention", "full_attention"] * 2)


@pytest.fixture(scope="module")
def expected(settings):
    with engine(None, settings) as llm:
        answers = {tuple(p): generate(llm, [p], detokenize=False)[0].tokens for p in PROMPTS}
    assert len({tuple(tokens) for tokens in answers.values()}) > len(answers) // 2
    return lambda p: answers[tuple(p)]


def ask(llm, *prompts):
    return generate(llm, prompts, detokenize=False)


def test_a_token_depends_on_what_every_group_holds(settings, expected):
    """Otherwise the tests below would prove nothing: with one group's pages spoilt, answers change."""
    p = prompt(300)
    with engine(MEMORY, settings) as llm:
        ask(llm, p)
        groups, transfer = connector(llm).groups, worker(llm).transfer
        assert groups.windows == (WINDOW, WINDOW, None)
        original = transfer.load
        for spoilt in range(3):

            def load(slots, pages, num_tokens=(), spoilt=spoilt):
                original(slots, pages)
                tables = core(llm).kv_cache_manager.get_block_ids(next(iter(connector(llm).scheduler._states)))
                for page in set(tables[spoilt]) & set(pages):
                    for layer in transfer.layout.pages:
                        layer[page] = layer[page].flip(0)

            transfer.load = load
            answer = ask(llm, p)[0]
            assert (answer.hit, answer.tokens == expected(p)) == (299, False), spoilt


@pytest.mark.parametrize("chunk_tokens", [32, 64, 256])
def test_a_hit_answers_as_without_a_cache(settings, expected, chunk_tokens):
    with engine(MEMORY, settings, chunk_tokens=chunk_tokens) as llm:
        for p in PROMPTS[: len(LENGTHS)]:
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == expected(p)
            assert (first.hit, second.hit) == (0, len(p) - 1)
        empty_memory(llm)
        ask(llm, prompt(300, ending=0))
        other = ask(llm, prompt(300))[0]
        assert (other.hit, other.tokens) == (280 // chunk_tokens * chunk_tokens, expected(prompt(300)))
        longer = ask(llm, prompt(480))[0]
        assert (longer.hit, longer.tokens) == (288, expected(prompt(480)))
        assert not connector(llm).hook_errors


def test_only_what_a_window_shows_is_kept_and_loaded(settings, expected):
    with engine(MEMORY, settings) as llm:
        p = prompt(480)
        ask(llm, p)
        index, pool_bytes = connector(llm).scheduler.index, worker(llm).transfer.layout.block_bytes
        used = index.num_slots - index.num_free
        # Fifteen pages of the full layers; of each chunk of two pages all of a window of 80: nothing is spared here.
        assert used == 15 * 3
        answer = ask(llm, p)[0]
        seen = 15 - (479 - WINDOW + 1) // BLOCK
        assert answer.row["bytes"] == (15 + 2 * seen) * pool_bytes
    with engine(MEMORY, settings, chunk_tokens=256) as llm:
        ask(llm, p)
        index = connector(llm).scheduler.index
        kept = (8 - (255 - WINDOW + 1) // BLOCK) + (15 - max(8, (479 - WINDOW + 1) // BLOCK))
        assert index.num_slots - index.num_free == 15 + 2 * kept
        assert ask(llm, p)[0].tokens == expected(p)


@pytest.mark.parametrize("budget", [48, 96, 250])
def test_prompts_computed_in_steps_that_end_anywhere(settings, expected, budget):
    """Windows leave pages behind between two steps; what an object holds must still be there when it is saved."""
    steps = {"max_num_batched_tokens": budget, "enable_chunked_prefill": True}
    with engine(MEMORY, settings | steps, chunk_tokens=128) as llm, overwritten(llm) as freed:
        for p in (prompt(300), prompt(480), prompt(480, ending=0)):
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == expected(p)
            assert second.hit == len(p) - 1
        both = [prompt(200, ending=1), prompt(200, ending=2), prompt(300, ending=0)]
        for _ in range(2):
            assert [answer.tokens for answer in ask(llm, *both)] == [expected(p) for p in both]
        assert freed
        assert connector(llm).scheduler.counters["saves_dropped"] == 0
        assert not connector(llm).hook_errors


def test_together_with_the_engines_own_prefix_cache(settings, expected):
    with engine(MEMORY, settings | {"enable_prefix_caching": True}) as llm:
        ask(llm, prompt(480))
        assert ask(llm, prompt(480))[0].tokens == expected(prompt(480))
        assert llm.reset_prefix_cache()
        ask(llm, prompt(129))
        for p in (prompt(480), prompt(480, ending=0), prompt(480)):
            assert ask(llm, p)[0].tokens == expected(p)
        assert connector(llm).scheduler.counters["hit_requests"] >= 2
        assert not connector(llm).hook_errors


def test_preempted_requests(settings, expected):
    prompts = [prompt(200, ending=1), prompt(200, ending=2), prompt(300), prompt(300, ending=0)]
    few = {"kv_cache_memory_bytes": 48 * PAGE_BYTES, "max_model_len": 384}  # not for all of them at their ends
    with engine(MEMORY, settings | few) as llm, preemptions(llm) as preempted:
        for _ in range(3):
            answers = generate(llm, prompts, detokenize=False, max_tokens=80)
            assert [answer.tokens[:MAX_TOKENS] for answer in answers] == [expected(p) for p in prompts]
        assert preempted
        assert not connector(llm).hook_errors


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit])
def test_a_new_engine_reads_the_disk_and_damage_is_computed_again(settings, expected, tmp_path, damage):
    tiers, p = [f"file://{tmp_path}?size=1GiB"], prompt(480)
    with engine(tiers, settings) as llm:
        ask(llm, p)
        drain(llm)
    with engine(tiers, settings) as llm:
        answer = ask(llm, p)[0]
        assert (answer.hit, answer.row["tier"], answer.tokens) == (479, "disk", expected(p))
        drain(llm)
        files = objects(tmp_path)
        damage(files[len(files) // 2], files)
        assert ask(llm, p)[0].tokens == expected(p)
        drain(llm)
        assert ask(llm, p)[0].tokens == expected(p)
        assert connector(llm).scheduler.counters["bad_objects"] >= 1
        assert not connector(llm).hook_errors


@pytest.mark.parametrize("method", ["load", "save"])
def test_an_error_in_a_copy_costs_only_the_hit(settings, expected, monkeypatch, method):
    p = prompt(300)

    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    with engine(MEMORY, settings) as llm:
        if method == "load":
            ask(llm, p)
        with monkeypatch.context() as patch:
            patch.setattr(worker(llm).transfer, method, broken)
            assert ask(llm, p)[0].tokens == expected(p)
        for _ in range(2):
            assert ask(llm, p)[0].tokens == expected(p)
        scheduler = connector(llm).scheduler
        hooks = [(scheduler, name) for name in ("match", "allocated", "absorb")] + [(scheduler.loads, "place")]
        for owner, name in [*hooks, (scheduler.saves, "collect")]:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                assert ask(llm, p)[0].tokens == expected(p), name


def test_evictions_while_loads_are_under_way(settings, expected, tmp_path):
    """Host memory for a few prompts over a slow disk: objects leave while others are fetched."""
    tiers = [f"memory://?size={56 * PAGE_BYTES}", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, settings, in_thread=True) as llm:
        check_loads_under_eviction(llm, ask, expected)


def test_whole_pages_only(settings, expected):
    with engine(MEMORY, settings, save_partial_block=False, chunk_tokens=128) as llm:
        for length in (64, 128, 300):
            p = prompt(length)
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == expected(p)
            # An object that ends with the prompt serves no hit that is a page shorter.
            assert second.hit == (length - 1) // BLOCK * BLOCK if length % BLOCK else second.hit % 128 == 0


def test_without_the_hybrid_manager_it_is_one_group(settings, expected):
    with engine(MEMORY, settings | {"disable_hybrid_kv_cache_manager": True}) as llm:
        assert connector(llm).groups.windows == (None,)
        for p in (prompt(300), prompt(480)):
            assert [a.tokens for a in (ask(llm, p)[0], ask(llm, p)[0])] == [expected(p)] * 2


def test_one_group_of_windows(tmp_path):
    settings = gemma(tmp_path, ["sliding_attention"] * 3) | {"max_num_batched_tokens": 96}
    prompts = [prompt(64), prompt(300), prompt(480)]
    with engine(None, settings) as llm:
        expected = [ask(llm, p)[0].tokens for p in prompts]
    with engine(MEMORY, settings, chunk_tokens=128) as llm, overwritten(llm):
        assert connector(llm).groups.windows == (WINDOW,)
        for p, tokens in zip(prompts, expected, strict=True):
            empty_memory(llm)
            first, second = ask(llm, p)[0], ask(llm, p)[0]
            assert first.tokens == second.tokens == tokens
            assert second.hit == len(p) - 1
        assert not connector(llm).hook_errors


@pytest.mark.parametrize("fault", ["removed", "rotted"])
def test_one_group_of_windows_loses_a_load_as_a_whole(tmp_path, fault):
    """Behind a window the engine was given no pages before those that the hit's end sees: what it computed from the
    lost page on would read none, and be stored under the right name."""
    settings = gemma(tmp_path / "model", ["sliding_attention"] * 3)
    prompts = [prompt(64), prompt(300), prompt(480)]
    tiers = [f"file://{tmp_path}/kv?size=1GiB"]
    with engine(None, settings) as llm:
        expected = [ask(llm, p)[0].tokens for p in prompts]
    with engine(tiers, settings) as llm:
        assert connector(llm).groups.windows == (WINDOW,)
        assert [ask(llm, p)[0].tokens for p in prompts] == expected
        drain(llm)
        for p in prompts[1:]:
            last_full = block_hashes(p, 32)[len(p) // 64 * 2 - 1].hex()
            (file,) = [file for file in objects(tmp_path / "kv") if last_full in file.name]
            file.unlink() if fault == "removed" else flip_a_bit(file, [])
        assert [ask(llm, p)[0].tokens for p in prompts] == expected
        assert connector(llm).scheduler.counters["bad_objects"] == 2
        drain(llm)
    with engine(tiers, settings) as llm:
        answers = [ask(llm, p)[0] for p in prompts]
        assert [answer.tokens for answer in answers] == expected
        assert [answer.hit for answer in answers] == [len(p) - 1 for p in prompts]


def test_a_load_from_memory_under_a_window_is_lost_as_a_whole(tmp_path):
    settings = gemma(tmp_path, ["sliding_attention"] * 3)
    with engine(None, settings) as llm:
        expected = ask(llm, prompt(480))[0].tokens
    with engine(MEMORY, settings) as llm:
        assert ask(llm, prompt(480))[0].tokens == expected
        present, asked = worker(llm)._present, []
        worker(llm)._present = lambda op: (asked.append(op), present(op) and len(asked) != 7)[1]
        assert ask(llm, prompt(480))[0].tokens == expected
        assert len(asked) >= 7, "nothing was lost"


def test_versions_that_hear_of_failures_by_block_only_are_refused(settings, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.delattr(KVConnectorBase_V1, "get_transfer_results")
    refused = r"has 3 KV cache groups \(SlidingWindowSpec, .*--disable-hybrid-kv-cache-manager"
    with pytest.raises(Exception, match=refused), engine(MEMORY, settings):
        pass
