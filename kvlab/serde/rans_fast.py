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

# llvmlite answers every attribute, even `__dict__`, with a wrapped C function. vLLM reads the `__dict__` of whatever
# modules hold when it starts, and would stop at that one: a process that has used this codec could start no engine.
ffi.lib._fntab.setdefault("__dict__", {})

Array = NDArray[Any]
BESIDE = 8  # lanes decoded side by side: their look-ups do not depend on each other and overlap
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
    if out.size and not _decode(words, starts, ends, model.index, model.cum, model.lut, out):
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
def _decode(words: Array, starts: Array, ends: Array, index: Array, cum: Array, lut: Array, out: Array) -> bool:
    planes, steps, channels = out.shape
    lanes = starts.shape[1]
    last = np.uint64(words.size - 1)
    states = np.empty(lanes, np.uint32)
    at = np.empty(lanes, np.uint64)
    for plane in range(planes):
        for first in range(0, lanes, BESIDE):
            beside = min(first + BESIDE, lanes)
            for lane in range(first, beside):
                begin = starts[plane, lane]
                at[lane] = begin + 2
                states[lane] = (np.uint32(words[begin]) << np.uint32(16)) | np.uint32(words[begin + 1])
            for step in range(steps):
                for turn in range(channels // lanes):
                    for lane in range(first, beside):
                        channel = turn * lanes + lane
                        table = np.uint64(index[plane, channel])  # unsigned: numba need not look for negative ones
                        state = states[lane]
                        slot = state & np.uint32(_MASK)
                        symbol = np.uint64(lut[table, np.uint64(slot >> np.uint32(_BUCKET))])
                        high = np.uint32(cum[table, symbol + np.uint64(1)])
                        low = np.uint32(cum[table, symbol])
                        while high <= slot:
                            symbol += np.uint64(1)
                            low = high
                            high = np.uint32(cum[table, symbol + np.uint64(1)])
                        state = np.uint32((high - low) * (state >> np.uint32(_SHIFT)) + slot - low)
                        position = at[lane]
                        word = np.uint32(words[min(position, last)])
                        empty = state < np.uint32(1 << 16)
                        states[lane] = (state << np.uint32(16)) | word if empty else state
                        at[lane] = position + np.uint64(empty)
                        out[plane, step, channel] = symbol
            for lane in range(first, beside):
                if states[lane] != np.uint32(1 << 16) or at[lane] != ends[plane, lane]:
                    return False
    return True
