"""A tier in a bucket: one object for each key, shared by every process that can reach the server."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from kvlab.errors import StoreError
from kvlab.stores.base import Buffer, Value, buffers, fits_key
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.remote import ObjectStore
from kvlab.stores.s3.answers import S3Error
from kvlab.stores.s3.bucket import Bucket
from kvlab.stores.s3.crowd import at_once
from kvlab.stores.s3.names import is_digest, key_of
from kvlab.stores.s3.objects import Objects
from kvlab.stores.s3.url import S3Target
from kvlab.stores.shown import call_of
from kvlab.stores.url import StoreURL
from kvlab.stores.wire import ProtocolError
from kvlab.units import format_bytes

T = TypeVar("T")
BATCH = 512  # keys that one deadline is for
MOST_LISTED_BYTES = 1 << 29  # of memory for names
ENTRY_BYTES = 104  # what a dict has for a name besides it
USED_KEPT_S = 60.0  # that long a total is not listed again: lists cost money
_REFUSALS = frozenset({"too_large", "full", "conflict"})


class S3Store(ObjectStore):
    """Values in a bucket, under a prefix.

    A bucket evicts nothing: the store has no budget, and `max_bytes` says so. Every call ends within `timeout_s`; a
    server that fails is left alone for `first_wait_s`, doubled up to `longest_wait_s`, and tried again. Failures are
    counted by reason (``stats()["error_timeout"]``).

    Parameters
    ----------
    limit
        values over this many bytes are refused before anything is sent, and not read either.
    keep_first
        a key that has a value keeps it: `put` leaves it as it is, so that of several writers all find the first one's.
    """

    max_bytes = 1 << 62  # none
    lost = "vanished"  # a bucket evicts nothing

    def __init__(
        self,
        target: S3Target,
        *,
        timeout_s: float = 3.0,
        limit: int = 512 << 20,
        keep_first: bool = False,
        first_wait_s: float = 0.25,
        longest_wait_s: float = 10.0,
        name: str = "s3",
    ) -> None:
        super().__init__(name, timeout_s)
        self.kept = 0  # puts that found a value and left it
        self._bucket = Bucket(target, CircuitBreaker(first_wait_s, longest_wait_s))
        self._objects = Objects(self._bucket, limit)
        self._limit = limit
        self._keep_first = keep_first
        self._used: tuple[int, float] | None = None  # bytes listed, and until when to go by them

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        return {
            "target": S3Target.from_url(url),
            "timeout_s": url.take_ms("timeout_ms", "3000"),
            "limit": url.take_bytes("limit", "512MiB"),
            "keep_first": url.take_bool("keep_first", False),
            "first_wait_s": url.take_ms("retry_ms", "250"),
            "longest_wait_s": url.take_ms("longest_retry_ms", "10000"),
        }

    def _as_call(self) -> str:
        return call_of(self, self._bucket.target)

    def _write(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> str:
        if size > self._limit:
            return "too_large"
        try:
            is_new = self._objects.write(key, pieces, deadline, only_new=self._keep_first)
        except S3Error as error:
            if error.reason in _REFUSALS:
                return error.reason
            raise
        with self._lock:
            self.kept += not is_new
        return ""

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        if not fits_key(key):
            return None
        with self._counting():
            found = self._objects.head(key, num_bytes, self._deadline())
        return None if found is None else found[0]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Several requests at once, and a deadline for each 512 keys."""
        return [size is not None for size in self._each(self._objects.size, keys)]

    def clear(self) -> None:
        self._each(self._objects.remove, list(self.keys()))
        self._used = None

    def renew(self) -> None:
        """A connection that is out of step gives other keys' values for ever."""
        self._bucket.renew()

    def keys(self) -> Iterator[str]:
        """A server that lists for longer than 60 deadlines, or names that take more than 512 MiB, has failed."""
        found: dict[str, None] = {}
        held = 0
        with self._counting():
            for name, _ in self._objects.names(self._timeout_s):
                key = self._objects.key_told(name, self._deadline()) if is_digest(name) else key_of(name)
                if key is None:  # another program's
                    continue
                held += sys.getsizeof(key) + ENTRY_BYTES
                if held > MOST_LISTED_BYTES:
                    raise ProtocolError(f"the server listed more than {format_bytes(MOST_LISTED_BYTES)} of names")
                found[key] = None
        return iter(found)

    @property
    def used_bytes(self) -> int:
        """Bytes of the objects under the prefix, listed at most once a minute. The last known number where the server
        does not answer."""
        used = self._used
        if used is None or time.monotonic() >= used[1]:
            total = used[0] if used else 0
            with suppress(StoreError), self._counting():
                listed = self._objects.names(self._timeout_s)
                total = sum(size for name, size in listed if is_digest(name) or key_of(name) is not None)
            used = self._used = (total, time.monotonic() + USED_KEPT_S)
        return used[0]

    def stats(self) -> dict[str, int | float | str]:
        return {**super().stats(), "kept": self.kept}

    def close(self) -> None:
        self._bucket.renew()

    # ---- calls

    def _is_up(self) -> bool:
        return self._bucket.health.is_up

    def _each(self, work: Callable[[str, float], T], keys: Sequence[str]) -> list[T | None]:
        """`work` of each key and a deadline, for many keys at once; None for keys that no store takes."""
        found: list[T | None] = []
        for at in range(0, len(keys), BATCH):
            deadline = self._deadline()
            with self._counting():
                works = [partial(work, key, deadline) if fits_key(key) else _nothing for key in keys[at : at + BATCH]]
                found += at_once(works, first_alone=not self._bucket.health.is_up)
        return found

    def _fetch(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        return self._objects.read(key, out, deadline)

    def _size(self, key: str, deadline: float) -> int | None:
        return self._objects.size(key, deadline)

    def _remove(self, key: str, found: Value | None, deadline: float) -> bool:
        """A server that takes conditions for DELETE removes this value and no other; elsewhere one that is put between
        the look and the removal is lost."""
        if found is None:
            return self._objects.size(key, deadline) is not None and self._objects.remove(key, deadline)
        wanted = b"".join(buffers(found))
        head = self._objects.head(key, max(len(wanted), 8), deadline)
        is_same = head is not None and head[0] == wanted
        return is_same and head is not None and self._objects.remove(key, deadline, head[1])


def _nothing() -> None:
    return None
