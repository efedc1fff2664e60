"""Freed pages are overwritten at once: no save may read a page the engine has given back, no load may write one."""

import pytest
import torch

from tests.connectors.damage import overwritten
from tests.connectors.engine import connector, drain, empty_memory, engine, generate, prompt, worker
from tests.connectors.models import TOKEN_BYTES


def ask_twice(llm, prompts) -> list[list[list[int]]]:
    return [[answer.tokens for answer in generate(llm, prompts)] for _ in range(2)]


@pytest.mark.parametrize("secondary", [False, True], ids=["memory", "with-disk"])
def test_saves_are_over_before_pages_are_freed(tmp_path, expected, secondary):
    prompts = [prompt(200, ending=e) for e in range(8)]
    tiers = ["memory://?size=256MiB"] + ([f"file://{tmp_path}?size=1GiB"] if secondary else [])
    # Room for about three requests at a time: pages are reused while others are being saved.
    with (
        engine(tiers, {"kv_cache_memory_bytes": 24 * 32 * TOKEN_BYTES, "max_model_len": 512}) as llm,
        overwritten(llm) as freed,
    ):
        assert ask_twice(llm, prompts) == [[expected(p) for p in prompts]] * 2
        if secondary:
            drain(llm)
            empty_memory(llm)
            assert [answer.tokens for answer in generate(llm, prompts)] == [expected(p) for p in prompts]
        assert len(freed) > 100
        assert connector(llm).scheduler.counters["hit_requests"] >= 8
        assert not connector(llm).hook_errors


class LateSaves:
    """Saves run at the last moment that they may: before their pages are written to, or their slots used."""

    def __init__(self, transfer, monkeypatch):
        self.layout, self.save = transfer.layout, transfer.save
        self.waiting, self.at_last, self.too_late = [], 0, 0
        monkeypatch.setattr(transfer, "save", self.later)
        monkeypatch.setattr(transfer, "before_writes", self.before_writes)
        monkeypatch.setattr(transfer, "slots", self.first(transfer.slots))
        monkeypatch.setattr(transfer, "load", self.first(transfer.load, loads=True))

    def before_writes(self, block_ids):
        self.at_last += self.run(pages=block_ids)

    def later(self, block_ids, slots):
        self.run(slots=slots)
        self.waiting.append((list(block_ids), list(slots), self.bytes_of(block_ids)))

    def bytes_of(self, block_ids):
        return torch.stack([pages[list(block_ids)] for pages in self.layout.pages])

    def first(self, method, *, loads=False):
        def call(slots, *rest):
            self.run(slots=slots, pages=rest[0] if loads else ())
            return method(slots, *rest)

        return call

    def run(self, *, slots=(), pages=()):
        """How many ran. Those before one that can wait no longer run as well: a stream keeps their order."""
        urgent = [at for at, (b, s, _) in enumerate(self.waiting) if set(b) & set(pages) or set(s) & set(slots)]
        due = self.waiting[: max(urgent, default=-1) + 1]
        for block_ids, own, before in due:
            self.too_late += not torch.equal(self.bytes_of(block_ids), before)  # an error here would be caught
            self.save(block_ids, own)
        del self.waiting[: len(due)]
        return len(due)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_saves_hear_of_writes_to_their_pages_first(expected, prefix_caching, monkeypatch):
    """Saves read pages after the step, on a GPU perhaps after the request has ended: whoever gets a page must be named
    before it is written to. Whole pages only, as requests go on writing to their last one."""
    prompts = [prompt(200, ending=e) for e in range(8)] + [prompt(480), prompt(90), prompt(480, ending=0)]
    few_pages = {"kv_cache_memory_bytes": 24 * 32 * TOKEN_BYTES, "max_model_len": 512}
    settings = {**few_pages, "enable_prefix_caching": prefix_caching}
    # No hit on the first pass: a load would run the saves before it.
    with engine(["memory://?size=256MiB"], settings, save_partial_block=False, min_hit_tokens=190) as llm:
        late = LateSaves(worker(llm).transfer, monkeypatch)
        assert ask_twice(llm, prompts) == [[expected(p) for p in prompts]] * 2
        assert late.too_late == 0
        assert late.at_last > 0
        assert connector(llm).scheduler.counters["hit_requests"] > 0
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
