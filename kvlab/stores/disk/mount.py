"""A folder on a mount that may hang: each call ends by a deadline, though what it asked of the system may not.

A late call goes on in its thread with memory of its own, so a value is copied once on its way in and once on its way
out.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from kvlab.errors import StoreError
from kvlab.hostmemory import aligned
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, buffers, check_fits, cut
from kvlab.stores.bounded import BoundedCalls
from kvlab.stores.circuit_breaker import CircuitBreaker

log = logging.getLogger(__name__)

T = TypeVar("T")
LISTING = 60  # times the deadline of a call: how long opening and a list of all names may take


class MountStore(Store):
    """`open_inner` makes the store. A mount that was late is left alone for a while, doubled with each failure."""

    def __init__(self, open_inner: Callable[[], Store], place: str, deadline_s: float) -> None:
        self._calls = BoundedCalls("kvlab-mount")
        self._health = CircuitBreaker(0.25, 10.0)
        self._place = place
        self._deadline_s = deadline_s
        self._late = 0
        self.inner = self._run("open", open_inner, LISTING, discard=lambda inner: inner.close())
        self.name = self.inner.name

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        return self.inner.max_bytes

    @property
    def counters(self) -> StoreCounters:  # type: ignore[override]
        return self.inner.counters

    def put(self, key: str, value: Value) -> bool:
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        if size > self.max_bytes:
            return self._run("put", lambda: self.inner.put(key, b"\0" * (self.max_bytes + 1)))  # refused, and counted
        own, at = aligned(size)[:size], 0
        for piece in pieces:
            _copy(piece, own[at : at + piece.nbytes])
            at += piece.nbytes
        return self._run("put", lambda: self.inner.put(key, own))

    def get(self, key: str) -> Buffer | None:
        return self._run("get", lambda: self.inner.get(key))

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        view, at = memoryview(value).cast("B"), 0
        check_fits(key, view.nbytes, out)
        for into in cut(out, view.nbytes):
            _copy(view[at : at + into.nbytes], into)
            at += into.nbytes
        return at

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        return self._run("get_head", lambda: self.inner.get_head(key, num_bytes))

    def size_of(self, key: str) -> int | None:
        return self._run("size_of", lambda: self.inner.size_of(key))

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        return self._run("contains_many", lambda: self.inner.contains_many(list(keys)))

    def delete(self, key: str) -> bool:
        return self._run("delete", lambda: self.inner.delete(key))

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        own = None if found is None else b"".join(buffers(found))
        return self._run("quarantine", lambda: self.inner.quarantine(key, reason, own))

    def num_in_quarantine(self) -> int:
        return self._run("list", self.inner.num_in_quarantine)

    def clear_quarantine(self) -> int:
        return self._run("delete", self.inner.clear_quarantine, LISTING)

    def keys(self) -> Iterator[str]:
        return iter(self._run("list", lambda: list(self.inner.keys()), LISTING))

    @property
    def used_bytes(self) -> int:
        return self._run("count", lambda: self.inner.used_bytes)

    def touch(self, keys: Iterable[str]) -> None:
        self.inner.touch(keys)  # in memory

    def why_missing(self, key: str) -> str:
        return self.inner.why_missing(key) if self._health.is_up else "tier_down"

    def stats(self) -> dict[str, int | float | str]:
        row = self._run("count", self.inner.stats)
        return {**row, "errors": self.counters.errors, **({"error_timeout": self._late} if self._late else {})}

    def close(self) -> None:
        try:
            self._calls.run(self.inner.close, time.monotonic() + self._deadline_s)
        except TimeoutError:
            log.warning("the store under %s is not closed: its mount hangs", self._place)

    def _run(
        self, what: str, work: Callable[[], T], times: int = 1, discard: Callable[[T], None] = lambda _: None
    ) -> T:
        if not self._health.may_ask():
            raise StoreError(f"the mount of {self._place} hung and is left alone", reason="left_alone")
        try:
            result = self._calls.run(work, time.monotonic() + times * self._deadline_s, discard)
        except StoreError:
            self._health.succeeded()  # the file system answers
            raise
        except TimeoutError as error:
            self._late += 1
            if hasattr(self, "inner"):
                self.counters.errors += 1
            if self._health.failed():
                log.warning("the mount of %s did not answer a %s in %g s", self._place, what, times * self._deadline_s)
            raise StoreError(f"the mount of {self._place} does not answer: {error}", reason="timeout") from None
        if self._health.succeeded():
            log.warning("the mount of %s is back", self._place)
        return result


def _copy(piece: memoryview, into: memoryview) -> None:
    """Through numpy, which lets other threads run meanwhile."""
    np.frombuffer(into, np.uint8)[:] = np.frombuffer(piece, np.uint8)
