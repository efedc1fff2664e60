"""When a worker hands saved objects on to lower tiers: in quiet steps, on an idle engine, or when patience ends."""

import time

import pytest
import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm import worker as workers
from kvlab.connectors.vllm.metadata import SaveOp, StepMetadata
from kvlab.connectors.vllm.worker import QUIET_AFTER, Worker
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.paged import page_layout
from kvlab.paged.transfer import CPUTransfer
from kvlab.stores import open_store

LAYERS, PAGE, BLOCKS = 3, 4096, 4
KEYS = [bytes([number]) * 32 for number in range(BLOCKS)]
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


def step(worker, *, prefill_tokens=0, saves=()):
    ops = [SaveOp(KEYS[block], (block,), (block,), 16, True) for block in saves]
    metadata = StepMetadata([], ops, prefill_tokens or 1, prefill_tokens)
    worker.begin(metadata)
    worker.save(metadata)


def handed_on(worker):
    return worker.engine.contains_many(KEYS)


def settled(worker, count):
    """Wait for so many objects' hand-over."""
    deadline, keys = time.monotonic() + 30, []
    while len(keys) < count:
        assert time.monotonic() < deadline
        report = worker.take_report()
        keys += report.settled if report is not None else []
        time.sleep(0.001)
    return keys


def test_objects_wait_for_quiet_steps(patient):
    step(patient, prefill_tokens=100, saves=[0, 1])
    for _ in range(QUIET_AFTER - 1):
        step(patient)
    time.sleep(0.1)  # if it handed on now it would be seen
    assert handed_on(patient) == [False] * 4
    step(patient)
    assert settled(patient, 2) == KEYS[:2]
    assert handed_on(patient) == [True, True, False, False]
    assert patient.engine.load_object(patient.engine.namespace.key(KEYS[1])).unique().tolist() == [1, 2, 3]


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
    assert settled(patient, 2) == KEYS[:2]


def test_what_is_saved_in_quiet_steps_is_handed_on_at_once(patient):
    """Generated tokens' objects."""
    step(patient, saves=[2])
    assert settled(patient, 1) == [KEYS[2]]


def test_an_idle_engine_is_quiet():
    worker = make_worker(FOR_EVER_S)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == KEYS
    worker.close()


def test_patience_ends_where_no_quiet_step_comes(never_idle):
    worker = make_worker(0.05)
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    assert settled(worker, BLOCKS) == KEYS
    worker.close()


def test_closing_hands_on_what_still_waits(never_idle):
    worker = make_worker(FOR_EVER_S)
    held = []
    worker.engine.store_.close = lambda: held.append(handed_on(worker))
    step(worker, prefill_tokens=100, saves=range(BLOCKS))
    worker.close()
    assert held == [[True] * 4]
