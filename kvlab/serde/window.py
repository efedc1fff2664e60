"""Where exponents lie: which elements of a tensor share a window, and where each window starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import FormatError
from kvlab.serde.floats import FloatFormat

Bytes = NDArray[np.uint8]

WIDTH = 7  # exponents that a window covers: 3-bit codes 0..6
SAMPLE = 1 << 15  # elements looked at to choose a grid
ENOUGH_ROWS = 128  # rows at which a window per channel costs next to nothing


@dataclass(frozen=True)
class Window:
    """A flat tensor seen as (outer, tables, rows, period), in memory order; one window base per (table, column).

    Typed KV (layers, tokens, ...): tables = layers, rows = tokens, period = the channels of a token. An engine's
    pages (blocks, layers, page_bytes): outer = blocks, and a page is one or more tables of rows of some period.
    """

    outer: int
    tables: int
    rows: int
    period: int

    @staticmethod
    def of(shape: tuple[int, ...], axes: tuple[str, ...], num_elements: int, rows: int, period: int) -> "Window":
        """The grid of a tensor of `num_elements` floats; FormatError if `rows` and `period` do not divide it."""
        outer, slabs, inner = _slabs(shape, axes, num_elements)
        if rows < 1 or period < 1 or inner == 0 or inner % (rows * period):
            raise FormatError(f"window rows and period must divide {inner} elements, got {rows} and {period}")
        return Window(outer, slabs * (inner // (rows * period)), rows, period)

    def batches(self, num_elements: int) -> Iterator[tuple[int, int]]:
        """Runs [start, stop) of the outer * tables slabs with about `num_elements` each."""
        step = max(1, num_elements // (self.rows * self.period))
        slabs = self.outer * self.tables
        for start in range(0, slabs, step):
            yield start, min(start + step, slabs)

    def bases_of(self, base: Bytes, start: int, stop: int) -> Bytes:
        """Window bases of slabs [start, stop), shape (slabs, 1, period)."""
        if stop - start == 1:
            return base[None, start % self.tables : start % self.tables + 1]
        found: Bytes = base[np.arange(start, stop) % self.tables][:, None]
        return found

    def base(self, words: NDArray[Any], fmt: FloatFormat) -> Bytes:
        """Window bases (tables, period) of flat `words`."""
        grid = words.reshape(self.outer, self.tables, self.rows, self.period)
        top = np.zeros((self.tables, self.period), np.uint8)
        step = max(1, (1 << 17) // (self.rows * self.period))
        for start in range(0, self.tables, step):
            for outer in range(self.outer):
                piece = fmt.exponent(grid[outer, start : start + step])
                np.maximum(top[start : start + step], highest(piece, fmt, axis=1), out=top[start : start + step])
        return bases_under(top)


def highest(exponent: Bytes, fmt: FloatFormat, axis: int | tuple[int, ...]) -> Bytes:
    """Largest exponent along `axis`. Inf and NaN would drag the window away from all else, so they are left out."""
    top: Bytes = exponent.max(axis=axis)
    special = (1 << fmt.exponent_bits) - 1
    if fmt.exponent_bits > 4 and top.size and int(top.max()) == special:  # e4m3fn's top exponent holds numbers too
        top = np.where(exponent == special, 0, exponent).max(axis=axis)
    return top


def bases_under(top: Bytes) -> Bytes:
    """Windows that end at the largest exponent.

    That is found in one pass, and on real KV it is the best of all places: moved up or down, more would fall out.
    """
    return np.maximum(top, np.uint8(WIDTH - 1)) - np.uint8(WIDTH - 1)


def best_window(words: NDArray[Any], fmt: FloatFormat, shape: tuple[int, ...], axes: tuple[str, ...]) -> Window:
    """The grid whose windows cost least: a window per channel where enough rows share it, else fewer.

    In typed KV the channels are known. What lies in an opaque page is found by trying rows of likely lengths, so
    that a page packs about as well as typed KV whether it is token- or head-major, or transposed.
    """
    outer, slabs, inner = _slabs(shape, axes, words.size)
    if "page_bytes" in axes or "tokens" not in axes:
        powers = {1 << shift for shift in range(4, 10)}
        periods = {inner >> shift for shift in range(10)} | powers | {1}
        grids = {(rows, period) for period in periods if period for rows in {inner // period} | powers}
    else:
        channels = prod(shape[axes.index("tokens") + 1 :])
        if inner // channels >= ENOUGH_ROWS:
            return Window.of(shape, axes, words.size, inner // channels, channels)
        grids = {(inner // period, period) for period in (channels, shape[-1], 1)}
    fitting = [grid for grid in grids if grid[0] and inner % (grid[0] * grid[1]) == 0 and outer * grid[0] >= 16]
    step = max(1, min(slabs, slabs * inner * min(outer, 4) // SAMPLE))
    exponent = fmt.exponent(words.reshape(outer, slabs, inner)[:4, step // 2 :: step])
    costs = {grid: _cost(exponent, fmt, *grid) + 8 / (outer * grid[0]) for grid in sorted(fitting)}
    rows, period = min(costs, key=lambda grid: costs[grid], default=(inner, 1))
    return Window.of(shape, axes, words.size, rows, period)


def detect_element(raw: Bytes, formats: Mapping[str, FloatFormat]) -> str | None:
    """Name of the float in `formats` that a sample of `raw` packs smallest as, counted per byte; None if none does."""
    costs = {}
    size = min(raw.size, SAMPLE) // 1024 * 1024 or raw.size // 64 * 64
    start = (raw.size - size) // 2 // 1024 * 1024
    for name, fmt in formats.items() if size else ():
        exponent = fmt.exponent(raw[start : start + size].view(fmt.word))
        period = 64 if size % 1024 == 0 else 1  # few models have heads that are not made of 64s; a guess is enough here
        escapes = _cost(exponent[None, None], fmt, exponent.size // period, period)
        costs[name] = (fmt.rest_bits + 3 + escapes) / fmt.item_bytes
    return min(costs, key=lambda name: costs[name], default=None)


def _slabs(shape: tuple[int, ...], axes: tuple[str, ...], num_elements: int) -> tuple[int, int, int]:
    """(outer, slabs, elements of a slab): a slab is a layer's tokens, or a layer's page in one block."""
    if "tokens" in axes:
        outer, slabs = 1, prod(shape[: axes.index("tokens")])
    else:
        outer, slabs = (shape[0], shape[1]) if len(shape) == 3 else (1, 1)
    return outer, slabs, num_elements // max(1, outer * slabs)


def _cost(exponent: Bytes, fmt: FloatFormat, rows: int, period: int) -> float:
    """Bits an element for escapes, if (outer, slabs, inner) exponents get windows over `rows` and `period`."""
    shaped = exponent.reshape(exponent.shape[0], -1, rows, period)
    base = bases_under(highest(shaped, fmt, axis=(0, 2)))
    return 8 * float(np.count_nonzero((shaped - base[:, None]) >= WIDTH)) / max(1, exponent.size)
