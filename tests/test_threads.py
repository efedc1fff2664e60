"""Threads whose calls may hang."""

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from kvlab.stores.closing import close_store
from kvlab.stores.memory import MemoryStore
from kvlab.threads import Threads


def test_calls_run_in_order_and_in_so_many_threads():
    threads, seen, gate = Threads(2, "t"), [], threading.Barrier(2)
    both = [threads.submit(gate.wait) for _ in range(2)]
    assert sorted(one.result(60) for one in both) == [0, 1], "two ran at once"
    one = Threads(1, "o")
    futures = [one.submit(seen.append, number) for number in range(100)]
    assert one.close()
    assert seen == list(range(100))
    assert all(future.done() for future in futures)
    assert len(one._threads) == 1
    with pytest.raises(RuntimeError, match="closed"):
        one.submit(seen.append, 1)
    assert threads.close()
    assert threads.close(), "a second time"


def test_errors_of_every_kind_reach_the_caller():
    threads = Threads(1, "t")
    for error in (ValueError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()):

        def fail(error=error):
            raise error

        assert threads.submit(fail).exception(60) is error
    assert threads.submit(lambda: 1).result(60) == 1, "the thread lives on"
    assert threads.close()


def test_a_call_that_hangs_is_left_alone():
    threads, go = Threads(1, "t"), threading.Event()
    stuck, behind = threads.submit(go.wait), threads.submit(lambda: 1)
    assert not threads.close(cancel=True, stall_s=0.05)
    with pytest.raises(CancelledError):
        behind.result(60)
    go.set()
    assert stuck.result(60) is True
    assert threads.close()


def test_a_store_that_cannot_be_closed_is_left_alone(caplog):
    class Stuck(MemoryStore):
        def close(self):
            threading.Event().wait()

    class Interrupted(MemoryStore):
        def close(self):
            raise KeyboardInterrupt

    close_store(Stuck(1 << 20), stall_s=0.05)
    close_store(Interrupted(1 << 20))
    assert [record.message for record in caplog.records] == [
        "tier memory is not closed after 0.05 s; it is left alone",
        "tier memory could not be closed: KeyboardInterrupt: ",
    ]


def test_a_process_ends_though_a_call_hangs():
    program = (
        "import threading\n"
        "from kvlab.threads import Threads\n"
        "threads = Threads(1, 't')\n"
        "threads.submit(threading.Event().wait)\n"
        "print(threads.close(cancel=True, stall_s=0.05))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
