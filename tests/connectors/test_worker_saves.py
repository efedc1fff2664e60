"""When a worker writes saved objects back: in steps that only decode, on an idle engine, or when the delay ends."""

import time

import pytest
import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.messages import Adapter, SaveOp, StepMetadata, WorkerReport
from kvlab.connectors.vllm.worker import write_back
from kvlab.connectors.vllm.worker.worker import PAGE_AXES, Worker
from kvlab.connectors.vllm.worker.write_back import DECODE_STEPS
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.stores import open_store

LAYERS, PAGE, BLOCKS = 3, 4096, 4
KEYS = [bytes([number]) * 32 for number in range(BLOCKS)]
GENERATIONS = [100 + block for block in range(BLOCKS)]
FOR_EVER_S = 600


def make_worker(max_delay_s):
    caches = {f"layer.{i}": torch.full((BLOCKS, PAGE), i + 1, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=BLOCKS, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    engine = CacheEngine(open_store("memory://?size=16MiB"), namespace=Namespace("m"), chunker=Chunker(32, 16))
    return Worker(CPUTransfer(layout, BLOCKS), BLOCKS, engine, max_write_delay_s=max_delay_s)


@pytest.fixture
def never_idle(monkeypatch):
    monkeypatch.setattr(write_back, "IDLE_S", FOR_EVER_S)


@pytest.fixture
def deferring(never_idle):
    worker = make_worker(FOR_EVER_S)
    yield worker
    worker.close()


def save_of(block, *, generation=None, slot=None):
    """The object of a page, in the slot of the same number."""
    slots = (block if slot is None else slot,)
    return SaveOp(KEYS[block], GENERATIONS[block] if generation is None else generation, slots, (block,), 0, 16, True)


def step(worker, *, prefill_tokens=0, saves=()):
    ops = [save_of(block) for block in saves]
    metadata = StepMetadata([], ops, prefill_tokens or 1, prefill_tokens)
    worker.begin(metadata)
    worker.save(metadata)


def written(worker):
    return worker.engine.contains_many(KEYS)


def settled(worker, count):
    """Wait for so many objects' hand-over."""
    return list(reported(worker, lambda report: len(report.written) >= count).written)


def reported(worker, enough):
    """What the worker reports until it is `enough`."""
    deadline, found = time.monotonic() + 30, WorkerReport()
    while not enough(found):
        assert time.monotonic() < deadline
        found.aggregate(worker.take_report() or WorkerReport())
        time.sleep(0.001)
    return found


def test_objects_wait_for_decode_steps(deferring):
    step(deferring, prefill_tokens=100, saves=[0, 1])
    for _ in range(DECODE_STEPS - 1):
        step(deferring)
    time.sleep(0.1)  # if it handed on now it would be seen
    assert written(deferring) == [False] * 4
    step(deferring)
    assert settled(deferring, 2) == GENERATIONS[:2]
    assert written(deferring) == [True, True, False, False]
    key, place = deferring.engine.namespace.key(KEYS[1]), {"first_token": 0, "end_token": 16}
    assert deferring.engine.load_object(key, axes=PAGE_AXES, **place).unique().tolist() == [1, 2, 3]


def test_a_prefill_begins_the_wait_anew(deferring):
    step(deferring, prefill_tokens=100, saves=[0])
    for _ in range(DECODE_STEPS - 1):
        step(deferring)
    step(deferring, prefill_tokens=1, saves=[1])
    for _ in range(DECODE_STEPS - 1):
        step(deferring)
    time.sleep(0.1)
    assert written(deferring) == [False] * 4
    step(deferring)
    assert settled(deferring, 2) == GENERATIONS[:2]


def test_what_is_saved_in_decode_steps_is_written_at_once(deferring):
    """Generated tokens' objects."""
    step(deferring, saves=[2])
    assert settled(deferring, 1) == [GENERATIONS[2]]


def test_an_idle_engine_writes():
    worker = make_worker(FOR_EVER_S)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == GENERATIONS
    worker.close()


def test_a_write_is_deferred_no_longer_than_its_bound(never_idle):
    worker = make_worker(0.05)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == GENERATIONS
    worker.close()


def test_closing_writes_what_waits(never_idle):
    worker = make_worker(FOR_EVER_S)
    held = []
    worker.engine.store.close = lambda: held.append(written(worker))
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    worker.close()
    assert held == [[True] * 4]


def test_slots_that_another_object_was_given_are_not_written_under_the_first_name(deferring):
    """Whatever the scheduler does: the slots' generation is looked at before the bytes are taken, and after."""
    step(deferring, prefill_tokens=100, saves=[0])
    metadata = StepMetadata([], [save_of(1, slot=0)], 1, 0)  # the first one's write still waits
    deferring.begin(metadata)
    deferring.save(metadata)
    for _ in range(DECODE_STEPS):
        step(deferring)
    report = reported(deferring, lambda report: len(report.written) == 2)
    assert report.failed_writes == {GENERATIONS[0]}
    assert written(deferring) == [False, True, False, False]


def test_slots_that_change_while_they_are_read_are_not_written(deferring, monkeypatch):
    original = deferring.transfer.slots

    def given_away(slots):
        taken = original(slots)
        deferring._owner[slots[0]] = 7  # the next object's copy begins meanwhile
        return taken

    monkeypatch.setattr(deferring.transfer, "slots", given_away)
    step(deferring, saves=[3])
    report = reported(deferring, lambda report: report.written)
    assert report.failed_writes == {GENERATIONS[3]}
    assert written(deferring) == [False] * 4
    assert deferring.engine.stats()["save_failed_overwritten"] == 1


def test_a_write_that_raises_no_exception_ends(deferring, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(*args, **kwargs):
        raise Panic("planted")

    monkeypatch.setattr(deferring.engine.store, "put", panic)
    step(deferring, saves=[1])
    report = reported(deferring, lambda report: report.written)
    assert report.failed_writes == {GENERATIONS[1]}, "its lease ends"


def test_a_save_that_fails_after_the_slots_were_given_to_it_leaves_nothing_in_them(deferring, monkeypatch):
    step(deferring, saves=[0])
    assert settled(deferring, 1) == GENERATIONS[:1]
    monkeypatch.setattr(deferring.transfer, "save", lambda *_: 1 / 0)
    metadata = StepMetadata([], [save_of(1, slot=0)], 1, 0)
    deferring.begin(metadata)
    deferring.save(metadata)
    report = reported(deferring, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[1]}, {GENERATIONS[1]})
    assert deferring._owner[0] is None


def test_pages_of_another_adapter_than_the_name_says_are_not_saved(deferring):
    op = save_of(0)
    op.adapter = Adapter(adapter_id=12345, num_loads=1)  # none was loaded
    metadata = StepMetadata([], [op], 1, 0)
    deferring.begin(metadata)
    deferring.save(metadata)
    report = reported(deferring, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[0]}, {GENERATIONS[0]})
    assert written(deferring) == [False] * 4


def test_unclean_pages_are_cleared_before_the_step(deferring):
    metadata = StepMetadata(num_tokens=1, unclean_blocks=[2])
    deferring.begin(metadata)
    for layer, pages in enumerate(deferring.transfer.layout.pages):
        assert [pages[block].unique().tolist() for block in range(BLOCKS)] == [[layer + 1]] * 2 + [[0], [layer + 1]]


def test_where_pages_could_not_be_cleared_nothing_is_saved_any_more(deferring, monkeypatch):
    monkeypatch.setattr(deferring.transfer, "clear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deferring.begin(StepMetadata(num_tokens=1, unclean_blocks=[2]))
    step(deferring, saves=[2])
    report = reported(deferring, lambda report: report.written)
    assert (report.failed_writes, report.broken) == ({GENERATIONS[2]}, {GENERATIONS[2]})
    assert written(deferring) == [False] * 4
