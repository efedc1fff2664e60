"""Host memory that processes share: an engine's slots, and the memory of a cache server.

The memory has no name: it is a file descriptor that is handed on, and it ends with the last process that maps it,
however that process ends. In front of the slots lie a counter and one number per slot:

- ``copied``: saves up to this number are in their slots. A GPU writes it behind the bytes, in the order of its stream.
- ``owners``: the generation of the object that a slot holds, 0 for none. Written by the engine alone.

A cache server's memory is written by the server alone: engines map it to read.
"""

import mmap
import os
import sys

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import ConfigError
from kvlab.hostmemory import HUGE_PAGE, PAGE, advise_arena
from kvlab.units import format_bytes

OWNERS_AT = PAGE  # the counter has a page of its own
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python 3.11 has no name for it


class SharedSlots:
    """`num_slots` slots of `slot_bytes`: uint8 [num_slots, slot_bytes] in `slots`, of the memory `fd`, which stays the
    caller's; without one, new memory, whose own `fd` another process can map. Raises ConfigError where the system has
    not so much, or knows no such memory."""

    def __init__(self, num_slots: int, slot_bytes: int, *, fd: int | None = None) -> None:
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self.fd = -1
        slots_at = -(-(OWNERS_AT + 8 * num_slots) // HUGE_PAGE) * HUGE_PAGE
        total = slots_at + num_slots * slot_bytes
        if fd is None:
            self.fd = fd = _anonymous(total)
        elif (held := os.fstat(fd).st_size) < total:
            raise ConfigError(f"shared memory must hold {total} bytes, it has {held}")
        elif not _is_sealed(fd):
            raise ConfigError("shared memory must be sealed against becoming shorter")
        try:
            self._mapping = mmap.mmap(fd, total)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot map {format_bytes(total)} of shared memory: {error}") from error
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        advise_arena(self.bytes)
        self.copied: NDArray[np.uint64] = self.bytes[:8].view(np.uint64)
        self.owners: NDArray[np.uint64] = self.bytes[OWNERS_AT : OWNERS_AT + 8 * num_slots].view(np.uint64)
        self.slots: NDArray[np.uint8] = self.bytes[slots_at:].reshape(num_slots, slot_bytes)

    def close(self) -> None:
        """Give its own descriptor back; the memory lives as long as it is mapped."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LendingMemory:
    """New memory of `num_bytes`, uint8 [num_bytes] in `bytes`: this process writes to it, those that are given `fd` can
    only read. Raises ConfigError as `SharedSlots` does."""

    def __init__(self, num_bytes: int) -> None:
        self.fd = _anonymous(num_bytes, is_sealed=False)
        try:
            self._mapping = mmap.mmap(self.fd, num_bytes)
            _seal(self.fd, for_readers=True)
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(f"cannot share {format_bytes(num_bytes)} of memory: {error}") from error
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        advise_arena(self.bytes)


class LentMemory:
    """Another process's `LendingMemory` as it is given: uint8 [num_bytes] in `bytes`, to read. Takes `fd` over. Raises
    ConfigError where it is shorter, or its owner could cut it short."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        try:
            about = os.fstat(fd)
            if about.st_size < num_bytes or not _is_sealed(fd):
                raise ConfigError(f"lent memory must hold {num_bytes} bytes for good, it has {about.st_size}")
            self.inode = about.st_ino
            self._mapping = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(f"cannot map {num_bytes} bytes of lent memory: {error}") from error
        finally:
            os.close(fd)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        advise_arena(self.bytes)


def _anonymous(num_bytes: int, *, is_sealed: bool = True) -> int:
    """Memory without a name, whose length no process can change: one that is cut short kills those who use it."""
    if sys.platform != "linux":
        raise ConfigError("tiers below host memory need Linux in an engine; use memory:// alone")
    fd = os.memfd_create("kvlab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        if is_sealed:
            _seal(fd)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"cannot reserve {format_bytes(num_bytes)} of shared memory: {error}; give a smaller size"
        ) from error
    return fd


def _is_sealed(fd: int) -> bool:
    import fcntl

    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # no such memory
        return False


def _seal(fd: int, *, for_readers: bool = False) -> None:
    """For good; `for_readers`: mappings that are made from now on cannot be written to."""
    import fcntl  # not on Windows

    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | (_F_SEAL_FUTURE_WRITE if for_readers else 0))
