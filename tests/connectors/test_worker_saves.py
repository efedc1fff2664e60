"""When a worker hands saved objects on to secondary tiers: in quiet steps, on an idle engine, or when patience ends."""

import time

import pytest
import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.messages import Adapter, SaveOp, StepMetadata, WorkerReport
from kvlab.connectors.vllm.worker import worker as workers
from kvlab.connectors.vllm.worker.worker import PAGE_AXES, QUIET_AFTER, Worker
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.stores import open_store

LAYERS, PAGE, BLOCKS = 3, 4096, 4
KEYS = [bytes([number]) * 32 for number in range(BLOCKS)]
GENERATIONS = [100 + block for block in range(BLOCKS)]
FOR_EVER_S = 600


def make_worker(patience_s):
    caches = {f"layer.{i}": torch.full((BLOCKS, PAGE), i + 1, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=BLOCKS, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    engine = CacheEngine(open_store("memory://?size=16MiB"), namespace=Namespace("m"), chunker=Chunker(32, 16))
    return Worker(CPUTransfer(layout, BLOCKS), BLOCKS, engine, patience_s=patience_s)


@pytest.fixture
def never_idle(monkeypatch):
    monkeypatch.setattr(workers, "IDLE_S", FOR_EVER_S)


@pytest.fixture
def patient(never_idle):
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


def handed_on(worker):
    return worker.engine.contains_many(KEYS)


def settled(worker, count):
    """Wait for so many objects' hand-over."""
    return list(reported(worker, lambda report: len(report.settled) >= count).settled)


def reported(worker, enough):
    """What the worker reports until it is `enough`."""
    deadline, found = time.monotonic() + 30, WorkerReport()
    while not enough(found):
        assert time.monotonic() < deadline
        found.aggregate(worker.take_report() or WorkerReport())
        time.sleep(0.001)
    return found


def test_objects_wait_for_quiet_steps(patient):
    step(patient, prefill_tokens=100, saves=[0, 1])
    for _ in range(QUIET_AFTER - 1):
        step(patient)
    time.sleep(0.1)  # if it handed on now it would be seen
    assert handed_on(patient) == [False] * 4
    step(patient)
    assert settled(patient, 2) == GENERATIONS[:2]
    assert handed_on(patient) == [True, True, False, False]
    key, place = patient.engine.namespace.key(KEYS[1]), {"first_token": 0, "end_token": 16}
    assert patient.engine.load_object(key, axes=PAGE_AXES, **place).unique().tolist() == [1, 2, 3]


def test_a_prefill_begins_the_wait_anew(patient):
    step(patient, prefill_tokens=100, saves=[0])
    for _ in range(QUIET_AFTER - 1):
        step(patient)
    step(patient, prefill_tokens=1, saves=[1])
    for _ in range(QUIET_AFTER - 1):
        step(patient)
    time.sleep(0.1)
    assert handed_on(patient) == [False] * 4
    step(patient)
    assert settled(patient, 2) == GENERATIONS[:2]


def test_what_is_saved_in_quiet_steps_is_handed_on_at_once(patient):
    """Generated tokens' objects."""
    step(patient, saves=[2])
    assert settled(patient, 1) == [GENERATIONS[2]]


def test_an_idle_engine_is_quiet():
    worker = make_worker(FOR_EVER_S)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == GENERATIONS
    worker.close()


def test_patience_ends_where_no_quiet_step_comes(never_idle):
    worker = make_worker(0.05)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == GENERATIONS
    worker.close()


def test_closing_hands_on_what_still_waits(never_idle):
    worker = make_worker(FOR_EVER_S)
    held = []
    worker.engine.store_.close = lambda: held.append(handed_on(worker))
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    worker.close()
    assert held == [[True] * 4]


def test_slots_that_another_object_was_given_are_not_written_under_the_first_name(patient):
    """Whatever the scheduler does: the slots' generation is looked at before the bytes are taken, and after."""
    step(patient, prefill_tokens=100, saves=[0])
    metadata = StepMetadata([], [save_of(1, slot=0)], 1, 0)  # the first one's write still waits
    patient.begin(metadata)
    patient.save(metadata)
    for _ in range(QUIET_AFTER):
        step(patient)
    report = reported(patient, lambda report: len(report.settled) == 2)
    assert report.refused == {GENERATIONS[0]}
    assert handed_on(patient) == [False, True, False, False]


def test_slots_that_change_while_they_are_read_are_not_written(patient, monkeypatch):
    original = patient.transfer.slots

    def given_away(slots):
        taken = original(slots)
        patient._owner[slots[0]] = 7  # the next object's copy begins meanwhile
        return taken

    monkeypatch.setattr(patient.transfer, "slots", given_away)
    step(patient, saves=[3])
    report = reported(patient, lambda report: report.settled)
    assert report.refused == {GENERATIONS[3]}
    assert handed_on(patient) == [False] * 4
    assert patient.engine.stats()["save_failed_overwritten"] == 1


def test_a_save_that_fails_after_the_slots_were_given_to_it_leaves_nothing_in_them(patient, monkeypatch):
    step(patient, saves=[0])
    assert settled(patient, 1) == GENERATIONS[:1]
    monkeypatch.setattr(patient.transfer, "save", lambda *_: 1 / 0)
    metadata = StepMetadata([], [save_of(1, slot=0)], 1, 0)
    patient.begin(metadata)
    patient.save(metadata)
    report = reported(patient, lambda report: report.settled)
    assert (report.refused, report.broken) == ({GENERATIONS[1]}, {GENERATIONS[1]})
    assert patient._owner[0] is None


def test_pages_of_another_adapter_than_the_name_says_are_not_saved(patient):
    op = save_of(0)
    op.adapter = Adapter(adapter_id=12345, num_loads=1)  # none was loaded
    metadata = StepMetadata([], [op], 1, 0)
    patient.begin(metadata)
    patient.save(metadata)
    report = reported(patient, lambda report: report.settled)
    assert (report.refused, report.broken) == ({GENERATIONS[0]}, {GENERATIONS[0]})
    assert handed_on(patient) == [False] * 4


def test_unclean_pages_are_cleared_before_the_step(patient):
    metadata = StepMetadata(num_tokens=1, unclean_blocks=[2])
    patient.begin(metadata)
    for layer, pages in enumerate(patient.transfer.layout.pages):
        assert [pages[block].unique().tolist() for block in range(BLOCKS)] == [[layer + 1]] * 2 + [[0], [layer + 1]]


def test_where_pages_could_not_be_cleared_nothing_is_saved_any_more(patient, monkeypatch):
    monkeypatch.setattr(patient.transfer, "clear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patient.begin(StepMetadata(num_tokens=1, unclean_blocks=[2]))
    step(patient, saves=[2])
    report = reported(patient, lambda report: report.settled)
    assert (report.refused, report.broken) == ({GENERATIONS[2]}, {GENERATIONS[2]})
    assert handed_on(patient) == [False] * 4
