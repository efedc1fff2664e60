"""Tier workers in this process, so that tests can put stores of their own into them; and cache servers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvlab.stores import Store
from kvlab.stores.memory import MemoryStore
from kvlab.tierworker import process
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.link import Link
from kvlab.tierworker.server import TierServer
from kvlab.units import parse_bytes


class ThreadWorker:
    """What `process.start` returns, for a worker that is a thread."""

    def __init__(self, store: Store | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.link = Link(ours)
        self.server = TierServer(Link(theirs), store=store)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    @property
    def is_dead(self) -> bool:
        """Not before the last thread has let go of the slots."""
        pools = (self.server._reads, self.server._writes)
        return not self._thread.is_alive() and not any(thread.is_alive() for pool in pools for thread in pool._threads)

    def kill(self) -> None:
        self.link.close()

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return self.is_dead


@contextmanager
def workers_in_threads(store: Store | None = None) -> Iterator[None]:
    """Tier workers that are started are threads of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "start", lambda level: ThreadWorker(store))
        yield


@contextmanager
def cache_server(path, memory):
    """What `kvlab serve` runs, with so large a memory tier, in this process."""
    server = CacheServer(MemoryStore(parse_bytes(memory), pinned=False, lending=True), path)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
