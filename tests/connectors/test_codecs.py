"""Tiers with a codec under a real engine: slots hold encoded blocks, and pages what these decode to."""

import logging

import pytest
import torch

from kvlab.codecs import PageCodec
from kvlab.codecs.blocks import BlockCodec
from kvlab.errors import ConfigError
from kvlab.paged import Opaque
from kvlab.serde import get_serde
from tests.connectors.engine import BLOCK, connector, empty_memory, engine, generate, prompt, worker
from tests.connectors.models import TOKEN_BYTES, gemma

LENGTHS = [2, 31, 33, 64, 97, 300]


class Watched:
    """Notes what pages held when they were saved, and what they hold once slots are loaded into them."""

    def __init__(self, transfer):
        self.transfer, self.saved, self.loaded = transfer, {}, []
        self.save, self.load = transfer.save, transfer.load
        transfer.save, transfer.load = self._save, self._load

    def _block(self, block_id):
        return torch.stack([pages[block_id] for pages in self.transfer.layout.pages])

    def _save(self, block_ids, slots, num_tokens=()):
        for block_id, slot, count in zip(block_ids, slots, num_tokens, strict=True):
            self.saved[slot] = (self._block(block_id), count)
        self.save(block_ids, slots, num_tokens)

    def _load(self, slots, block_ids, num_tokens=()):
        for pages in self.transfer.layout.pages:  # another request's
            pages[list(block_ids)] = 0x5A
        self.load(slots, block_ids, num_tokens)
        for block_id, slot, count in zip(block_ids, slots, num_tokens, strict=True):
            self.loaded.append((*self.saved[slot], self._block(block_id), count))

    def check(self, spec):
        """Loaded pages are the twin's of saved ones, bit for bit, and hold nothing else."""
        codec = PageCodec(get_serde(spec), self.transfer.codec.map)
        assert self.loaded
        for pages, tokens, found, count in self.loaded:
            assert tokens == count
            want = torch.zeros_like(pages)
            codec.decode(codec.encode(pages[None], count), want[None])
            assert found.equal(want)


@pytest.mark.parametrize(
    ("spec", "dtype", "times"),
    [("int8", "float32", 3.7), ("int4", "bfloat16", 2.9), ("fp8", "bfloat16", 1.8)],
)
def test_pages_hold_what_the_twin_makes_of_them(spec, dtype, times):
    size = 1200 * TOKEN_BYTES // (1 if dtype == "float32" else 2)
    with engine([f"memory://?size={size}&serde={spec}"], {"dtype": dtype}) as llm:
        watched = Watched(worker(llm).transfer)
        for length in LENGTHS:
            generate(llm, [prompt(length)])
            answer = generate(llm, [prompt(length)])[0]
            assert answer.hit == length - 1
        watched.check(spec)
        assert {count for *_, count in watched.loaded} >= {BLOCK, 31, 300 % BLOCK}
        assert connector(llm).num_slots * BLOCK > 1200 * times, "so many times the tokens"
        assert worker(llm).transfer.arena.numel() <= size
        assert not connector(llm).hook_errors


def test_groups_with_windows_are_coded_alike(tmp_path):
    settings = gemma(tmp_path, ["sliding_attention", "sliding_attention", "full_attention"] * 2)
    with engine(["memory://?size=64MiB&serde=int8"], settings) as llm:
        watched = Watched(worker(llm).transfer)
        for length in (33, 97, 161, 300):
            empty_memory(llm)
            first = generate(llm, [prompt(length)], detokenize=False)[0]
            again = generate(llm, [prompt(length)], detokenize=False)[0]
            assert again.hit == length - 1
            assert len(first.tokens) == len(again.tokens)
        watched.check("int8")
        assert not connector(llm).hook_errors


def test_most_words_are_the_same(expected):
    with engine(["memory://?size=64MiB&serde=int8"]) as llm:
        same = 0
        for length in (90, 300, 480):
            generate(llm, [prompt(length)])
            answer = generate(llm, [prompt(length)])[0]
            assert answer.hit == length - 1
            same += answer.tokens == expected(prompt(length))
        assert same >= 2, "near-ties of a model without most of its layers may turn"


def test_the_start_tells_what_slots_hold(caplog):
    with caplog.at_level(logging.INFO, "vllm.kvlab"), engine(["memory://?size=64MiB&serde=int4"]):
        line = next(r.getMessage() for r in caplog.records if "memory tier of" in r.getMessage())
    assert "as int4:k=channel,v=token,group=64 a rank), pages typed (CPU vec)" in line


def test_a_number_that_is_none_costs_its_object_alone(expected):
    with engine(["memory://?size=64MiB&serde=int8"]) as llm:
        transfer = worker(llm).transfer
        codec, encode = transfer.codec, transfer.codec.encode

        def broken(pages, num_tokens, slot):
            if num_tokens != BLOCK:
                raise ConfigError("KV holds NaN")
            encode(pages, num_tokens, slot)

        codec.encode = broken
        p = prompt(300)
        generate(llm, [p])
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (288, expected(p))
        assert not connector(llm).hook_errors


def test_kinds_that_tell_k_from_v_are_refused_over_opaque_pages(monkeypatch):
    from kvlab.connectors.vllm import pages

    monkeypatch.setattr(pages, "understand", lambda scratch: Opaque("its swizzle"))
    told = pytest.raises(ConfigError, match="must tell K from V, and these pages are opaque: its swizzle")
    with told, engine(["memory://?size=64MiB&serde=int4"]):
        pass


def test_a_codec_of_other_pages_is_refused():
    from kvlab.codecs.transfer import open_coded_transfer
    from tests.test_codec_staging import engine as typed_pages
    from tests.test_page_codecs import LAYERS, page_map_of

    typed = typed_pages(page_map_of())
    codec = BlockCodec(get_serde("int8"), page_map_of(heads=4), LAYERS)
    with pytest.raises(ConfigError, match="does not fit"):
        open_coded_transfer(typed.layout, codec, 4, staging_bytes=0)


def test_a_file_tier_holds_the_blocks_as_slots_do(tmp_path, expected):
    """What one engine stores another loads, decoded alike; an engine with another codec, or none, finds none of it."""
    p = prompt(300)
    with engine([f"memory://?size=64MiB&serde=int4", f"file://{tmp_path}?size=1GiB&serde=int4"]) as llm:
        generate(llm, [p])
        drain(llm)
        memory = generate(llm, [p])[0]
        watched = Watched(worker(llm).transfer)
        empty_memory(llm)
        disk = generate(llm, [p])[0]
        assert (memory.hit, memory.row["tier"], disk.hit, disk.row["tier"]) == (299, "memory", 299, "disk")
        assert memory.tokens == disk.tokens
        assert len(watched.loaded) == 0
        assert not connector(llm).hook_errors
    held = sum(path.stat().st_size for path in objects(tmp_path))
    assert held < 300 * TOKEN_BYTES / 5, "encoded float32, with headers"
    with engine([f"file://{tmp_path}?size=1GiB&serde=int4"]) as llm:
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (299, disk.tokens)
        opened = unpack(objects(tmp_path)[0].read_bytes(), stored_key(objects(tmp_path)[0]))
        assert opened.metadata["serde"] == "int4"
        assert "int4:k=channel,v=token,group=64" in opened.metadata["params"]
        flip_a_bit(objects(tmp_path))
