"""Tiers with a codec under a real engine: slots hold encoded blocks, and pages what these decode to."""

import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kvlab.codecs import PageCodec
from kvlab.codecs.transfer import CodedCPUTransfer
from kvlab.connectors.vllm.pages import warn_of_rope
from kvlab.errors import ConfigError
from kvlab.machine.redis_server import RedisServer
from kvlab.paged import Opaque
from kvlab.serde import get_serde
from tests.connectors.conftest import EDGES
from tests.connectors.damage import cut_short, flip_a_bit, objects
from tests.connectors.engine import BLOCK, connector, drain, empty_memory, engine, generate, prompt, worker
from tests.connectors.models import TOKEN_BYTES, gemma
from tests.forged import data_of, forged, header_of
from tests.test_page_codecs import page_map_of

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
    [
        ("int8", "float32", 3.7),
        ("int4", "bfloat16", 2.9),
        ("rotated4", "bfloat16", 3.3),
        ("centered:theta=100000", "bfloat16", 2.7),  # the demo model's
    ],
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


def test_a_rope_that_is_not_the_models_is_told(caplog):
    page_map = page_map_of("NHC")
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(rope_theta=1e6)))
    with caplog.at_level(logging.WARNING, "vllm.kvlab"):
        for fine in ("int4", "centered:theta=1000000", "centered:theta=1000000,rotary=64"):
            warn_of_rope(fine, config, page_map)
        assert not caplog.records
        warn_of_rope("centered", config, page_map)
        config.model_config.hf_text_config.partial_rotary_factor = 0.5
        warn_of_rope("centered:theta=1000000", config, page_map)
    told = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("give ")[2] for line in told] == [
        "?serde=centered:theta=1000000",
        "?serde=centered:theta=1000000,rotary=32",
    ]


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


def ask_exactly(llm, p):
    """As `generate`, of a request that takes nothing lossy."""
    return generate(llm, [p], extra_args={"kv_transfer_params": {"kvlab": {"exact": True}}})[0]


def test_most_words_are_the_same_and_all_where_a_request_wants_it_exact(expected):
    with engine(["memory://?size=64MiB&serde=int8"]) as llm:
        same = 0
        for length in (90, 300, 480):
            generate(llm, [prompt(length)])
            answer = generate(llm, [prompt(length)])[0]
            assert answer.hit == length - 1
            same += answer.tokens == expected(prompt(length))
            exact = ask_exactly(llm, prompt(length))
            assert (exact.hit, exact.row["miss"], exact.tokens) == (0, "not_exact", expected(prompt(length)))
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


class ToldLate(CodedCPUTransfer):
    """Tells of a save what a GPU does once it has ended: here, when it is waited for."""

    def save(self, block_ids, slots, num_tokens=()):
        super().save(block_ids, slots, num_tokens)
        self.late = [*getattr(self, "late", []), (frozenset(slots), self._unfit)]
        self._unfit = set()

    @property
    def num_unheard(self):
        return len(getattr(self, "late", []))

    def take_unfit(self, wait_for=()):
        found = set()
        while self.num_unheard and (wait_for is None or any(not s.isdisjoint(wait_for) for s, _ in self.late)):
            found |= self.late.pop(0)[1]
        return found


def test_what_is_told_late_is_neither_loaded_nor_written(tmp_path, expected):
    tiers = ["memory://?size=64MiB&serde=int8", f"file://{tmp_path}?size=1GiB&serde=int8"]
    p = prompt(300)
    with engine(tiers) as llm:
        transfer = worker(llm).transfer
        transfer.__class__ = ToldLate
        codec, encode, calls = transfer.codec, transfer.codec.encode, []

        def broken(pages, num_tokens, slot):
            calls.append(num_tokens)
            if len(calls) == 3:  # a block of the second object
                raise ConfigError("KV holds infinity")
            encode(pages, num_tokens, slot)

        codec.encode = broken
        generate(llm, [p])
        assert transfer.num_unheard
        drain(llm)
        assert not objects(tmp_path), "nothing is written of which nothing is known"
        answer = generate(llm, [p])[0]
        assert answer.hit < 128, "the second object is no hit"
        assert answer.tokens == expected(p)
        assert not connector(llm).hook_errors
    with engine(tiers) as llm:
        answer = generate(llm, [p])[0]
        assert (answer.row["tier"], answer.tokens) == ("disk", expected(p))
        assert not connector(llm).hook_errors


def test_kinds_that_tell_k_from_v_are_refused_over_opaque_pages(monkeypatch):
    from kvlab.connectors.vllm import pages

    monkeypatch.setattr(pages, "understand", lambda scratch: Opaque("its swizzle"))
    told = pytest.raises(ConfigError, match="must tell K from V, and these pages are opaque: its swizzle")
    with told, engine(["memory://?size=64MiB&serde=int4"]):
        pass


def slots_by_name(llm):
    """What the slots of each object hold."""
    transfer, index = worker(llm).transfer, connector(llm).scheduler.index
    return {key: transfer.slots(entry.slots).clone() for key, entry in index._entries.items()}


def test_a_file_tier_holds_blocks_as_slots_do(tmp_path, expected):
    """What one engine stores another loads, decoded alike, and what is broken or forged is computed."""
    p, url = prompt(300), f"file://{tmp_path}?size=1GiB&serde=int4"
    with engine(["memory://?size=64MiB&serde=int4", url]) as llm:
        generate(llm, [p])
        drain(llm)
        memory, held = generate(llm, [p])[0], slots_by_name(llm)
        empty_memory(llm)
        disk = generate(llm, [p])[0]
        assert (memory.hit, memory.row["tier"], disk.hit, disk.row["tier"]) == (299, "memory", 299, "disk")
        assert memory.tokens == disk.tokens
        found = slots_by_name(llm)
        assert found.keys() == held.keys()
        assert all(found[key].equal(held[key]) for key in held)
    assert sum(path.stat().st_size for path in objects(tmp_path)) < 300 * TOKEN_BYTES / 5
    with engine([url]) as llm:  # without a memory tier, slots on the way to it hold the same
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (299, disk.tokens)
        sound = {path: path.read_bytes() for path in objects(tmp_path)}
        assert {header_of(value)["__metadata__"]["serde"] for value in sound.values()} == {"int4-blocks"}
        for damage in (flip_a_bit, cut_short, as_if_naive, of_another_codec, of_longer_slots):
            for path, value in sound.items():
                path.write_bytes(value)
                damage(path, [])
            answer = generate(llm, [p])[0]
            assert (answer.hit, answer.tokens) == (0, expected(p)), damage.__name__
            drain(llm)
        assert not connector(llm).hook_errors
    for other in ("int8", "naive"):
        with engine([url.replace("int4", other)]) as llm:
            assert generate(llm, [p])[0].hit == 0, "another namespace"


def test_raw_memory_above_a_lossy_tier_is_exact_and_knows_what_is_not(tmp_path, expected):
    p, longer = prompt(300), prompt(480)
    with engine(["memory://?size=64MiB", f"file://{tmp_path}?size=1GiB&serde=int4"]) as llm:
        generate(llm, [p])
        drain(llm)
        assert {header_of(path.read_bytes())["__metadata__"]["serde"] for path in objects(tmp_path)} == {"int4-blocks"}
        for hit in (299, 0, 299):  # in memory; in the tier alone; computed and in memory again
            answer = ask_exactly(llm, p)
            assert (answer.hit, answer.tokens) == (hit, expected(p))
            if hit and not connector(llm).scheduler.counters["miss_not_exact"]:
                empty_memory(llm)
        empty_memory(llm)
        assert generate(llm, [p])[0].row["tier"] == "disk"
        assert generate(llm, [p])[0].hit == 299
        assert generate(llm, [longer])[0].hit == 288
        for q in (p, longer):  # what the tier gave lies in memory, and what was computed behind it
            exact = ask_exactly(llm, q)
            assert (exact.hit, exact.row["miss"], exact.tokens) == (0, "not_exact", expected(q))
        assert not connector(llm).hook_errors


@pytest.mark.parametrize(
    ("tier", "serde", "dtype"),
    [("disk", "lossless", "bfloat16"), ("redis", "lossless", "float32"), ("redis", "int8", "bfloat16")],
)
def test_slots_come_back_from_a_tier_bit_by_bit(tier, serde, dtype, tmp_path, expected):
    with RedisServer() if tier == "redis" else nullcontext() as server:
        url = f"{server.url}?timeout_ms=60000&" if server is not None else f"file://{tmp_path}?size=1GiB&"
        memory = "memory://?size=128MiB" + ("" if serde == "lossless" else f"&serde={serde}")
        with engine([memory, f"{url}serde={serde}"], {"dtype": dtype}) as llm:
            for length in [*EDGES[2:], 300]:  # a secondary tier is asked for whole blocks, and what follows them
                empty_memory(llm)
                p = prompt(length)
                first = generate(llm, [p])[0].tokens
                drain(llm)
                held = slots_by_name(llm)
                empty_memory(llm)
                again = generate(llm, [p])[0]
                assert (again.hit, again.row["tier"]) == (length - 1, tier)
                assert dtype == "bfloat16" or first == again.tokens == expected(p)
                found = slots_by_name(llm)
                assert all(slots.equal(held[key]) for key, slots in found.items())
            assert not connector(llm).hook_errors


def resealed(path, *, longer=0, **changed):
    """The object with other metadata, or so many bytes more in each slot, sealed as its writer would."""
    header, data = header_of(path.read_bytes()), data_of(path.read_bytes())
    metadata, payload = header["__metadata__"], header["payload"]
    metadata.update(changed)
    payload["shape"][2] += longer
    metadata["shape"] = json.dumps(payload["shape"])
    payload["data_offsets"][1] += payload["shape"][0] * longer
    path.write_bytes(forged(header, data + bytes(payload["shape"][0] * longer)))


def as_if_naive(path, _others):
    resealed(path, serde="naive", params="{}")


def of_another_codec(path, _others):
    resealed(path, params='{"codec":"int4:k=token,v=token,group=64"}')


def of_longer_slots(path, _others):
    resealed(path, longer=256)
