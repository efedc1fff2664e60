"""Calls that may never end, each by a deadline: into libraries that take no timeout, and to file systems that hang.

A call runs in a thread. One that is late is left to itself, and its thread with it until it ends; only so many may hang
at once.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvlab.stores.forks import ForkAware

T = TypeVar("T")
MOST_HANGING = 16
IDLE_THREADS = 8


class _Call:
    def __init__(self, work: Callable[[], Any], discard: Callable[[Any], None]) -> None:
        self.work = work
        self.discard = discard
        self.answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.is_late = False
        self.ended = False


class BoundedCalls(ForkAware):
    """`most` calls may hang; others fail at once then. A forked child, where none of the threads is, begins anew."""

    def __init__(self, name: str, most: int = MOST_HANGING) -> None:
        self._name = name
        self._most = most
        self.after_fork_in_child()
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Call]] = []
        self._hanging = 0

    def run(self, work: Callable[[], T], deadline: float, discard: Callable[[T], None] = lambda _: None) -> T:
        """What `work` gives or raises. TimeoutError at `deadline`; what a late call gives goes to `discard`, in its
        thread."""
        call = _Call(work, discard)
        with self._lock:
            if self._hanging >= self._most:
                raise TimeoutError(f"{self._hanging} calls hang already")
            asks = self._idle.pop() if self._idle else None
        if asks is None:
            asks = queue.SimpleQueue()
            try:
                threading.Thread(target=self._serve, args=(asks, self._lock), daemon=True, name=self._name).start()
            except RuntimeError as error:
                raise OSError(f"no thread takes a call: {error}") from error
        asks.put(call)
        try:
            found, failed = call.answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            with call.lock:
                call.is_late = not call.ended
            if call.is_late:
                with self._lock:
                    self._hanging += 1
                raise TimeoutError("the deadline passed") from None
            found, failed = call.answer.get()
        if failed is not None:
            raise failed
        result: T = found
        return result

    def _serve(self, asks: "queue.SimpleQueue[_Call]", lock: threading.Lock) -> None:
        while True:
            call = asks.get()
            found, failed = None, None
            try:
                found = call.work()
            except BaseException as error:  # raised where the call was made
                failed = error
            with call.lock:
                call.ended = True
                is_late = call.is_late
            with lock:
                self._hanging -= is_late
                keeps = len(self._idle) < IDLE_THREADS
                if keeps:
                    self._idle.append(asks)
            if not is_late:
                call.answer.put((found, failed))
            elif failed is None:
                call.discard(found)
            if not keeps:
                return
            del call, found, failed
