"""Pages straight to and from an arena, without a buffer or a kernel between: many copies in one call of the driver.

Nothing here is on the connector's way: the ring of `staging` is at no size behind it (benchmarks/gpu_transfer.py).

Each copy is one run of bytes that lies together on both sides: a page of one layer where every layer has its own
memory, a whole block where its layers lie side by side (BLHNC, BLNHC), and neighbouring blocks together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    if layout.block_in_one_run:
        pages += layout.addresses[0]
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
