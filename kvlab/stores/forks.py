"""What a process that is forked must not share with its parent: sockets, file locks, threads, locks held by threads
that the child does not have. `os.fork` (and with it multiprocessing's ``fork``) calls the hooks of every object that
registered; the child then opens connections and files of its own.
"""

import os
import threading
from types import TracebackType
from weakref import WeakSet


class ForkAware:
    """Registers itself with `watch_forks`; each hook runs in the thread that forks."""

    def watch_forks(self) -> None:
        _watched.add(self)

    def before_fork(self) -> None:
        """Bring memory into a state that a copy of it can go on from."""

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""

    def after_fork_in_child(self) -> None:
        """Replace what belongs to the parent. Only the thread that forked exists here."""


class Lock(ForkAware):
    """A lock that is free in a forked child, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.watch_forks()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()


_watched: WeakSet[ForkAware] = WeakSet()
_forking: list[ForkAware] = []  # those whose `before_fork` ran
_one_at_a_time = threading.Lock()  # threads may fork at once


def _before() -> None:
    _one_at_a_time.acquire()
    _forking[:] = list(_watched)
    for watched in _forking:
        watched.before_fork()


def _in_parent() -> None:
    for watched in _forking:
        watched.after_fork_in_parent()
    _forking.clear()
    _one_at_a_time.release()


def _in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    for watched in _forking:
        watched.after_fork_in_child()
    _forking.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where no process is forked
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
