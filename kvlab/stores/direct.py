"""File reads and writes past the page cache.

Direct I/O (O_DIRECT) wants memory address, file offset and length to be multiples of a block. Memory that is
aligned (``aligned_buffer``, pinned arenas) is handed to the kernel as it is; anything else goes through one
aligned scratch buffer per thread. The last, broken block of a file is written through the page cache: as a whole block
it would make the file longer than what is counted for it, until it is cut, or for ever if the writer dies before.
"""

import fcntl
import os
import threading
from collections.abc import Sequence

import numpy as np

BLOCK = 4096  # fits every disk in use; 512-byte disks accept it too
SCRATCH_BYTES = 4 << 20
_MOST = 1 << 30  # the kernel moves less than 2 GiB per call
_local = threading.local()


def aligned_buffer(num_bytes: int) -> memoryview:
    """A page-aligned buffer of at least `num_bytes`, rounded up to whole blocks; freed with its last view.

    Its content is whatever was there: the C allocator's memory, for it gives large blocks back warm, while fresh pages
    from the system cost direct reads two thirds of their speed.
    """
    length = -(-max(num_bytes, 1) // BLOCK) * BLOCK
    raw = np.empty(length + BLOCK, np.uint8)
    start = -int(raw.__array_interface__["data"][0]) % BLOCK
    return raw[start : start + length].data


def address(view: memoryview) -> int:
    """Where `view`'s bytes lie; 0 for an empty one."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if view.nbytes else 0


def _scratch() -> memoryview:
    if not hasattr(_local, "scratch"):
        _local.scratch = aligned_buffer(SCRATCH_BYTES)
    scratch: memoryview = _local.scratch
    return scratch


def _pwrite_all(fd: int, pieces: Sequence[memoryview], at: int) -> int:
    """Write all `pieces` at offset `at`; the offset after them."""
    rest = [piece for piece in pieces if piece.nbytes]
    while rest:
        batch = [piece[:_MOST] for piece in rest[:1]] + [piece for piece in rest[1:16] if piece.nbytes <= _MOST // 16]
        done = os.pwritev(fd, batch, at)
        if done == 0:
            raise OSError(f"the kernel took nothing at offset {at}")
        at += done
        while rest and done >= rest[0].nbytes:
            done -= rest.pop(0).nbytes
        if rest:
            rest[0] = rest[0][done:]
    return at


def write_file(fd: int, pieces: Sequence[memoryview], *, direct: bool) -> int:
    """Write `pieces` one after the other from offset 0; the number of bytes. With `direct`, `fd` is O_DIRECT."""
    if not direct:
        return _pwrite_all(fd, pieces, 0)
    scratch, filled, at, total = _scratch(), 0, 0, 0
    for piece in pieces:
        start, done = address(piece), 0
        total += piece.nbytes
        while done < piece.nbytes:
            whole = (piece.nbytes - done) // BLOCK * BLOCK
            if whole and filled % BLOCK == 0 and (start + done) % BLOCK == 0:
                at = _pwrite_all(fd, [scratch[:filled], piece[done : done + whole]], at)
                filled = 0
                done += whole
                continue
            step = min(piece.nbytes - done, scratch.nbytes - filled)
            # Through numpy, which lets other threads run meanwhile: a copy between memoryviews does not.
            np.frombuffer(scratch, np.uint8, step, filled)[:] = np.frombuffer(piece, np.uint8, step, done)
            filled += step
            done += step
            if filled == scratch.nbytes:
                at = _pwrite_all(fd, [scratch], at)
                filled = 0
    whole = filled // BLOCK * BLOCK
    at = _pwrite_all(fd, [scratch[:whole]], at)
    if filled > whole:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        _pwrite_all(fd, [scratch[whole:filled]], at)
    return total


def read_file(fd: int, out: Sequence[memoryview], size: int, *, direct: bool) -> int:
    """Read the file's first `size` bytes into the buffers `out`, one after the other; fewer only if the file is shorter
    than that.

    Aligned buffers with room for whole blocks are filled by the disk itself, all of them in one call.
    """
    if len(out) == 1:
        return _read_one(fd, out[0], size, direct=direct)
    if size <= _MOST and (
        not direct or all(address(piece) % BLOCK == 0 and piece.nbytes and piece.nbytes % BLOCK == 0 for piece in out)
    ):
        got = os.preadv(fd, out, 0)
        if got >= size:
            return size
    whole = aligned_buffer(size)
    got = _read_one(fd, whole, size, direct=direct)
    at = 0
    for piece in out:
        into = piece[: got - at]
        into[:] = whole[at : at + into.nbytes]
        at += into.nbytes
    return got


def _read_one(fd: int, out: memoryview, size: int, *, direct: bool) -> int:
    scratch = _scratch()
    aligned = not direct or address(out) % BLOCK == 0
    at = 0
    while at < size:
        room = min(out.nbytes - at, _MOST)
        if not direct:
            got = os.preadv(fd, [out[at : at + min(room, size - at)]], at)
        elif aligned and at % BLOCK == 0 and room >= BLOCK:
            whole = min(room, -(-(size - at) // BLOCK) * BLOCK) // BLOCK * BLOCK
            got = os.preadv(fd, [out[at : at + whole], scratch[:BLOCK]], at)
            over = min(got, size - at) - whole
            if over > 0:  # the last, broken block does not fit behind the whole ones in `out`
                out[at + whole : at + whole + over] = scratch[:over]
        else:
            base = at // BLOCK * BLOCK
            want = min(scratch.nbytes, -(-(size - base) // BLOCK) * BLOCK)
            got = max(0, min(os.preadv(fd, [scratch[:want]], base), size - base) - (at - base))
            out[at : at + got] = scratch[at - base : at - base + got]
        if got == 0:
            break
        at += got
    return min(at, size)
