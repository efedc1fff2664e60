"""A bounded queue of writes and the thread that carries them out."""

import atexit
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakSet

from kvlab.errors import StoreError
from kvlab.stores.forks import ForkAware

_writers: "WeakSet[BackgroundWriter]" = WeakSet()


@atexit.register
def _end_all() -> None:
    """Before the interpreter stops its threads wherever they are."""
    for writer in list(_writers):
        writer.end()


class BackgroundWriter(ForkAware):
    """Runs ``write(key)`` for each key handed in, one at a time, in order, each key once however often it is given.

    Holds at most `max_keys`; what does not fit is dropped and counted. `close` drains, for at most `drain_s`. A forked
    child begins with an empty queue and a thread of its own: what was queued is the parent's to write. When the
    interpreter ends, the write under way is the last: a thread that is stopped in the middle of one keeps its locks.
    """

    def __init__(self, write: Callable[[str], None], *, max_keys: int = 256, drain_s: float = 30.0) -> None:
        self.dropped = 0
        self.written = 0
        self.errors = 0
        self._write = write
        self._max_keys = max_keys
        self._drain_s = drain_s
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._writing: str | None = None
        self._closing = self._ended = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # from the first key on
        self.watch_forks()
        _writers.add(self)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, key: str) -> bool:
        """True if it will be written; False if the queue is full or the interpreter ends (counted)."""
        with self._changed:
            if self._closing:
                raise StoreError("the background writer is closed")
            if self._ended or sys.is_finalizing() or (key not in self._queue and len(self._queue) >= self._max_keys):
                self.dropped += 1
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvlab-writer", daemon=True)
                self._thread.start()
            self._queue[key] = None
            self._changed.notify_all()
            return True

    def cancel(self, key: str | None = None) -> None:
        """Forget `key`, or all keys; returns when the write of it that is under way has ended."""
        with self._changed:
            if key is None:
                self._queue.clear()
                key = self._writing
            else:
                self._queue.pop(key, None)
            self._changed.wait_for(lambda: key is None or self._writing != key)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until all is written; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._writing is None, timeout_s)

    def close(self) -> None:
        """Write what is queued, then stop. What is left after `drain_s` counts as dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + self._drain_s
        self.drain(self._drain_s)
        self._stop(deadline)

    def end(self) -> None:
        """As `close`, after the write that is under way, and without complaint about keys that come yet."""
        with self._changed:
            self._ended = True
        self._stop(time.monotonic() + self._drain_s)

    def _stop(self, deadline: float) -> None:
        with self._changed:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def after_fork_in_child(self) -> None:
        self._queue = OrderedDict()
        self._writing = None
        self._changed = threading.Condition()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing or self._ended)
                if not self._queue:
                    return
                key, _ = self._queue.popitem(last=False)
                self._writing = key
            try:
                self._write(key)
                self.written += 1
            except BaseException:  # the tier counts and logs it; the thread must live on
                self.errors += 1
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()
