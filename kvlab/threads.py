"""Threads for calls that may never return, such as those of a store whose medium hangs."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Threads:
    """Runs calls in up to `count` threads, in order. Unlike those of a `ThreadPoolExecutor`, the threads do not keep a
    process from ending, and `close` waits for them no longer than it is told."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._is_closed = False
        self.num_done = 0  # calls that have ended

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"{self._name}: closed")
            self._calls.put((future, call, args))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self, *, cancel: bool = False, stall_s: float = 30.0) -> bool:
        """End the threads once all calls have ended, or with `cancel` those under way. False if no call ended for
        `stall_s` seconds: a thread may then still run one."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                if cancel:
                    self._cancel_waiting()
                for _ in self._threads:
                    self._calls.put(None)
        done, since = self.num_done, time.monotonic()
        while any(thread.is_alive() for thread in self._threads):
            if self.num_done != done:
                done, since = self.num_done, time.monotonic()
            left = since + stall_s - time.monotonic()
            if left <= 0:
                return False
            next(thread for thread in self._threads if thread.is_alive()).join(min(left, 0.1))
        return True

    def _cancel_waiting(self) -> None:
        while True:
            try:
                entry = self._calls.get_nowait()
            except queue.Empty:
                return
            if entry is not None and entry[0].cancel():
                entry[0].set_running_or_notify_cancel()  # or a thread that waits for it would wait on

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            future, call, args = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args))
                except BaseException as error:  # the caller's, through the future
                    future.set_exception(error)
            self.num_done += 1
            del entry, future, call, args  # or a result would live until the next call

    def _next(self) -> tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None:
        """The next call. Only a thread that finds none is idle: one that has a call already takes no other."""
        try:
            return self._calls.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._calls.get()
