"""What stores on other hosts share: a deadline for each call, failures by reason, what became of keys."""

import time
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kvlab.errors import StoreError
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, ValueTooLongError, buffers, fits_key
from kvlab.stores.forks import Lock

V = TypeVar("V")
KEPT_KEYS = 1 << 16  # that are remembered as put, or as removed


class RemoteStore(Store):
    """Failures are counted by reason (``stats()["error_timeout"]``), and so are refused puts."""

    lost = "evicted"  # why a key that was put here is missing

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.counters = StoreCounters()
        self.errors: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._put_before: OrderedDict[str, int] = OrderedDict()  # and the length of the value
        self._gone: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def _is_up(self) -> bool:
        """False from a failure of a server to its next success."""

    @property
    def is_up(self) -> bool:
        return self._is_up()

    def why_missing(self, key: str) -> str:
        if key in self._gone:
            return self._gone[key]
        if not self._is_up():
            return "tier_down"
        return self.lost if key in self._put_before else "never_stored"

    def stats(self) -> dict[str, int | float | str]:
        return {**super().stats(), **{f"error_{reason}": count for reason, count in sorted(self.errors.items())}}

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except ValueTooLongError:
            raise
        except StoreError as error:
            self._failed(error)
            raise

    def _failed(self, error: StoreError) -> None:
        with self._lock:
            self.counters.errors += 1
            self.errors[error.reason] += 1

    def _refuse(self, reason: str) -> bool:
        with self._lock:
            self.counters.refused += 1
            self.errors[reason] += 1
        return False

    def _stored(self, key: str, size: int, start: float) -> None:
        with self._lock:
            remember(self._put_before, key, size)
            self._gone.pop(key, None)
            self.counters.puts += 1
            self.counters.put_bytes += size
            self.counters.put_s += time.perf_counter() - start

    def _was_read(self, value: Sequence[memoryview] | None, start: float) -> None:
        with self._lock:
            if value is None:
                self.counters.misses += 1
            else:
                self.counters.hits += 1
                self.counters.get_bytes += sum(piece.nbytes for piece in value)
                self.counters.get_s += time.perf_counter() - start

    def _left(self, key: str, why: str) -> None:
        with self._lock:
            remember(self._gone, key, why)


class ObjectStore(RemoteStore):
    """One question to a server for each of write, read, size and removal."""

    @abstractmethod
    def _write(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> str:
        """Store the value; empty, or why it is refused."""

    @abstractmethod
    def _fetch(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        """The value, in `out` or in memory of its own."""

    @abstractmethod
    def _size(self, key: str, deadline: float) -> int | None: ...

    @abstractmethod
    def _remove(self, key: str, found: Value | None, deadline: float) -> bool:
        """Remove the value; with `found` only if it is that, or begins with it (`Store.still_holds`)."""

    def put(self, key: str, value: Value) -> bool:
        start = time.perf_counter()
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        if not fits_key(key):
            return self._refuse("key_too_long")
        with self._counting():
            refused = self._write(key, pieces, size, self._deadline())
        if refused:
            return self._refuse(refused)
        self._stored(key, size, start)
        return True

    def get(self, key: str) -> Buffer | None:
        got = self._read(key, None)
        return None if got is None else got[0]

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        got = self._read(key, out)
        return None if got is None else sum(piece.nbytes for piece in got)

    def size_of(self, key: str) -> int | None:
        if not fits_key(key):
            return None
        with self._counting():
            return self._size(key, self._deadline())

    def delete(self, key: str) -> bool:
        return self._take_away(key, None, "deleted")

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        there = self._take_away(key, found, f"set_aside:{'_'.join(reason.split())}")
        self.counters.dropped += there
        return there

    def _read(self, key: str, out: Sequence[memoryview] | None) -> Sequence[memoryview] | None:
        start = time.perf_counter()
        with self._counting():
            value = self._fetch(key, out, self._deadline()) if fits_key(key) else None
        self._was_read(value, start)
        return value

    def _take_away(self, key: str, found: Value | None, why: str) -> bool:
        if not fits_key(key):
            return False
        with self._counting():
            there = self._remove(key, found, self._deadline())
        if there:
            self._left(key, why)
        return there


def remember(kept: OrderedDict[str, V], key: str, value: V) -> None:
    """The latest 65,536."""
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > KEPT_KEYS:
        kept.popitem(last=False)
