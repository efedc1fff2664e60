"""The loops of `kvlab.serde.rans` compiled by numba: the same words and symbols, some ten times faster.

Only loops live here; checks and layout are the reference's. Without numba everything still works, slower: no
library decodes streams of thousands of small static tables (constriction takes 7.8 us to begin each).
"""

from typing import Any

import numpy as np
from llvmlite.binding import ffi
from numba import njit
from numpy.typing import NDArray

from kvlab.errors import FormatError
from kvlab.serde import rans

# llvmlite answers every attribute, even `__dict__`, with a wrapped C function. At its start vLLM reads the `__dict__`
# of every object that a module holds, and would stop at this one: a process that has used this codec could start no
# engine.
ffi.lib._fntab.setdefault("__dict__", {})

Array = NDArray[Any]
_SHIFT, _BUCKET, _MASK = rans.PRECISION, rans.BUCKET, rans.TOTAL - 1


def encode(symbols: NDArray[np.uint8], model: rans.Model, lanes: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """As `rans.encode`."""
    planes, steps, channels = symbols.shape
    if symbols.size == 0 or steps * (channels // lanes) > rans.MAX_LANE_SYMBOLS:
        return rans.encode(symbols, model, lanes)
    words = np.empty(planes * lanes * (steps * (channels // lanes) + 2), np.uint16)
    lengths = np.empty((planes, lanes), np.uint16)
    used = _encode(np.ascontiguousarray(symbols), model.index, model.cum, lanes, words, lengths)
    return words[:used].copy(), lengths


def decode(words: NDArray[np.uint16], lengths: NDArray[np.uint16], model: rans.Model, steps: int) -> NDArray[np.uint8]:
    """As `rans.decode`."""
    starts, ends = rans.lane_bounds(words, lengths, model, steps)
    out = np.empty((model.index.shape[0], steps, model.index.shape[1]), np.uint8)
    # Where many symbols share a bucket, one step of the walk without a branch is cheaper than a guess that fails.
    walk = int(model.cum.shape[1] > 64)
    if out.size and not _decode(words, starts, ends, model.index, model.cum, model.lut, walk, out):
        raise FormatError("an entropy-coded lane does not end where it began")
    return out


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(symbols: Array, index: Array, cum: Array, lanes: int, words: Array, lengths: Array) -> int:
    planes, steps, channels = symbols.shape
    per_lane = channels // lanes
    used = 0
    for plane in range(planes):
        for lane in range(lanes):
            first = used
            state = np.uint64(1 << 16)
            for step in range(steps - 1, -1, -1):
                for turn in range(per_lane - 1, -1, -1):
                    channel = turn * lanes + lane
                    table = index[plane, channel]
                    symbol = symbols[plane, step, channel]
                    low = np.uint64(cum[table, symbol])
                    frequency = np.uint64(cum[table, symbol + 1]) - low
                    if state >= frequency << np.uint64(32 - _SHIFT):
                        words[used] = state & np.uint64(0xFFFF)
                        used += 1
                        state >>= np.uint64(16)
                    whole = state // frequency
                    state = (whole << np.uint64(_SHIFT)) + low + (state - whole * frequency)
            words[used] = state & np.uint64(0xFFFF)
            words[used + 1] = state >> np.uint64(16)
            used += 2
            lengths[plane, lane] = used - first
            left, right = first, used - 1  # the decoder reads what was written last first
            while left < right:
                words[left], words[right] = words[right], words[left]
                left += 1
                right -= 1
    return used


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _step(
    words: Array, index: Array, cum: Array, lut: Array, walk: int, plane: Any, channel: Any, state: Any, at: Any
) -> Any:
    """One symbol of one lane: the symbol, and the lane's next state and position."""
    table = np.uint64(index[plane, channel])  # unsigned: numba need not look for negative ones
    slot = state & np.uint32(_MASK)
    symbol = np.uint64(lut[table, np.uint64(slot >> np.uint32(_BUCKET))])
    for _ in range(walk):
        symbol += np.uint64(np.uint32(cum[table, symbol + np.uint64(1)]) <= slot)
    high = np.uint32(cum[table, symbol + np.uint64(1)])
    low = np.uint32(cum[table, symbol])
    while high <= slot:
        symbol += np.uint64(1)
        low = high
        high = np.uint32(cum[table, symbol + np.uint64(1)])
    state = np.uint32((high - low) * (state >> np.uint32(_SHIFT)) + slot - low)
    word = np.uint32(words[min(at, np.uint64(words.size - 1))])
    empty = state < np.uint32(rans.LOW)
    return symbol, (state << np.uint32(16)) | word if empty else state, at + np.uint64(empty)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _begin(words: Array, starts: Array, stream: int) -> Any:
    """A lane's plane and number, its first state, and where its words go on."""
    lanes = starts.shape[1]
    plane, lane = np.uint64(stream // lanes), np.uint64(stream % lanes)
    begin = starts[plane, lane]
    return plane, lane, (np.uint32(words[begin]) << np.uint32(16)) | np.uint32(words[begin + 1]), np.uint64(begin + 2)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    words: Array, starts: Array, ends: Array, index: Array, cum: Array, lut: Array, walk: int, out: Array
) -> bool:
    """Four lanes at a time, of whatever planes, in registers: their look-ups do not wait for each other, and an array
    of states would go through memory at every step (measured: 1.4 times slower)."""
    planes, steps, channels = out.shape
    lanes = starts.shape[1]
    last = planes * lanes - 1
    for first in range(0, last + 1, 4):  # at the end the last lane is decoded several times over, to the same symbols
        p0, l0, s0, a0 = _begin(words, starts, first)
        p1, l1, s1, a1 = _begin(words, starts, min(first + 1, last))
        p2, l2, s2, a2 = _begin(words, starts, min(first + 2, last))
        p3, l3, s3, a3 = _begin(words, starts, min(first + 3, last))
        for step in range(steps):
            for turn in range(channels // lanes):
                at = np.uint64(turn * lanes)
                out[p0, step, at + l0], s0, a0 = _step(words, index, cum, lut, walk, p0, at + l0, s0, a0)
                out[p1, step, at + l1], s1, a1 = _step(words, index, cum, lut, walk, p1, at + l1, s1, a1)
                out[p2, step, at + l2], s2, a2 = _step(words, index, cum, lut, walk, p2, at + l2, s2, a2)
                out[p3, step, at + l3], s3, a3 = _step(words, index, cum, lut, walk, p3, at + l3, s3, a3)
        if s0 != rans.LOW or s1 != rans.LOW or s2 != rans.LOW or s3 != rans.LOW:
            return False
        if a0 != ends[p0, l0] or a1 != ends[p1, l1] or a2 != ends[p2, l2] or a3 != ends[p3, l3]:
            return False
    return True
