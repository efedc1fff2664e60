"""Writes of one key come one after the other, and a copy that was read before one of them is not written after it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvlab.stores.forks import ForkAware


class Turns(ForkAware):
    """For each key, one caller at a time; callers with different keys do not wait for each other. All turns are free in
    a forked child, which has none of the threads that hold them."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._changed = threading.Condition()
        self.watch_forks()

    @contextmanager
    def turn(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the turn of `key`. Without `wait`, False at once if another holds it."""
        is_mine = False
        try:
            with self._changed:
                if wait or key not in self._taken:
                    self._changed.wait_for(lambda: key not in self._taken)
                    is_mine = True
                    self._taken.add(key)
                    self._begins(key)
            yield is_mine
        finally:
            if is_mine:
                with self._changed:
                    self._taken.discard(key)
                    self._changed.notify_all()

    def is_taken(self, key: str) -> bool:
        return key in self._taken

    def wait_for_all(self) -> None:
        """Return when the turns that are held at the call have ended."""
        with self._changed:
            earlier = set(self._taken)
        for key in earlier:
            with self.turn(key):
                pass

    def _begins(self, key: str) -> None:
        """Called with the lock held as a turn of `key` begins."""

    def after_fork_in_child(self) -> None:
        self._taken = set()
        self._changed = threading.Condition()


class Copy:
    """A value on its way from one tier to another: `is_current` until a write of its key begins."""

    __slots__ = ("is_current", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.is_current = True


class Writes(Turns):
    """The turns of those who change what a stack holds; each ends the copies of its key that are under way. Only the
    copies under way are held, as many as there are threads."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: set[Copy] = set()
        self._clears = 0

    @contextmanager
    def copy(self, key: str) -> Iterator[Copy]:
        """Around reading a value in one tier and writing it to others. A copy that begins within a write of its key is
        not current: it may read the value before."""
        copy = Copy(key)
        with self._changed:
            copy.is_current = not self._clears and key not in self._taken
            self._copies.add(copy)
        try:
            yield copy
        finally:
            with self._changed:
                self._copies.discard(copy)

    @contextmanager
    def clear(self) -> Iterator[None]:
        """Around a write of all keys."""
        with self._changed:
            self._clears += 1
            for copy in self._copies:
                copy.is_current = False
        try:
            yield
        finally:
            with self._changed:
                self._clears -= 1

    def _begins(self, key: str) -> None:
        for copy in self._copies:
            if copy.key == key:
                copy.is_current = False

    def after_fork_in_child(self) -> None:
        super().after_fork_in_child()
        self._copies = set()
        self._clears = 0
