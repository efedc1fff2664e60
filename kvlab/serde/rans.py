"""Range ANS with one stream a lane: the entropy coder of the cachegen kinds, in numpy.

rANS (Duda, arXiv 1311.2540; layout after ryg_rans) codes a symbol of frequency f out of 4,096 in log2(4096/f) bits.
Streams are cut into *lanes* that know nothing of each other, so that a CPU decodes many with overlapping latency
and a GPU gives each a thread; inside a lane everything is sequential. State is 32 bits, words are 16: a decoder
step is one multiply, one table look-up, and at most one word.

Symbols are (planes, steps, channels); lane j of a plane holds channels j, j + lanes, j + 2 lanes..., step by step.
`kvlab.serde.rans_fast` does the same with numba, and the Triton kernel on a GPU; this is what they are held against.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import ConfigError, FormatError

PRECISION = 12  # bits of a probability
TOTAL = 1 << PRECISION
BUCKET = 5  # bits of a slot that the look-up leaves to the walk
LOW = 1 << 16  # a state below this takes in a word
TABLES_AT_ONCE = 1 << 12
MAX_LANE_SYMBOLS = 80_000  # so that a lane's number of words fits 16 bits

Array = NDArray[Any]


@dataclass(frozen=True)
class Model:
    """Which distribution codes which channel: `index` (planes, channels) into rows of `cum`.

    `cum` is (tables, symbols + 1) uint16, from 0 to 4,096, rising by at least 1: every symbol can be coded. `lut`
    (tables, 128) uint8 says which symbol the first of 32 slots belongs to; the rest is a short walk up `cum`. A look-up
    of all 4,096 slots would be one step, but its 64 cache lines a channel come from memory for every chunk, and
    a chunk has only some 256 symbols a channel to pay for them (measured: more than twice slower).
    """

    index: NDArray[np.int32]
    cum: NDArray[np.uint16]
    lut: NDArray[np.uint8]

    @staticmethod
    def of(index: Array, frequencies: Array) -> "Model":
        """A model from (tables, symbols) frequencies that sum to 4,096 in each row."""
        if frequencies.ndim != 2 or not 2 <= frequencies.shape[1] <= 256 or index.ndim != 2:
            raise FormatError(f"a table must have 2 to 256 symbols, got shape {list(frequencies.shape)}")
        wide = frequencies.astype(np.int64)
        if (
            (wide < 1).any()
            or (wide.sum(1) != TOTAL).any()
            or (index.size and not 0 <= index.min() <= index.max() < len(wide))
        ):
            raise FormatError(f"frequencies must be at least 1 and sum to {TOTAL} in every table that is named")
        cum = np.zeros((len(wide), wide.shape[1] + 1), np.uint16)
        cum[:, 1:] = np.cumsum(wide, axis=1)
        return Model(np.ascontiguousarray(index, np.int32), cum, _first_symbols(cum))


def _first_symbols(cum: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """The look-up of a model: for each table and bucket, how many symbols end at or before its first slot."""
    buckets = TOTAL >> BUCKET
    first = (cum[:, 1:-1] + ((1 << BUCKET) - 1)) >> BUCKET  # the first bucket that begins behind each symbol
    lut = np.empty((len(cum), buckets), np.uint8)
    for start in range(
        0, len(cum), TABLES_AT_ONCE
    ):  # a file or a chunk may hold many, and all at once take 10 times that
        piece = first[start : start + TABLES_AT_ONCE].astype(np.int32)
        flat = piece + np.arange(len(piece), dtype=np.int32)[:, None] * (buckets + 1)
        counts = np.bincount(flat.reshape(-1), minlength=len(piece) * (buckets + 1))
        lut[start : start + TABLES_AT_ONCE] = np.cumsum(counts.reshape(len(piece), -1), axis=1)[:, :buckets]
    return lut


def normalized(counts: Array) -> NDArray[np.uint16]:
    """(tables, symbols) counts as frequencies that sum to 4,096, each at least 1 (add-one for the unseen)."""
    num_symbols = counts.shape[1]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    frequencies = 1 + np.floor(share * (TOTAL - num_symbols)).astype(np.int64)
    rows = np.arange(len(counts))
    frequencies[rows, frequencies.argmax(axis=1)] += TOTAL - frequencies.sum(axis=1)
    found: NDArray[np.uint16] = frequencies.astype(np.uint16)
    return found


def num_lanes(channels: int, channels_per_lane: int) -> int:
    """Lanes of a plane: as many channels share one as asked for, or the next smaller number that divides them."""
    per_lane = next(n for n in range(min(channels_per_lane, channels), 0, -1) if channels % n == 0)
    return channels // per_lane


def encode(symbols: NDArray[np.uint8], model: Model, lanes: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Words of all lanes one after the other, and their number in each (planes, lanes)."""
    planes, steps, channels = symbols.shape
    if steps * (channels // max(1, lanes)) > MAX_LANE_SYMBOLS:
        raise ConfigError(f"a chunk may hold {MAX_LANE_SYMBOLS * lanes // channels} tokens for this coder, got {steps}")
    per_lane = channels // lanes
    state = np.full((planes, lanes), LOW, np.uint64)
    words = np.zeros((planes, lanes, steps * per_lane + 2), np.uint16)
    used = np.zeros((planes, lanes), np.int64)  # words are written backwards, as rANS decodes in reverse
    for step in reversed(range(steps)):
        for turn in reversed(range(per_lane)):
            at = slice(turn * lanes, (turn + 1) * lanes)
            table, symbol = model.index[:, at], symbols[:, step, at].astype(np.intp)
            low = model.cum[table, symbol].astype(np.uint64)
            frequency = model.cum[table, symbol + 1] - low
            full = state >= frequency << np.uint64(32 - PRECISION)
            plane, lane = np.nonzero(full)
            words[plane, lane, used[plane, lane]] = (state[full] & np.uint64(0xFFFF)).astype(np.uint16)
            used += full
            state = np.where(full, state >> np.uint64(16), state)
            state = (state // frequency << np.uint64(PRECISION)) + low + state % frequency
    for half in (state & np.uint64(0xFFFF), state >> np.uint64(16)):
        np.put_along_axis(words, used[..., None], half.astype(np.uint16)[..., None], axis=2)
        used += 1
    order = used[..., None] - 1 - np.arange(words.shape[2])
    backwards = np.take_along_axis(words, np.maximum(order, 0), axis=2)
    return backwards[order >= 0], used.astype(np.uint16)


def decode(words: NDArray[np.uint16], lengths: NDArray[np.uint16], model: Model, steps: int) -> NDArray[np.uint8]:
    """The (planes, steps, channels) symbols; FormatError where a lane does not end as it was begun."""
    planes, channels = model.index.shape
    lanes = lengths.shape[1]
    starts, ends = lane_bounds(words, lengths, model, steps)
    out = np.empty((planes, steps, channels), np.uint8)
    if out.size == 0:
        return out
    state = words[starts].astype(np.uint64) << np.uint64(16) | words[starts + 1]
    at = starts + 2
    for step in range(steps):
        for turn in range(channels // lanes):
            chosen = slice(turn * lanes, (turn + 1) * lanes)
            table, slot = model.index[:, chosen], (state & np.uint64(TOTAL - 1)).astype(np.intp)
            symbol = model.lut[table, slot >> BUCKET].astype(np.intp)
            while (higher := model.cum[table, symbol + 1] <= slot).any():
                symbol += higher
            low = model.cum[table, symbol].astype(np.uint64)
            frequency = model.cum[table, symbol + 1] - low
            state = frequency * (state >> np.uint64(PRECISION)) + slot.astype(np.uint64) - low
            empty = state < LOW
            word = words[np.minimum(at, words.size - 1)]
            state = np.where(empty, state << np.uint64(16) | word, state) & np.uint64(0xFFFFFFFF)
            at = at + empty
            out[:, step, chosen] = symbol
    if (state != LOW).any() or (at != ends).any():
        raise FormatError("an entropy-coded lane does not end where it began")
    return out


def lane_bounds(words: Array, lengths: Array, model: Model, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last word of each lane (planes, lanes), or FormatError where lanes and words do not fit."""
    planes, channels = model.index.shape
    if lengths.ndim != 2 or lengths.shape[0] != planes or lengths.shape[1] < 1 or channels % lengths.shape[1]:
        raise FormatError(f"lane lengths {list(lengths.shape)} do not fit {planes} planes of {channels} channels")
    if steps * (channels // lengths.shape[1]) > MAX_LANE_SYMBOLS or words.ndim != 1:
        raise FormatError(f"a lane of {steps} tokens is longer than this format allows")
    ends = np.cumsum(lengths.reshape(-1).astype(np.int64)).reshape(lengths.shape)
    starts = ends - lengths
    if (lengths < 2).any() or (ends.size and int(ends.reshape(-1)[-1]) != words.size):
        raise FormatError(f"lanes name {int(ends.max(initial=0))} words, there are {words.size}", reason="truncated")
    return starts, ends
