"""Calls that hang end at their deadline for those who made them."""

import threading
import time

import pytest

from kvlab.stores.bounded import BoundedCalls
from kvlab.testing.machines import in_child


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_a_call_gives_what_its_work_gives_or_raises():
    calls = BoundedCalls("test")
    assert [calls.run(lambda n=n: n * n, soon()) for n in range(20)] == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        calls.run(lambda: 1 / 0, soon())


def test_a_late_call_is_left_to_itself_and_its_result_discarded():
    calls, gate, discarded = BoundedCalls("test", most=2), threading.Event(), []
    done = threading.Semaphore(0)

    def discard(found):
        discarded.append(found)
        done.release()

    for _ in range(2):
        with pytest.raises(TimeoutError, match="deadline"):
            calls.run(lambda: gate.wait(60) and "late", soon(0.01), discard)
    with pytest.raises(TimeoutError, match="2 calls hang"):
        calls.run(lambda: None, soon())
    gate.set()
    for _ in range(2):
        assert done.acquire(timeout=60)
    assert discarded == ["late", "late"]
    assert calls.run(lambda: 5, soon()) == 5


def test_threads_are_used_again():
    calls = BoundedCalls("test-again")
    for _ in range(50):
        calls.run(lambda: None, soon())
    assert sum(thread.name == "test-again" for thread in threading.enumerate()) <= 2


def test_a_forked_child_has_threads_of_its_own():
    calls, gate = BoundedCalls("test", most=1), threading.Event()
    calls.run(lambda: None, soon())
    with pytest.raises(TimeoutError):
        calls.run(gate.wait, soon(0.01))
    try:
        assert in_child(lambda: calls.run(lambda: None, soon())) == 0
    finally:
        gate.set()
