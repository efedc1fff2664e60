"""A tier in host memory."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlab.hostmemory import PAGE, aligned
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, buffers, check_fits, cut, fits_key
from kvlab.stores.eviction import EvictionPolicy, get_policy, policy_name
from kvlab.stores.forks import ForkAware
from kvlab.stores.memory.arena import Arena, Region, cuda_is_in_use
from kvlab.stores.shown import call_of
from kvlab.stores.url import StoreURL

KEPT_REASONS = 1 << 16  # keys whose reason of leaving is remembered


@dataclass(frozen=True)
class Loan:
    """A value in place: read-only, page-aligned, and there until `MemoryStore.end` is called with it. `checks`: names
    of checks that its bytes have passed; they are the same for as long as the value lies there."""

    key: str
    value: memoryview
    region: Region

    @property
    def checks(self) -> set[str]:
        return self.region.checks


class MemoryStore(Store, ForkAware):
    """Values in one arena of this process's memory, in whole pages, at most `max_bytes` of them.

    Copies run outside the lock. What is being read or written is leased and neither evicted nor overwritten; a `put`
    that needs such room waits up to `wait_s` for it and is then refused, and then nothing leaves for it. A forked child
    has a copy of its own; what other threads of the parent had leased stays leased there.

    Parameters
    ----------
    policy
        an eviction policy by name, or a class of your own
    pinned
        register the arena with CUDA, so that copies to and from a GPU run at full speed and in the background.
        None does so where this process uses CUDA already.
    lending
        have the arena in memory that other processes may map to read, from the descriptor `fd` (Linux)
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        policy: str | type[EvictionPolicy] = "lru",
        pinned: bool | None = None,
        wait_s: float = 0.1,
        name: str = "memory",
        lending: bool = False,
    ) -> None:
        self.name = name
        self._options = {"policy": policy_name(policy), "pinned": pinned, "wait_s": wait_s}
        self._options |= {"lending": True} if lending else {}
        self.max_bytes = max_bytes
        self.counters = StoreCounters()
        self._policy = get_policy(policy)
        self._arena = Arena(max_bytes, pinned=cuda_is_in_use() if pinned is None else pinned, lending=lending)
        self._wait_s = wait_s
        self._held: dict[str, Region] = {}
        self._leased: set[str] = set()  # keys of `_held` that cannot leave now
        self._busy: set[Region] = set()  # which are being read or written
        self._gone: dict[str, str] = {}
        self._lock = threading.Condition()
        self.watch_forks()

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        policy, pinned = url.take("policy", "lru"), url.take("pinned", "auto")
        get_policy(policy)
        return {
            "max_bytes": url.take_bytes("size", default="1GiB"),
            "policy": policy,
            "pinned": None if pinned == "auto" else url.take_bool("pinned", False),
            "wait_s": url.take_ms("wait_ms", "100"),
        }

    def _as_call(self) -> str:
        return call_of(self, self.max_bytes, **self._options)

    def put(self, key: str, value: Value) -> bool:
        start = time.perf_counter()
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        with self._lock:
            region = self._make_room(size, key) if fits_key(key) else None
            if region is None:
                self.counters.refused += 1
                return False
            self._busy.add(region)
        into, at = self._arena.bytes_of(region), 0
        for piece in pieces:  # numpy lets other threads run meanwhile
            if piece.nbytes:
                into[at : at + piece.nbytes] = np.frombuffer(piece, np.uint8)
                at += piece.nbytes
        with self._lock:
            self._busy.discard(region)
            self._drop(key, "replaced")
            self._held[key] = region
            self._policy.admit(key, region.span)
            self._gone.pop(key, None)
            self._lock.notify_all()  # it may be evicted from now on
            self.counters.puts += 1
            self.counters.put_bytes += size
            self.counters.put_s += time.perf_counter() - start
        return True

    @contextmanager
    def lease(self, key: str) -> Iterator[memoryview | None]:
        """The value in place, read-only and page-aligned, for as long as the block runs; None if absent."""
        loan = self.lend(key)
        if loan is None:
            yield None
            return
        try:
            yield loan.value
        finally:
            self.end(loan)

    def lend(self, key: str, *, counts_miss: bool = True) -> Loan | None:
        """The value in place, until `end`; None if absent."""
        with self._lock:
            region = self._held.get(key)
            if region is None:
                self.counters.misses += counts_miss
                return None
            self._policy.touch(key)
            region.readers += 1
            self._leased.add(key)
            self._busy.add(region)
        return Loan(key, self._arena.bytes_of(region).data.toreadonly(), region)

    def end(self, loan: Loan, *, was_hit: bool = False) -> None:
        """The value may be overwritten from now on. Once for each loan; `was_hit`: count it as read."""
        region = loan.region
        with self._lock:
            if was_hit:
                self.counters.hits += 1
                self.counters.get_bytes += region.size
            region.readers -= 1
            if not region.readers:
                self._busy.discard(region)
                if region.dropped:
                    self._arena.free(region)
                else:
                    self._leased.discard(loan.key)
                self._lock.notify_all()

    @property
    def fd(self) -> int:
        """Of the arena's memory, for others to read; -1 where it is this process's alone."""
        return self._arena.fd

    @property
    def lent_bytes(self) -> int:
        """Of the memory behind `fd`."""
        return self._arena.max_bytes

    def get(self, key: str) -> Buffer | None:
        got = self._read(key, None)
        return None if got is None else got[0]

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        got = self._read(key, [piece.cast("B") for piece in out])
        return None if got is None else sum(piece.nbytes for piece in got)

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        with self.lease(key) as held:
            return None if held is None else bytes(held[:num_bytes])

    def size_of(self, key: str) -> int | None:
        region = self._held.get(key)
        return None if region is None else region.size

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        held = self._held
        return [key in held for key in keys]

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._drop(key, "deleted")

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        with self._lock:
            if found is not None and not self.still_holds(key, found):
                return False
            there = self._drop(key, f"set_aside:{'_'.join(reason.split())}")
            self.counters.dropped += there
        return there

    def keys(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._held))

    @property
    def used_bytes(self) -> int:
        """Whole pages, those included that are being written or are deleted but still read."""
        return self._arena.used

    def touch(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._policy.touch(key)

    def why_missing(self, key: str) -> str:
        return self._gone.get(key, "never_stored")

    def stats(self) -> dict[str, int | float | str]:
        return {**super().stats(), "pinned": int(self._arena.is_pinned)}

    def close(self) -> None:
        self._arena.close()

    def before_fork(self) -> None:
        self._lock.acquire()  # the child's copy is of a moment between two changes

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Condition()
        if self._arena.fd >= 0:  # its memory is the parent's
            self._arena, self._policy = Arena(self.max_bytes), get_policy(type(self._policy))
            self._held, self._leased, self._busy = {}, set(), set()

    def _read(self, key: str, out: Sequence[memoryview] | None) -> list[memoryview] | None:
        start = time.perf_counter()
        with self.lease(key) as held:
            if held is None:
                return None
            size = held.nbytes
            if out is not None:
                check_fits(key, size, out)
            pieces, at = cut([aligned(size)] if out is None else out, size), 0
            for piece in pieces:  # numpy lets other threads run meanwhile
                if piece.nbytes:
                    np.copyto(np.frombuffer(piece, np.uint8), np.frombuffer(held[at : at + piece.nbytes], np.uint8))
                    at += piece.nbytes
        with self._lock:
            self.counters.hits += 1
            self.counters.get_bytes += size
            self.counters.get_s += time.perf_counter() - start
        return pieces

    def _make_room(self, size: int, key: str) -> Region | None:
        """A region for `size` bytes. Values leave by policy until there is one; waits for leases if it must."""
        span = max(-(-size // PAGE), 1) * PAGE
        if span > self._arena.max_bytes:
            return None
        deadline = time.monotonic() + self._wait_s
        while (region := self._arena.take(size)) is None:
            old = self._held.get(key)
            if self._arena.longest_without(self._busy) < span:  # no eviction makes room
                if not self._lock.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    return None
            elif old is not None and not old.readers:
                self._drop(key, "replaced")  # it leaves anyway; no other has to
            else:
                victim = str(self._policy.victim(self._leased))
                self.counters.evictions += 1
                self.counters.evicted_bytes += self._held[victim].size
                self._drop(victim, "evicted")
        return region

    def _drop(self, key: str, why: str) -> bool:
        region = self._held.pop(key, None)
        if region is None:
            return False
        self._policy.discard(key)
        self._leased.discard(key)
        self._gone[key] = why
        if len(self._gone) > KEPT_REASONS:
            self._gone.pop(next(iter(self._gone)))
        if region.readers:
            region.dropped = True
        else:
            self._arena.free(region)
        return True
