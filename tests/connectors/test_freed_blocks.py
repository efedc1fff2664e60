"""Freed pages are overwritten at once: no save may read a page the engine has given back, no load may write one."""

from contextlib import contextmanager

import pytest

from tests.connectors.engine import connector, core, engine, generate, prompt, worker
from tests.connectors.test_disk_tier import drain

GARBAGE = 0x4B  # as float32: thirteen million, finite, so that it can hide behind no mask


@contextmanager
def overwritten(llm):
    """Every page the engine frees is filled with garbage before anything else happens."""
    pool, pages, seen = core(llm).kv_cache_manager.block_pool, worker(llm).transfer.layout.pages, []
    original = pool.free_blocks

    def free_blocks(ordered_blocks):
        blocks = list(ordered_blocks)
        original(blocks)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                seen.append(block.block_id)
                for layer in pages:
                    layer[block.block_id].fill_(GARBAGE)

    pool.free_blocks = free_blocks
    try:
        yield seen
    finally:
        pool.free_blocks = original


def ask_twice(llm, prompts) -> list[list[list[int]]]:
    return [[answer.tokens for answer in generate(llm, prompts)] for _ in range(2)]


@pytest.mark.parametrize("lower", [False, True], ids=["memory", "with-disk"])
def test_saves_are_over_before_pages_are_freed(tmp_path, expected, lower):
    prompts = [prompt(200, ending=e) for e in range(8)]
    tiers = ["memory://?size=256MiB"] + ([f"file://{tmp_path}?size=1GiB"] if lower else [])
    # Room for about three requests at a time: pages are reused while others are being saved.
    with (
        engine(tiers, {"kv_cache_memory_bytes": 24 * 32 * 46080, "max_model_len": 512}) as llm,
        overwritten(llm) as freed,
    ):
        assert ask_twice(llm, prompts) == [[expected(p) for p in prompts]] * 2
        if lower:
            drain(llm)
            connector(llm).reset_cache()
            assert [answer.tokens for answer in generate(llm, prompts)] == [expected(p) for p in prompts]
        assert len(freed) > 100
        assert connector(llm).scheduler.counters["hit_requests"] >= 8
        assert not connector(llm).hook_errors


def test_a_late_save_would_be_seen(expected, monkeypatch):
    p = prompt(300)
    with engine(["memory://?size=256MiB"]) as llm, overwritten(llm):
        transfer, late = worker(llm).transfer, []
        original_save, original_load = transfer.save, transfer.load
        monkeypatch.setattr(transfer, "save", lambda *args: late.append(args))

        def load(*args):
            while late:
                original_save(*late.pop(0))
            return original_load(*args)

        monkeypatch.setattr(transfer, "load", load)
        first, second = generate(llm, [p])[0], generate(llm, [p])[0]
        assert first.tokens == expected(p)
        assert second.hit == 299
        assert second.tokens != expected(p)
