"""File reads and writes past the page cache.

Direct I/O (O_DIRECT) wants memory address, file offset and length to be multiples of a block. Memory that is
aligned (`hostmemory.aligned`, pinned arenas) is handed to the kernel as it is; anything else goes through one
aligned scratch buffer per thread. The last, broken block of a file is written through the page cache: as a whole block
it would make the file longer than what is counted for it, until it is cut, or for ever if the writer dies before.
"""

import fcntl
import os
from collections.abc import Sequence

import numpy as np

from kvlab.hostmemory import PAGE, address, aligned, scratch
from kvlab.system import O_DIRECT

SCRATCH_BYTES = 4 << 20
_MOST = 1 << 30  # the kernel moves less than 2 GiB per call


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
    buffer, filled, at, total = scratch("direct", SCRATCH_BYTES), 0, 0, 0
    for piece in pieces:
        start, done = address(piece), 0
        total += piece.nbytes
        while done < piece.nbytes:
            whole = (piece.nbytes - done) // PAGE * PAGE
            if whole and filled % PAGE == 0 and (start + done) % PAGE == 0:
                at = _pwrite_all(fd, [buffer[:filled], piece[done : done + whole]], at)
                filled = 0
                done += whole
                continue
            step = min(piece.nbytes - done, buffer.nbytes - filled)
            # Through numpy, which lets other threads run meanwhile: a copy between memoryviews does not.
            np.frombuffer(buffer, np.uint8, step, filled)[:] = np.frombuffer(piece, np.uint8, step, done)
            filled += step
            done += step
            if filled == buffer.nbytes:
                at = _pwrite_all(fd, [buffer], at)
                filled = 0
    whole = filled // PAGE * PAGE
    at = _pwrite_all(fd, [buffer[:whole]], at)
    if filled > whole:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)
        _pwrite_all(fd, [buffer[whole:filled]], at)
    return total


def read_file(fd: int, out: Sequence[memoryview], size: int, *, direct: bool) -> int:
    """Read the file's first `size` bytes into the buffers `out`, one after the other; fewer only if the file is shorter
    than that.

    Aligned buffers with room for whole blocks are filled by the disk itself, all of them in one call.
    """
    if len(out) == 1:
        return _read_one(fd, out[0], size, direct=direct)
    if size <= _MOST and (
        not direct or all(address(piece) % PAGE == 0 and piece.nbytes and piece.nbytes % PAGE == 0 for piece in out)
    ):
        got = os.preadv(fd, out, 0)
        if got >= size:
            return size
    whole = aligned(size)
    got = _read_one(fd, whole, size, direct=direct)
    at = 0
    for piece in out:
        into = piece[: got - at]
        into[:] = whole[at : at + into.nbytes]
        at += into.nbytes
    return got


def _read_one(fd: int, out: memoryview, size: int, *, direct: bool) -> int:
    buffer = scratch("direct", SCRATCH_BYTES)
    is_aligned = not direct or address(out) % PAGE == 0
    at = 0
    while at < size:
        room = min(out.nbytes - at, _MOST)
        if not direct:
            got = os.preadv(fd, [out[at : at + min(room, size - at)]], at)
        elif is_aligned and at % PAGE == 0 and room >= PAGE:
            whole = min(room, -(-(size - at) // PAGE) * PAGE) // PAGE * PAGE
            got = os.preadv(fd, [out[at : at + whole], buffer[:PAGE]], at)
            over = min(got, size - at) - whole
            if over > 0:  # the last, broken block does not fit behind the whole ones in `out`
                out[at + whole : at + whole + over] = buffer[:over]
        else:
            base = at // PAGE * PAGE
            want = min(buffer.nbytes, -(-(size - base) // PAGE) * PAGE)
            got = max(0, min(os.preadv(fd, [buffer[:want]], base), size - base) - (at - base))
            out[at : at + got] = buffer[at - base : at - base + got]
        if got == 0:
            break
        at += got
    return min(at, size)
