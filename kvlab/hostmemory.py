"""Host memory: page-aligned buffers; and huge pages, taken from the system where a cache cannot wait, pinned for a GPU.

The first write to fresh memory costs several times the copy: the system has to find and clear each page.
To pin 26 GiB of it took a GPU's connector 14 s. First writes run 3 times as fast in huge pages (benchmarks/stores.py
--only fresh), and several threads take memory from the system before it is pinned.
"""

import ctypes
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import ConfigError, StoreError
from kvlab.system import num_cores
from kvlab.units import format_bytes

log = logging.getLogger(__name__)

PAGE = 4096  # what direct I/O asks of addresses, offsets and lengths; 512-byte disks accept it too
HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_DONTDUMP = 14, 16
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # from Linux 5.14 on
_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY
_PIECE = 64 << 20
_MAX_THREADS = 16
_local = threading.local()


def aligned(num_bytes: int) -> memoryview:
    """A page-aligned buffer of at least `num_bytes`, rounded up to whole pages; freed with its last view.

    Its content is undefined: the C allocator's memory, for it gives large blocks back warm, while fresh pages
    from the system cost direct reads two thirds of their speed. Raises StoreError (reason ``memory``) where there is
    not so much.
    """
    length = -(-max(num_bytes, 1) // PAGE) * PAGE
    try:
        raw = np.empty(length + PAGE, np.uint8)
    except (MemoryError, ValueError):  # the latter for more than there are addresses
        raise StoreError(f"no memory for {num_bytes} bytes", reason="memory") from None
    start = -address(raw.data) % PAGE
    return raw[start : start + length].data


def scratch(owner: str, num_bytes: int) -> memoryview:
    """Page-aligned memory of this thread, whole pages for `num_bytes`, which its next call with the same `owner` gets
    again: to fill fresh memory takes as long as a disk."""
    kept: dict[str, memoryview] = vars(_local)
    if owner not in kept or kept[owner].nbytes < num_bytes:
        kept[owner] = aligned(num_bytes)
    return kept[owner][: -(-max(num_bytes, 1) // PAGE) * PAGE]  # no longer, whatever was asked for before


def address(view: memoryview) -> int:
    """Where `view`'s bytes lie; 0 for an empty one."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if view.nbytes else 0


def reserve(num_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, uint8 [num_bytes], that starts at a multiple of 2 MiB. The system gives it page by page as it is
    first used, in huge pages where it has them, and leaves it out of core dumps, as it holds requests' KV. Raises
    ConfigError where it has not so much."""
    try:
        mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"cannot reserve {format_bytes(num_bytes)} of host memory: {exc}; give a smaller size"
        ) from exc
    mapped = np.frombuffer(mapping, np.uint8)
    start = -mapped.ctypes.data % HUGE_PAGE
    memory = mapped[start : start + num_bytes]
    advise_arena(memory)
    return memory


def advise_arena(memory: NDArray[np.uint8]) -> None:
    """Ask the system for huge pages where it has them, and to leave `memory` out of core dumps, as it holds KV."""
    _advise(memory.ctypes.data, memory.nbytes, _MADV_HUGEPAGE)
    _advise(memory.ctypes.data, memory.nbytes, _MADV_DONTDUMP)


def populate(memory: NDArray[np.uint8], *, threads: int | None = None, is_readonly: bool = False) -> None:
    """Have the system give all whole pages of `memory` now; its content stays. `is_readonly`: it cannot be written to.
    By default with a thread for each core this process may use, at most 16: they keep to its cores, and memory to those
    cores' side of the machine. Where the system does not know the call, pages come as they are used."""
    advice = _MADV_POPULATE_READ if is_readonly else _MADV_POPULATE_WRITE
    first = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (memory.ctypes.data + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE

    def take(at: int) -> None:
        _advise(at, min(_PIECE, end - at), advice)

    pieces = range(first, end, _PIECE)
    if threads == 1:  # the caller's own, which may be a daemon: a pool's thread would hold up the interpreter's end
        for at in pieces:
            take(at)
        return
    with ThreadPoolExecutor(threads or min(num_cores(), _MAX_THREADS)) as pool:
        list(pool.map(take, pieces))


def pin(memory: NDArray[np.uint8], *, is_readonly: bool = False) -> Callable[[], None] | None:
    """Populate and page-lock exactly `memory` for CUDA (torch's own pinning rounds up to a power of two); how to undo
    it, or None (logged) if CUDA refuses. Memory given back while still locked would make CUDA refuse what comes there
    next.

    Through the driver: the runtime remembers an error of such a call, and raises it from the next call of anyone."""
    try:
        import torch
    except ImportError:
        log.warning("memory is not pinned: PyTorch is not installed")
        return None
    if not torch.cuda.is_available():
        log.warning("memory is not pinned: no CUDA device")
        return None
    populate(memory, is_readonly=is_readonly)  # to register what is not there yet takes several times as long
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p(memory.ctypes.data)
    torch.cuda.synchronize()  # this thread has a context then
    flags, owner = _READ_ONLY if is_readonly else 0, os.getpid()
    status = int(driver.cuMemHostRegister_v2(address, ctypes.c_size_t(memory.nbytes), ctypes.c_uint(flags)))
    if status:
        log.warning("memory is not pinned: cuMemHostRegister of %d bytes answered %d", memory.nbytes, status)
        return None

    def unpin() -> None:
        if os.getpid() != owner:  # a forked child has no CUDA, and nothing pinned
            return
        torch.cuda.synchronize()  # as above; nor is anything copied any more
        if status := int(driver.cuMemHostUnregister(address)):
            log.warning("memory stays pinned: cuMemHostUnregister of %d bytes answered %d", memory.nbytes, status)

    return unpin


def _advise(address: int, num_bytes: int, advice: int) -> None:
    """madvise(2). What it answers changes nothing: memory gets faster or stays as it is. Linux's numbers."""
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice)


# A call through CDLL lets other threads run.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
