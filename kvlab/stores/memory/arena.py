"""One stretch of memory cut into regions, pinned for the GPU where there is one."""

import os
import sys
import weakref
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvlab.hostmemory import PAGE, pin, reserve
from kvlab.sharedmemory import LendingMemory


@dataclass(eq=False)
class Region:
    """A stretch of the arena: where it starts, how long it is in whole pages, and how much of it is the value."""

    start: int
    span: int
    size: int
    readers: int = 0
    dropped: bool = False  # no longer to be found; freed with its last reader
    checks: set[str] = field(default_factory=set)  # that its bytes have passed, by name


class Arena:
    """`max_bytes` (whole pages of it) of address space, taken from the system page by page as it is first used.

    With `pinned`, all of it is taken and registered with CUDA at once (cudaHostRegister): exactly these bytes, where
    an allocator of pinned memory would round each piece up to a power of two. With `lending`, other processes may map
    it to read, from the descriptor `fd`. Not thread-safe: the owner holds a lock.
    """

    def __init__(self, max_bytes: int, *, pinned: bool = False, lending: bool = False) -> None:
        self.max_bytes = max_bytes // PAGE * PAGE
        self.used = 0
        self._holes: list[tuple[int, int]] = (
            [(0, self.max_bytes)] if self.max_bytes else []
        )  # (start, length), by start
        memory = LendingMemory(self.max_bytes) if lending else None
        self.fd = -1 if memory is None else memory.fd
        self._bytes = reserve(self.max_bytes) if memory is None else memory.bytes
        unpin = pin(self._bytes) if pinned else None
        # At the latest when the arena is forgotten: CUDA maps nothing more where memory that it holds has been given
        # back, and no engine starts in this process any more.
        self._release = None if unpin is None else weakref.finalize(self, unpin)

    @property
    def is_pinned(self) -> bool:
        return self._release is not None and self._release.alive

    @property
    def largest_hole(self) -> int:
        return max((length for _, length in self._holes), default=0)

    def take(self, size: int) -> Region | None:
        """The smallest hole that fits, cut to size; None if there is none."""
        span = max(-(-size // PAGE), 1) * PAGE
        fitting = [(length, start) for start, length in self._holes if length >= span]
        if not fitting:
            return None
        length, start = min(fitting)
        self._holes.remove((start, length))
        if length > span:
            insort(self._holes, (start + span, length - span))
        self.used += span
        return Region(start, span, size)

    def longest_without(self, regions: Iterable[Region]) -> int:
        """The longest stretch that could be one hole if all but these were given back."""
        longest = end = 0
        for region in sorted(regions, key=lambda region: region.start):
            longest = max(longest, region.start - end)
            end = region.start + region.span
        return max(longest, self.max_bytes - end)

    def free(self, region: Region) -> None:
        """Give back; neighbouring holes become one."""
        self.used -= region.span
        start, end = region.start, region.start + region.span
        for hole in [hole for hole in self._holes if hole[0] == end or hole[0] + hole[1] == start]:
            self._holes.remove(hole)
            start, end = min(start, hole[0]), max(end, hole[0] + hole[1])
        insort(self._holes, (start, end - start))

    def bytes_of(self, region: Region) -> npt.NDArray[np.uint8]:
        """The value's bytes, in place."""
        return self._bytes[region.start : region.start + region.size]

    def close(self) -> None:
        if self._release is not None:
            self._release()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def cuda_is_in_use() -> bool:
    """Whether this process has torch loaded and a GPU at hand; asks without loading torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())
