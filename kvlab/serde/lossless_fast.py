"""`kvlab.serde.lossless` for bf16, compiled by numba: the same bytes in one pass, where numpy needs a dozen.

Import `rans_fast` first: it makes numba's library fit to live beside an engine. The GIL is released: objects are coded
on as many cores as there are threads.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvlab.serde.bitpack import packed_shape
from kvlab.serde.window import WIDTH, Window, bases_under

Array = NDArray[Any]
_ESCAPE = WIDTH
_SPECIAL = 255  # the exponent of Inf and NaN
_ONES, _EIGHTS = np.uint64(0x0101010101010101), np.uint64(0x0808080808080808)


def encode(words: NDArray[np.uint16], window: Window) -> tuple[Array, Array, Array, Array]:
    """Codes, rest, escapes and window bases of flat `words`, as `lossless` has them."""
    slabs, length = window.outer * window.tables, window.rows * window.period
    top = np.zeros((window.tables, window.period), np.uint8)
    _highest(words, window.tables, window.rows, window.period, top)
    base = bases_under(top)
    codes = np.empty(packed_shape(slabs, length, 3), np.uint8)
    rest, escapes = np.empty((1, words.size), np.uint8), np.empty(words.size, np.uint8)
    used = _encode(words, base, window.tables, window.rows, window.period, codes, rest[0], escapes)
    return codes, rest, escapes[:used].copy(), base


def decode(codes: Array, rest: Array, escapes: Array, base: Array, window: Window, out: NDArray[np.uint16]) -> bool:
    """Write the words back into flat `out`; False if the list of escapes is too short or too long."""
    taken = _decode(codes, rest[0], escapes, base, window.tables, window.rows, window.period, out)
    return bool(taken == escapes.size)


# Loops run over slices from zero on, one statement each: so their indices need no check, and the compiler makes vectors
# of them.


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _highest(words: Array, tables: int, rows: int, period: int, top: Array) -> None:
    """The largest exponent of each table's columns, but for those of Inf and NaN."""
    for row in range(words.size // period):
        highest, line = top[row // rows % tables], words[row * period : (row + 1) * period]
        for column in range(period):
            exponent = np.uint8(line[column] >> np.uint16(7))
            highest[column] = max(highest[column], np.uint8(0) if exponent == _SPECIAL else exponent)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(
    words: Array, base: Array, tables: int, rows: int, period: int, codes: Array, rest: Array, escapes: Array
) -> int:
    slabs, _, run = codes.shape
    length, used = rows * period, 0
    code, places = np.zeros(8 * run, np.uint8), np.empty(8 * run + 1, np.int64)  # the last run is padded with zeros
    c0, c1, c2, c3, c4, c5, c6, c7 = _runs(code)
    for slab in range(slabs):
        bases, flat = base[slab % tables], words[slab * length : (slab + 1) * length]
        left = rest[slab * length : (slab + 1) * length]
        for place in range(length):
            word = flat[place]
            left[place] = np.uint8(word >> np.uint16(8)) & np.uint8(0x80) | np.uint8(word) & np.uint8(0x7F)
        for row in range(rows):
            line, coded = flat[row * period : (row + 1) * period], code[row * period : (row + 1) * period]
            for column in range(period):
                below = np.uint8(np.uint8(line[column] >> np.uint16(7)) - bases[column])  # wraps below the base
                coded[column] = min(below, np.uint8(_ESCAPE))
        found = _find(code, places)
        for at in range(found):
            escapes[used + at] = np.uint8(flat[places[at]] >> np.uint16(7))
        used += found
        a, b, d = codes[slab, 0], codes[slab, 1], codes[slab, 2]
        for at in range(run):
            a[at] = c0[at] | c1[at] << np.uint8(3) | c2[at] << np.uint8(6)
            b[at] = c2[at] >> np.uint8(2) | c3[at] << np.uint8(1) | c4[at] << np.uint8(4) | c5[at] << np.uint8(7)
            d[at] = c5[at] >> np.uint8(1) | c6[at] << np.uint8(2) | c7[at] << np.uint8(5)
    return used


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: Array, rest: Array, escapes: Array, base: Array, tables: int, rows: int, period: int, out: Array
) -> int:
    """Escapes taken; -1 where there are too few."""
    slabs, _, run = codes.shape
    length, taken = rows * period, 0
    code, places = np.empty(8 * run, np.uint8), np.empty(8 * run + 1, np.int64)
    c0, c1, c2, c3, c4, c5, c6, c7 = _runs(code)
    seven = np.uint8(7)
    for slab in range(slabs):
        a, b, d = codes[slab, 0], codes[slab, 1], codes[slab, 2]
        for at in range(run):
            c0[at] = a[at] & seven
            c1[at] = a[at] >> np.uint8(3) & seven
            c2[at] = a[at] >> np.uint8(6) | (b[at] & np.uint8(1)) << np.uint8(2)
            c3[at] = b[at] >> np.uint8(1) & seven
            c4[at] = b[at] >> np.uint8(4) & seven
            c5[at] = b[at] >> np.uint8(7) | (d[at] & np.uint8(3)) << np.uint8(1)
            c6[at] = d[at] >> np.uint8(2) & seven
            c7[at] = d[at] >> np.uint8(5)
        bases, flat = base[slab % tables], slab * length
        for row in range(rows):
            first = flat + row * period
            coded, left = code[row * period : (row + 1) * period], rest[first : first + period]
            line = out[first : first + period]
            for column in range(period):
                exponent = np.uint16(np.uint8(coded[column] + bases[column]))
                kept = np.uint16(left[column])
                line[column] = (
                    (kept & np.uint16(0x80)) << np.uint16(8) | exponent << np.uint16(7) | kept & np.uint16(0x7F)
                )
        code[length:] = 0
        found = _find(code, places)
        if found > escapes.size - taken:
            return -1
        for at in range(found):
            place = flat + places[at]
            out[place] = out[place] & np.uint16(0x807F) | np.uint16(escapes[taken + at]) << np.uint16(7)
        taken += found
    return taken


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _runs(code: Array) -> Any:
    """A slab's codes as the eight runs in which they are packed."""
    run = code.size // 8
    first, last = code[: 4 * run], code[4 * run :]
    return (
        first[:run], first[run : 2 * run], first[2 * run : 3 * run], first[3 * run :],
        last[:run], last[run : 2 * run], last[2 * run : 3 * run], last[3 * run :],
    )  # fmt: skip


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _find(code: Array, places: Array) -> int:
    """Where the escapes are among 3-bit codes, eight looked at together; how many there are."""
    words, found = code.view(np.uint64), 0
    for at in range(words.size):
        if (words[at] + _ONES) & _EIGHTS:  # of a byte that was 7
            for place in range(8 * at, 8 * at + 8):
                places[found] = place
                found += code[place] == _ESCAPE
    return found
