"""A worker's loads from secondary tiers: objects side by side, holes, and errors in the middle."""

import threading
import time

import pytest
import torch

from kvlab.connectors.vllm.messages import LoadOp, RequestLoad, StepMetadata
from kvlab.connectors.vllm.worker.worker import Worker
from kvlab.hashing import Namespace
from kvlab.page_objects import PageObjects
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.sharedmemory import SharedSlots
from kvlab.stores import open_store
from kvlab.stores.wrappers import WrapperStore
from kvlab.tierworker import server as server_module
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Memory, Opening
from tests.support.gate import Gate
from tests.support.tiers import workers_in_threads

LAYERS, PAGE, BLOCKS, OBJECTS = 3, 4096, 2, 6
OPENING = Opening([], "naive", None, [{"model": "m", "fields": {}}])


class Meeting(WrapperStore):
    """A read goes on only when another one has begun too."""

    barrier = threading.Barrier(2)

    def get_pieces(self, key, out):
        self.barrier.wait(timeout=20)
        return super().get_pieces(key, out)


@pytest.fixture
def worker(tmp_path):
    num_blocks = BLOCKS * OBJECTS
    caches = {f"layer.{i}": torch.zeros(num_blocks, PAGE, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=num_blocks, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    store = open_store(f"file://{tmp_path}?size=16MiB")
    objects = PageObjects(store, namespace=Namespace("m"))
    for number in range(OBJECTS):
        assert objects.save(objects.namespace.key(name(number)), content(number), **place(number))
    shared = SharedSlots(num_blocks, layout.block_bytes)
    with workers_in_threads(store):
        tiers = TierClient(OPENING)
    tiers.share(Memory(num_blocks, LAYERS, PAGE), shared)
    worker = Worker(CPUTransfer(layout, num_blocks, shared=shared), num_blocks, tiers, shared)
    yield worker
    worker.close()


def objects_of(worker):
    return worker.tiers._worker.server.objects


def behind_a_gate(worker):
    """Its store answers once the gate is open."""
    gate = objects_of(worker).store = Gate(objects_of(worker).store)
    return gate


def name(number):
    return bytes([number]) * 16


def place(number):
    return {"first_token": number * 32, "end_token": number * 32 + 32}


def content(number):
    return torch.full((BLOCKS, LAYERS, PAGE), number + 1, dtype=torch.uint8).numpy()


def begin_load(worker, order=range(OBJECTS * BLOCKS)):
    """One request's load of all objects, into the pages in order; slots in `order`."""
    slots = list(order)
    ops = []
    for number in range(OBJECTS):
        mine = tuple(slots[number * BLOCKS : (number + 1) * BLOCKS])
        pages = tuple(range(number * BLOCKS, (number + 1) * BLOCKS))
        ops.append(LoadOp(name(number), number, mine, mine, pages, **place(number), num_tokens=32, fetch=True))
    worker.load(StepMetadata([RequestLoad("r", ops, 192, is_async=True)]))


def load(worker, order=range(OBJECTS * BLOCKS)):
    """The same, to its end. What was lost."""
    begin_load(worker, order)
    deadline = time.monotonic() + 30
    while not (ended := worker.take_finished())[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    lost = worker.take_lost_blocks()
    assert ended == ({"r"}, {"r"} if lost else set())
    return lost


def filled(worker):
    """Of each object, whether its pages hold it; they hold nothing else than it or zeros."""
    found = []
    for number in range(OBJECTS):
        pages = [layer[number * BLOCKS : (number + 1) * BLOCKS] for layer in worker.transfer.layout.pages]
        values = {int(value) for layer in pages for value in layer.unique()}
        assert values in ({0}, {number + 1})
        found.append(values != {0})
    return found


@pytest.mark.parametrize("order", [range(OBJECTS * BLOCKS), [11, 0, 10, 1, 9, 2, 8, 3, 7, 4, 6, 5]])
def test_objects_come_side_by_side(worker, order):
    objects_of(worker).store = Meeting(objects_of(worker).store)
    assert load(worker, order) == set()
    assert filled(worker) == [True] * OBJECTS


def test_what_follows_a_hole_is_lost_and_stays_for_the_next(worker):
    store, key = objects_of(worker).store, Namespace("m").key(name(2))
    store.delete(key)
    assert load(worker) == set(range(2 * BLOCKS, OBJECTS * BLOCKS))
    assert filled(worker) == [True, True] + [False] * 4
    report = worker.take_report()
    assert (report.absent, report.broken) == ({name(2)}, {2})
    assert (report.loaded["r"], report.rows[0].num_tokens) == (1, 64)
    owners = [worker._owner[number * BLOCKS] for number in range(OBJECTS)]
    assert owners == [number if number != 2 else None for number in range(OBJECTS)]


def test_an_error_in_a_read_is_a_hole(worker, monkeypatch):
    original = PageObjects.load

    def broken(self, key, out, **expected):
        if key == Namespace("m").key(name(4)):
            raise RuntimeError("planted")
        return original(self, key, out, **expected)

    monkeypatch.setattr(PageObjects, "load", broken)
    assert load(worker) == set(range(4 * BLOCKS, OBJECTS * BLOCKS))
    assert filled(worker) == [True] * 4 + [False] * 2
    report = worker.take_report()
    assert (report.absent, report.broken) == ({name(4)}, {4})


class Panic(BaseException):
    """As raised by some packages that are no Python: no Exception."""


def test_what_is_no_exception_is_a_hole_too(worker, monkeypatch):
    def panic(*args, **kwargs):
        raise Panic("planted")

    monkeypatch.setattr(objects_of(worker).store, "get_pieces", panic)
    assert load(worker) == set(range(OBJECTS * BLOCKS))
    assert worker.take_report().loaded["r"] == 1


def test_a_load_that_takes_too_long_is_lost_and_writes_no_page(worker):
    gate = behind_a_gate(worker)
    worker._load_timeout_s = 0.0
    begin_load(worker)
    worker.begin(StepMetadata())
    assert worker.take_finished() == ({"r"}, {"r"})
    assert worker.take_lost_blocks() == set(range(OBJECTS * BLOCKS))
    report = worker.take_report()
    assert [(request_id, tokens) for request_id, _, tokens, _ in report.overdue] == [("r", OBJECTS * 32)]
    assert not report.loaded, "the tier worker may still write to the slots, whose leases go on"
    worker.begin(StepMetadata())
    assert worker.take_finished() == (set(), set()), "told once"
    gate.is_open.set()
    deadline = time.monotonic() + 30
    while (report := worker.take_report()) is None or not report.loaded:
        assert time.monotonic() < deadline
        worker.poll()
        time.sleep(0.001)
    assert worker.take_finished() == (set(), set())
    assert worker.take_lost_blocks() == set()
    assert filled(worker) == [False] * OBJECTS, "the pages may be another request's by now"


def begin_copy(worker, request_id):
    """A load of the first object from slots of host memory that hold it."""
    slots, pages = (0, 1), (0, 1)
    for slot in slots:
        worker._owner[slot] = 7
    op = LoadOp(name(0), 7, slots, slots, pages, **place(0), num_tokens=32)
    worker.load(StepMetadata([RequestLoad(request_id, [op], 32, is_async=True)]))


def test_loads_from_memory_wait_for_no_tier(worker):
    gate = behind_a_gate(worker)
    for request_id in ("stuck", "stuck too", "stuck as well"):
        op = LoadOp(name(1), 8, (2, 3), (2, 3), (2, 3), **place(1), num_tokens=32, fetch=True)
        worker.load(StepMetadata([RequestLoad(request_id, [op], 32, is_async=True)]))
    begin_copy(worker, "from memory")
    deadline = time.monotonic() + 30
    while not (ended := worker.take_finished())[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert ended == ({"from memory"}, set())
    gate.is_open.set()


def test_an_overdue_load_says_what_it_waited_for(worker):
    gate = behind_a_gate(worker)
    worker._load_timeout_s = 0.0
    begin_load(worker)
    worker.begin(StepMetadata())
    assert [tier for _, tier, _, _ in worker.take_report().overdue] == ["secondary"]
    gate.is_open.set()


def test_closing_leaves_a_stuck_tier_alone(worker, monkeypatch):
    for name in ("READ_STALL_S", "STALL_S", "ABANDON_S"):
        monkeypatch.setattr(server_module, name, 0.05)
    closed = []
    monkeypatch.setattr(worker.transfer, "close", lambda: closed.append(True))
    gate = behind_a_gate(worker)
    begin_load(worker)
    worker.close()
    assert closed == [], "a thread may still write to the arena"
    gate.is_open.set()
    while not worker.tiers._worker.is_dead:
        time.sleep(0.001)
    worker.close()
    assert closed == [True]


def test_slots_given_away_while_they_are_read_are_lost(worker, monkeypatch):
    """From the first object on whose slots are of another generation after the copy."""
    original = worker.transfer.load_aside

    def given_away(slots, pages, after=None):
        worker._owner[3 * BLOCKS] = 99
        return original(slots, pages, after)

    monkeypatch.setattr(worker.transfer, "load_aside", given_away)
    assert load(worker) == set(range(3 * BLOCKS, OBJECTS * BLOCKS))
    report = worker.take_report()
    assert (report.broken, report.absent, report.rows[0].num_tokens) == ({3}, set(), 96)


def test_a_load_that_a_reset_overtakes_is_lost(worker, monkeypatch):
    """The weights may have changed meanwhile."""
    original = worker.transfer.load_aside

    def overtaken(slots, pages, after=None):
        worker._version = "another"
        return original(slots, pages, after)

    monkeypatch.setattr(worker.transfer, "load_aside", overtaken)
    assert load(worker) == set(range(OBJECTS * BLOCKS))
    assert worker.take_report().rows[0].num_tokens == 0
