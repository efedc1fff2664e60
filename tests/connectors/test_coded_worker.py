"""A worker whose slots hold coded blocks, and a tier below them."""

import json
import time

import pytest
import torch

from kvlab.codecs.blocks import BlockCodec
from kvlab.codecs.transfer import open_coded_transfer
from kvlab.connectors.vllm.messages import LoadOp, RequestLoad, SaveOp, StepMetadata
from kvlab.connectors.vllm.worker.worker import Worker
from kvlab.errors import ConfigError
from kvlab.hashing import Namespace
from kvlab.page_objects import PageObjects
from kvlab.paged import PageMap, open_transfer
from kvlab.serde import get_serde
from kvlab.sharedmemory import SharedSlots
from kvlab.stores import open_store
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Memory, Opening
from tests.support.tiers import workers_in_threads
from tests.test_codec_staging import engine
from tests.test_page_codecs import LAYERS, filled, page_map_of

SPEC = get_serde("int4").spec
BLOCK, SLOTS = 16, 12
NAMES = [bytes([number]) * 16 for number in range(3)]
# Two blocks, one block, and five tokens of one: the slots, the pages they are saved from, and the tokens.
SAVES = [((0, 1), (2, 3), (0, 32)), ((2,), (4,), (32, 48)), ((3,), (5,), (48, 53))]


def worker_over(slots):
    """A worker with these codecs of its slots, and of the tier."""
    page_map = page_map_of("CPU vec", element=torch.float32)
    typed = engine(page_map)
    pages, _ = filled(page_map, 4 * BLOCK)
    for layer, view in enumerate(typed.layout.pages):
        view[2:6] = pages[:, layer]
        view[5] = 0
    page_map.write(filled(page_map, 5)[1], last := torch.zeros(1, LAYERS, page_map.page_bytes, dtype=torch.uint8))
    for layer, view in enumerate(typed.layout.pages):
        view[5] = last[0, layer]  # a block that is filled in part is clean behind its tokens
    codec = BlockCodec(get_serde(SPEC), page_map, LAYERS)
    with workers_in_threads(open_store("memory://?size=16MiB&pinned=false")):
        tiers = TierClient(Opening([], SPEC, None, [{"model": "m", "fields": {}}], slots))
    if slots == "naive":
        shared = SharedSlots(SLOTS, typed.layout.block_bytes)
        tiers.share(Memory(SLOTS, LAYERS, page_map.page_bytes, page_map.as_json()), shared)
        transfer = open_transfer(typed.layout, SLOTS, staging_bytes=0, shared=shared)
    else:
        shared = SharedSlots(SLOTS, codec.slot_bytes)
        tiers.share(Memory(SLOTS, 1, codec.slot_bytes), shared)
        transfer = open_coded_transfer(typed.layout, codec, SLOTS, staging_bytes=0, shared=shared)
    return Worker(transfer, SLOTS, tiers, shared), codec


@pytest.fixture(params=[SPEC, "naive"], ids=["coded slots", "raw slots"])
def coded(request):
    worker, codec = worker_over(request.param)
    yield worker, codec
    worker.close()


def save(worker):
    ops = [
        SaveOp(name, at + 1, slots, pages, *tokens, write=True)
        for at, (name, (slots, pages, tokens)) in enumerate(zip(NAMES, SAVES, strict=True))
    ]
    worker.save(StepMetadata(saves=ops))
    deadline = time.monotonic() + 30
    while worker.tiers.has_waiting:
        assert time.monotonic() < deadline
        worker.tiers.wait(0.05)
        worker.poll()


def load(worker, first_slot=4, to=6):
    """All objects from the tier, into other slots and pages."""
    ops = []
    for at, (name, (slots, pages, tokens)) in enumerate(zip(NAMES, SAVES, strict=True)):
        mine = tuple(slot + first_slot for slot in slots)
        into = tuple(page - 2 + to for page in pages)
        ops.append(LoadOp(name, at + 10, mine, mine, into, *tokens, num_tokens=tokens[1] - tokens[0], fetch=True))
    worker.load(StepMetadata([RequestLoad("r", ops, 53, is_async=True)]))
    deadline = time.monotonic() + 30
    while not worker.take_finished()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return worker.take_lost_blocks()


def test_what_goes_down_a_tier_comes_back_as_the_twin_has_it(coded):
    worker, codec = coded
    save(worker)
    pages = worker.transfer.layout.pages
    for layer in pages:
        layer[6:10] = 0x5A
    assert load(worker) == set()
    if worker.transfer.coded_tokens:
        assert worker.transfer.slots(range(4)).equal(worker.transfer.slots(range(4, 8)))
    for page, tokens in [(2, 16), (3, 16), (4, 16), (5, 5)]:
        slot = torch.empty(codec.slot_bytes, dtype=torch.uint8)
        codec.encode(torch.stack([layer[page] for layer in pages]), tokens, slot)
        want = torch.empty(LAYERS, codec.map.page_bytes, dtype=torch.uint8)
        codec.decode(slot, tokens, want)
        assert torch.stack([layer[page + 4] for layer in pages]).equal(want)
    assert sum(worker.take_report().written.values()) == 3


def test_a_block_that_holds_a_nan_is_not_kept_and_its_neighbours_are(coded):
    worker, _ = coded
    for layer in worker.transfer.layout.pages:
        layer.view(torch.float32)[4] = float("nan")
    save(worker)
    report = worker.take_report()
    assert report.failed_writes == {2}
    assert report.broken == ({2} if worker.transfer.coded_tokens else set()), "raw slots hold it all the same"
    assert load(worker) == {8, 9}, "from the object on that is missing"


def test_slots_of_one_codec_are_not_those_of_another():
    with pytest.raises(ConfigError, match="tiers below slots of int8 must hold the same, got int4"):
        PageObjects("memory://?size=1MiB", namespace=Namespace("m"), serde="int4", slots="int8")


def test_a_map_that_others_tell_is_checked_before_anything_is_made_of_it():
    told = page_map_of("CPU amx").as_json()
    assert PageMap.of(json.loads(json.dumps(told))) == page_map_of("CPU amx")
    huge = [list(range(3000))] * 3
    for wrong in (
        None,
        [],
        {},
        {**told, "element": "nonsense"},
        {**told, "planes": [[[0], [0]]]},
        {**told, "planes": 5},
        {**told, "planes": [huge, huge]},
        {**told, "page_bytes": 64},
        {**told, "planes": [[["x"], [0], [0]]]},
    ):
        with pytest.raises(ConfigError):
            PageMap.of(wrong)
