"""Pages straight to and from an arena, without a buffer or a kernel between: many copies in one call of the driver.

For comparison in gpu_transfer.py: the ring of `kvlab.paged.cuda` is behind it at no size, so kvlab does without.

Each copy is one run of bytes that lies together on both sides: a page of one layer where every layer has its own
memory, a whole block where its layers lie side by side (BLHNC, BLNHC), and neighbouring blocks together.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvlab.paged.driver import checked, driver_function
from kvlab.paged.layout import PageLayout

Addresses = NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """Parallel arrays: addresses of the pages' side, of the arena's side, and bytes."""

    pages: Addresses
    arena: Addresses
    sizes: Addresses


def copies_between(layout: PageLayout, block_ids: ArrayLike, arena: int, slots: ArrayLike) -> Copies:
    """What has to be copied between `block_ids` and `slots` of an arena [slots, layers, page_bytes] at this address."""
    pages = np.asarray(block_ids, np.int64) * layout.block_stride
    places = np.asarray(slots, np.int64) * layout.block_bytes
    places += arena
    first = layout.addresses[0]
    side_by_side = tuple(range(first, first + layout.block_bytes, layout.page_bytes))
    if layout.addresses == side_by_side and layout.num_layers > 1:  # each block lies together
        pages += first
        return _joined(pages, places, layout.block_bytes)
    pages = np.add.outer(pages, layout.addresses).ravel()
    places = np.add.outer(places, range(0, layout.block_bytes, layout.page_bytes)).ravel()
    return _joined(pages, places, layout.page_bytes)


def _joined(pages: Addresses, places: Addresses, size: int) -> Copies:
    """Neighbours on both sides become one copy. (Plain operations: the first byte waits for them, and for a few blocks
    np.diff or np.append take longer than all of this.)"""
    first = np.ones(pages.size, np.bool_)  # whether a copy begins here
    first[1:] = (pages[1:] - pages[:-1] != size) | (places[1:] - places[:-1] != size)
    starts = first.nonzero()[0]
    if starts.size == pages.size:
        return Copies(pages, places, np.full(pages.size, size))
    sizes = np.empty_like(starts)
    sizes[:-1] = starts[1:] - starts[:-1]
    sizes[-1] = pages.size - starts[-1]
    sizes *= size
    return Copies(pages[starts], places[starts], sizes)


_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    _fields_ = [("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint)]


_BATCH = (
    (ctypes.c_void_p,) * 3 + (ctypes.c_size_t,) + (ctypes.c_void_p,) * 2 + (ctypes.c_size_t,) + (ctypes.c_void_p,) * 2
)


def _address(array: NDArray[np.int64]) -> int:
    """array.ctypes.data, which takes twice as long; refuses what is not contiguous."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def copy_batch(targets: NDArray[np.int64], sources: NDArray[np.int64], sizes: NDArray[np.int64], stream: int) -> None:
    """Many copies in one call, in any order among themselves, on `stream` (not the default one). Three contiguous
    arrays of one length, not empty: addresses, addresses, bytes."""
    attributes = _Attributes(order=_STREAM_ORDER)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    status = driver_function("cuMemcpyBatchAsync", *_BATCH)(
        _address(targets),
        _address(sources),
        _address(sizes),
        sizes.size,
        ctypes.addressof(attributes),
        ctypes.addressof(first),
        1,
        ctypes.addressof(failed),
        stream,
    )
    checked("cuMemcpyBatchAsync", status)
