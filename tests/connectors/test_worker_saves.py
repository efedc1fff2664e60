"""What a worker saves, and what of it its tier worker writes to the secondary tiers."""

import time

import pytest
import torch

from kvlab.connectors.vllm.messages import Adapter, SaveOp, StepMetadata, WorkerReport
from kvlab.connectors.vllm.worker.worker import Worker
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.sharedmemory import SharedSlots
from kvlab.stores import open_store
from kvlab.tierworker import client as client_module
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Memory, Opening
from kvlab.tierworker.slots import MappedSlots
from tests.support.gate import Gate
from tests.support.tiers import workers_in_threads

LAYERS, PAGE, BLOCKS = 3, 4096, 4
KEYS = [bytes([number]) * 16 for number in range(BLOCKS)]
GENERATIONS = [100 + block for block in range(BLOCKS)]
OPENING = Opening([], "naive", None, [{"model": "m", "fields": {}}])


@pytest.fixture
def worker():
    caches = {f"layer.{i}": torch.full((BLOCKS, PAGE), i + 1, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=BLOCKS, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    shared = SharedSlots(BLOCKS, layout.block_bytes)
    with workers_in_threads(open_store("memory://?size=16MiB")):
        tiers = TierClient(OPENING)
    tiers.share(Memory(BLOCKS, LAYERS, PAGE), shared)
    worker = Worker(CPUTransfer(layout, BLOCKS, shared=shared), BLOCKS, tiers, shared)
    yield worker
    worker.close()


def objects_of(worker):
    return worker.tiers._worker.server.objects


def save_of(block, *, generation=None, slot=None):
    """The object of a page, in the slot of the same number."""
    slots = (block if slot is None else slot,)
    return SaveOp(KEYS[block], GENERATIONS[block] if generation is None else generation, slots, (block,), 0, 16, True)


def step(worker, *, saves=()):
    save(worker, [save_of(block) for block in saves])


def save(worker, ops):
    metadata = StepMetadata([], ops, 1, 0)
    worker.begin(metadata)
    worker.save(metadata)


def written(worker):
    return objects_of(worker).contains_many(KEYS)


def settled(worker, count):
    """The objects whose writes ended, once they are so many."""
    return sorted(reported(worker, lambda report: len(report.written) >= count).written)


def reported(worker, enough):
    """What the worker reports until it is `enough`."""
    deadline, found = time.monotonic() + 30, WorkerReport()
    while not enough(found):
        assert time.monotonic() < deadline
        worker.poll()
        found.aggregate(worker.take_report() or WorkerReport())
        time.sleep(0.001)
    return found


def test_what_is_saved_is_written(worker):
    step(worker, saves=[0, 2])
    assert settled(worker, 2) == [GENERATIONS[0], GENERATIONS[2]]
    assert written(worker) == [True, False, True, False]
    out = torch.zeros((1, LAYERS, PAGE), dtype=torch.uint8).numpy()
    objects = objects_of(worker)
    assert objects.load(objects.namespace.key(KEYS[2]), out, first_token=0, end_token=16)
    assert [layer.tolist() == [layer[0]] * PAGE for layer in out[0]] == [True] * LAYERS
    assert [int(layer[0]) for layer in out[0]] == [1, 2, 3]


def test_closing_writes_what_waits(worker):
    objects, held = objects_of(worker), []
    objects.store.close = lambda: held.append(objects.contains_many(KEYS))
    step(worker, saves=range(BLOCKS))
    worker.close()
    assert held == [[True] * 4]


def test_slots_that_another_object_was_given_are_not_written_under_the_first_name(worker):
    """Whatever the scheduler does: the slots' generation is looked at before the bytes are taken, and after."""
    gate = objects_of(worker).store = Gate(objects_of(worker).store)
    step(worker, saves=[2, 3])  # both threads wait for the store
    save(worker, [save_of(0)])
    save(worker, [save_of(1, slot=0)])
    gate.is_open.set()
    report = reported(worker, lambda report: len(report.written) == 4)
    assert report.failed_writes == {GENERATIONS[0]}
    assert written(worker) == [False, True, True, True]


def test_slots_that_change_while_they_are_read_are_not_written(worker, monkeypatch):
    original = MappedSlots.content

    def given_away(self, runs):
        taken = original(self, runs)
        worker._disown([3])  # the next object's copy begins meanwhile
        return taken

    monkeypatch.setattr(MappedSlots, "content", given_away)
    step(worker, saves=[3])
    report = reported(worker, lambda report: report.written)
    assert report.failed_writes == {GENERATIONS[3]}
    assert written(worker) == [False] * 4
    assert objects_of(worker).stats()["save_failed_overwritten"] == 1


def test_a_write_waits_for_the_copy_that_fills_its_slots(worker, monkeypatch):
    """As on a GPU, whose copies end later than the call."""
    monkeypatch.setattr(worker.transfer, "mark_saved", lambda number: None)
    step(worker, saves=[1])
    time.sleep(0.05)  # if it did not wait it would be seen
    assert written(worker) == [False] * 4
    worker._shared.copied[0] = 1
    assert settled(worker, 1) == [GENERATIONS[1]]
    assert written(worker) == [False, True, False, False]


def test_more_writes_than_may_wait_are_dropped_and_counted(worker, monkeypatch):
    monkeypatch.setattr(client_module, "MAX_WRITES", 2)
    gate = objects_of(worker).store = Gate(objects_of(worker).store)
    step(worker, saves=range(BLOCKS))
    gate.is_open.set()
    report = reported(worker, lambda report: len(report.written) == 4)
    assert report.failed_writes == {GENERATIONS[2], GENERATIONS[3]}
    worker.poll()
    assert (report.events["writes_dropped"], written(worker)) == (2, [True, True, False, False])


def test_a_write_that_raises_no_exception_ends(worker, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(*args, **kwargs):
        raise Panic("planted")

    monkeypatch.setattr(objects_of(worker).store, "put", panic)
    step(worker, saves=[1])
    report = reported(worker, lambda report: report.written)
    assert report.failed_writes == {GENERATIONS[1]}, "its lease ends"


def test_a_save_that_fails_after_the_slots_were_given_to_it_leaves_nothing_in_them(worker, monkeypatch):
    step(worker, saves=[0])
    assert settled(worker, 1) == GENERATIONS[:1]
    monkeypatch.setattr(worker.transfer, "save", lambda *_: 1 / 0)
    metadata = StepMetadata([], [save_of(1, slot=0)], 1, 0)
    worker.begin(metadata)
    worker.save(metadata)
    report = reported(worker, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[1]}, {GENERATIONS[1]})
    assert worker._owner[0] is None


def test_pages_of_another_adapter_than_the_name_says_are_not_saved(worker):
    op = save_of(0)
    op.adapter = Adapter(adapter_id=12345, num_loads=1)  # none was loaded
    metadata = StepMetadata([], [op], 1, 0)
    worker.begin(metadata)
    worker.save(metadata)
    report = reported(worker, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[0]}, {GENERATIONS[0]})
    assert written(worker) == [False] * 4


def test_unclean_pages_are_cleared_before_the_step(worker):
    metadata = StepMetadata(num_tokens=1, unclean_blocks=[2])
    worker.begin(metadata)
    for layer, pages in enumerate(worker.transfer.layout.pages):
        assert [pages[block].unique().tolist() for block in range(BLOCKS)] == [[layer + 1]] * 2 + [[0], [layer + 1]]


def test_where_pages_could_not_be_cleared_nothing_is_saved_any_more(worker, monkeypatch):
    monkeypatch.setattr(worker.transfer, "clear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.begin(StepMetadata(num_tokens=1, unclean_blocks=[2]))
    step(worker, saves=[2])
    report = reported(worker, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[2]}, {GENERATIONS[2]})
    assert written(worker) == [False] * 4
