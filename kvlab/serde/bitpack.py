"""Codes of 3 or 4 bits, packed so that one instruction unpacks many.

Packing is *vertical*: a row of n codes is cut into 8 (or 2) equal runs, and byte i holds bits of the i-th code of
each run. Unpacking is then the same shift and mask over whole runs, which numpy, torch and a GPU all do at the
speed of memory; horizontal packing (neighbours in one byte) would need a shuffle per element.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def packed_shape(num_rows: int, row_length: int, width: int) -> tuple[int, int, int]:
    """Shape of the packed form of (num_rows, row_length) codes: (rows, width or 1, bytes of a run)."""
    return (num_rows, 3, -(-row_length // 8)) if width == 3 else (num_rows, 1, -(-row_length // 2))


def pack(codes: Bytes, width: int) -> Bytes:
    """(rows, n) codes below 2**width -> `packed_shape`; the last run is padded with zeros."""
    rows, length = codes.shape
    out = np.empty(packed_shape(rows, length, width), np.uint8)
    runs = 8 if width == 3 else 2
    padded = out.shape[2] * runs
    if padded != length:
        codes = np.pad(codes, ((0, 0), (0, padded - length)))
    c = codes.reshape(rows, runs, out.shape[2])
    if width == 4:
        np.bitwise_or(c[:, 0], c[:, 1] << 4, out=out[:, 0])
        return out
    a, b, d = out[:, 0], out[:, 1], out[:, 2]
    np.left_shift(c[:, 1], 3, out=a)
    a |= c[:, 0]
    a |= c[:, 2] << 6
    np.right_shift(c[:, 2], 2, out=b)
    b |= c[:, 3] << 1
    b |= c[:, 4] << 4
    b |= c[:, 5] << 7
    np.right_shift(c[:, 5], 1, out=d)
    d |= c[:, 6] << 2
    d |= c[:, 7] << 5
    return out


def unpack(packed: Bytes, row_length: int, width: int, out: Bytes | None = None) -> Bytes:
    """The (rows, row_length) codes that `pack` packed; a view into (rows, runs, run length) scratch `out` if given."""
    rows, _, run = packed.shape
    runs = 8 if width == 3 else 2
    c = np.empty((rows, runs, run), np.uint8) if out is None else out[:rows]
    if width == 4:
        np.bitwise_and(packed[:, 0], 15, out=c[:, 0])
        np.right_shift(packed[:, 0], 4, out=c[:, 1])
        return c.reshape(rows, runs * run)[:, :row_length]
    a, b, d = packed[:, 0], packed[:, 1], packed[:, 2]
    np.bitwise_and(a, 7, out=c[:, 0])
    for source, shift, run_index in ((a, 3, 1), (b, 1, 3), (b, 4, 4), (d, 2, 6)):
        np.right_shift(source, shift, out=c[:, run_index])
        c[:, run_index] &= 7
    np.bitwise_and(b, 1, out=c[:, 2])
    c[:, 2] <<= 2
    c[:, 2] |= a >> 6
    np.bitwise_and(d, 3, out=c[:, 5])
    c[:, 5] <<= 1
    c[:, 5] |= b >> 7
    np.right_shift(d, 5, out=c[:, 7])
    return c.reshape(rows, runs * run)[:, :row_length]
