"""A tier in host memory."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self

from kvlab.stores.base import Buffer, Store, StoreStats, Value, ValueTooLongError, buffers
from kvlab.stores.eviction import get_policy
from kvlab.stores.url import StoreURL


class MemoryStore(Store):
    """Values in this process's memory, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int, *, policy: str = "lru", name: str = "memory") -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.stats_ = StoreStats()
        self._values: dict[str, bytearray] = {}
        self._used = 0
        self._policy = get_policy(policy)
        self._evicted: dict[str, float] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_url(cls, url: StoreURL) -> Self:
        return cls(url.take_bytes("size", default="1GiB"), policy=url.take("policy", "lru"))

    def put(self, key: str, value: Value) -> bool:
        start = time.perf_counter()
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        with self._lock:
            if size > self.max_bytes:
                self.stats_.refused += 1
                return False
            self._remove(key)
            while self._used + size > self.max_bytes:
                victim = self._policy.victim()
                self.stats_.evictions += 1
                self.stats_.evicted_bytes += self._remove(str(victim))
                self._evicted[str(victim)] = time.time()
            held = bytearray(size)
            at = 0
            for piece in pieces:
                held[at : at + piece.nbytes] = piece
                at += piece.nbytes
            self._values[key] = held
            self._used += size
            self._policy.admit(key, size)
            self._evicted.pop(key, None)
            self.stats_.puts += 1
            self.stats_.put_bytes += size
            self.stats_.put_s += time.perf_counter() - start
        return True

    def get(self, key: str) -> Buffer | None:
        start = time.perf_counter()
        with self._lock:
            held = self._values.get(key)
            self._count(key, held, start)
            return None if held is None else bytearray(held)

    def get_into(self, key: str, out: memoryview) -> int | None:
        start = time.perf_counter()
        with self._lock:
            held = self._values.get(key)
            if held is not None:
                if len(held) > out.nbytes:
                    raise ValueTooLongError(f"value of {key!r} holds {len(held)} bytes, the buffer only {out.nbytes}")
                out.cast("B")[: len(held)] = held
            self._count(key, held, start)
            return None if held is None else len(held)

    def size_of(self, key: str) -> int | None:
        held = self._values.get(key)
        return None if held is None else len(held)

    def delete(self, key: str) -> bool:
        with self._lock:
            present = key in self._values
            self._remove(key)
            if present:
                self._evicted.pop(key, None)
            return present

    def keys(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._values))

    @property
    def used_bytes(self) -> int:
        return self._used

    def touch(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._policy.touch(key)

    def why_missing(self, key: str) -> str:
        return "evicted" if key in self._evicted else "never_stored"

    def _remove(self, key: str) -> int:
        held = self._values.pop(key, None)
        self._policy.discard(key)
        size = 0 if held is None else len(held)
        self._used -= size
        return size

    def _count(self, key: str, held: bytearray | None, start: float) -> None:
        if held is None:
            self.stats_.misses += 1
            return
        self._policy.touch(key)
        self.stats_.hits += 1
        self.stats_.get_bytes += len(held)
        self.stats_.get_s += time.perf_counter() - start
