"""A worker's loads from secondary tiers: objects side by side, holes, and errors in the middle."""

import threading
import time

import pytest
import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.messages import LoadOp, RequestLoad, StepMetadata
from kvlab.connectors.vllm.worker import worker as worker_module
from kvlab.connectors.vllm.worker.worker import PAGE_AXES, Worker
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.stores import open_store
from kvlab.stores.wrappers import WrapperStore
from tests.support.gate import Gate

LAYERS, PAGE, BLOCKS, OBJECTS = 3, 4096, 2, 6


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
    engine = CacheEngine(open_store(f"file://{tmp_path}?size=16MiB"), namespace=Namespace("m"), chunker=Chunker(32, 16))
    for number in range(OBJECTS):
        assert engine.save_object(engine.namespace.key(name(number)), content(number), PAGE_AXES, **place(number))
    worker = Worker(CPUTransfer(layout, num_blocks), num_blocks, engine)
    yield worker
    worker.close()


def name(number):
    return bytes([number]) * 32


def place(number):
    return {"first_token": number * 32, "end_token": number * 32 + 32}


def content(number):
    return torch.full((BLOCKS, LAYERS, PAGE), number + 1, dtype=torch.uint8)


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
    worker.engine.store = Meeting(worker.engine.store)
    assert load(worker, order) == set()
    assert filled(worker) == [True] * OBJECTS


def test_what_follows_a_hole_is_lost_and_stays_for_the_next(worker):
    store, key = worker.engine.store, worker.engine.namespace.key(name(2))
    store.delete(key)
    assert load(worker) == set(range(2 * BLOCKS, OBJECTS * BLOCKS))
    assert filled(worker) == [True, True] + [False] * 4
    report = worker.take_report()
    assert (report.absent, report.broken) == ({name(2)}, {2})
    assert (report.loaded["r"], report.rows[0].num_tokens) == (1, 64)
    owners = [worker._owner[number * BLOCKS] for number in range(OBJECTS)]
    assert owners == [number if number != 2 else None for number in range(OBJECTS)]


def test_an_error_in_a_read_is_a_hole(worker, monkeypatch):
    original = worker.engine.load_object

    def broken(key, out=None, **expected):
        if key == worker.engine.namespace.key(name(4)):
            raise RuntimeError("planted")
        return original(key, out, **expected)

    monkeypatch.setattr(worker.engine, "load_object", broken)
    assert load(worker) == set(range(4 * BLOCKS, OBJECTS * BLOCKS))
    assert filled(worker) == [True] * 4 + [False] * 2
    assert worker.counters["fetch_errors"] == 1
    report = worker.take_report()
    assert (report.absent, report.broken) == ({name(4)}, {4})


class Panic(BaseException):
    """As raised by some packages that are no Python: no Exception."""


def test_what_is_no_exception_is_a_hole_too(worker, monkeypatch):
    def panic(*args, **kwargs):
        raise Panic("planted")

    monkeypatch.setattr(worker.engine.store, "get_pieces", panic)
    assert load(worker) == set(range(OBJECTS * BLOCKS))
    assert worker.take_report().loaded["r"] == 1


def test_a_load_that_takes_too_long_is_lost_and_writes_no_page(worker):
    gate = Gate(worker.engine.store)
    worker.engine.store = gate
    worker._load_timeout_s = 0.0
    begin_load(worker)
    worker.begin(StepMetadata())
    assert worker.take_finished() == ({"r"}, {"r"})
    assert worker.take_lost_blocks() == set(range(OBJECTS * BLOCKS))
    report = worker.take_report()
    assert [(request_id, tokens) for request_id, _, tokens, _ in report.overdue] == [("r", OBJECTS * 32)]
    assert not report.loaded, "the thread may still write to the slots, whose leases go on"
    worker.begin(StepMetadata())
    assert worker.take_finished() == (set(), set()), "told once"
    gate.is_open.set()
    deadline = time.monotonic() + 30
    while (report := worker.take_report()) is None or not report.loaded:
        assert time.monotonic() < deadline
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
    gate = Gate(worker.engine.store)
    worker.engine.store = gate
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
    gate = Gate(worker.engine.store)
    worker.engine.store = gate
    worker._load_timeout_s = 0.0
    begin_load(worker)
    worker.begin(StepMetadata())
    assert [tier for _, tier, _, _ in worker.take_report().overdue] == ["secondary"]
    gate.is_open.set()


def test_closing_leaves_a_stuck_tier_alone(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "LOAD_STALL_S", 0.05)
    monkeypatch.setattr(worker_module, "STALL_S", 0.05)
    closed = []
    monkeypatch.setattr(worker.transfer, "close", lambda: closed.append(True))
    gate = Gate(worker.engine.store)
    worker.engine.store = gate
    begin_load(worker)
    worker.close()
    assert closed == [], "a thread may still write to the arena"
    gate.is_open.set()
    while any(thread.is_alive() for pool in (worker._loads, worker._fetches) for thread in pool._threads):
        time.sleep(0.001)
    worker.close()
    assert closed == [True]


def test_slots_given_away_while_they_are_read_are_lost(worker, monkeypatch):
    """From the first object on whose slots are of another generation after the copy."""
    original = worker.transfer.load_and_wait

    def given_away(slots, pages, after=None):
        original(slots, pages, after)
        worker._owner[3 * BLOCKS] = 99

    monkeypatch.setattr(worker.transfer, "load_and_wait", given_away)
    assert load(worker) == set(range(3 * BLOCKS, OBJECTS * BLOCKS))
    report = worker.take_report()
    assert (report.broken, report.absent, report.rows[0].num_tokens) == ({3}, set(), 96)


def test_a_load_that_a_reset_overtakes_is_lost(worker, monkeypatch):
    """The weights may have changed meanwhile."""
    original = worker.transfer.load_and_wait

    def overtaken(slots, pages, after=None):
        original(slots, pages, after)
        worker.begin(StepMetadata(version="another"))

    monkeypatch.setattr(worker.transfer, "load_and_wait", overtaken)
    assert load(worker) == set(range(OBJECTS * BLOCKS))
    assert worker.take_report().rows[0].num_tokens == 0
