"""Pages straight to and from an arena, without a buffer or a kernel between: many copies in one call of the driver.

Each copy is one run of bytes that lies together on both sides: a page of one layer where every layer has its own
memory, a whole block where its layers lie side by side (BLHNC, BLNHC), and neighbouring blocks together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvlab.paged.layout import PageLayout

Addresses = NDArray[np.uint64]


@dataclass(frozen=True)
class Copies:
    """Parallel arrays: addresses of the pages' side, of the arena's side, and bytes."""

    pages: Addresses
    arena: Addresses
    sizes: Addresses


def copies_between(
    layout: PageLayout, block_ids: NDArray[np.integer], arena: int, slots: NDArray[np.integer]
) -> Copies:
    """What has to be copied between `block_ids` and `slots` of an arena [slots, layers, page_bytes] at this address."""
    whole = layout.block_in_one_run
    parts = layout.pages[:1] if whole else layout.pages  # of a block, each one run of bytes
    size = layout.block_bytes if whole else layout.page_bytes
    bases = np.array([part.data_ptr() for part in parts], np.uint64)
    within = np.arange(len(parts), dtype=np.uint64) * np.uint64(size)
    pages = bases + block_ids.astype(np.uint64)[:, None] * np.uint64(layout.pages[0].stride(0))
    places = within + (np.uint64(arena) + slots.astype(np.uint64)[:, None] * np.uint64(layout.block_bytes))
    return _joined(pages.ravel(), places.ravel(), np.uint64(size))


def _joined(pages: Addresses, places: Addresses, size: np.uint64) -> Copies:
    """Neighbours on both sides become one copy."""
    apart = (np.diff(pages) != size) | (np.diff(places) != size)
    starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    counts = np.diff(np.append(starts, pages.size)).astype(np.uint64)
    return Copies(pages[starts], places[starts], counts * size)
