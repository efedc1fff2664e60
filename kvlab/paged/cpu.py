"""Copies between an engine's pages and a host arena, for caches in CPU memory."""

import time
from collections.abc import Sequence
from math import prod
from threading import Thread

import numpy as np
import torch
from numpy.typing import NDArray

from kvlab.hostmemory import populate, reserve
from kvlab.paged.layout import PageLayout, check_block_ids
from kvlab.sharedmemory import SharedSlots


class WallClock:
    """Seconds from its making to `stop`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: float | None = None

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._start

    def seconds(self) -> float | None:
        return self._seconds

    def delay(self) -> float:
        return self._seconds or 0.0


class CPUTransfer:
    """Pages and arena lie in the same memory: a copy is a copy.

    `arena` is uint8 [slots, layers, page_bytes], or what `slot_shape` says; a slot holds one block. Copies go through
    numpy, page by page: torch would start a team of OpenMP threads for every thread that copies, and those spin beside
    the model's own.
    """

    coded_tokens = num_unheard = 0

    def __init__(
        self,
        layout: PageLayout,
        num_slots: int,
        *,
        shared: SharedSlots | None = None,
        slot_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.layout = layout
        shape = slot_shape or (layout.num_layers, layout.page_bytes)
        self._shared = shared
        memory = shared.slots if shared is not None else reserve(num_slots * prod(shape))
        self._arena = memory.reshape(num_slots, *shape)
        self.arena = torch.from_numpy(self._arena)
        # Now, by one thread beside the engine: no request should pay for memory that is touched for the first time.
        Thread(target=populate, args=(self._arena,), kwargs={"threads": 1}, daemon=True, name="kvlab-arena").start()
        self._pages = [pages.numpy() for pages in layout.pages]

    def save(self, block_ids: Sequence[int], slots: Sequence[int], num_tokens: Sequence[int] = ()) -> None:
        """Copy pages into slots; done when it returns."""
        check_block_ids(block_ids, self.layout.num_blocks)
        for layer, pages in enumerate(self._pages):
            for block_id, slot in zip(block_ids, slots, strict=True):
                self._arena[slot, layer] = pages[block_id]

    def load(self, slots: Sequence[int], block_ids: Sequence[int], num_tokens: Sequence[int] = ()) -> None:
        """Copy slots into pages; done when it returns."""
        self._fill([self._arena[slot] for slot in slots], block_ids, num_tokens)

    def _fill(self, blocks: Sequence[NDArray[np.uint8]], block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        check_block_ids(block_ids, self.layout.num_blocks)
        for layer, pages in enumerate(self._pages):
            for block_id, block in zip(block_ids, blocks, strict=True):
                pages[block_id] = block[layer]

    def map_lent(self, memory: NDArray[np.uint8]) -> bool:
        """True: any memory that this process can read is a source."""
        self._lent = memory
        return True

    def load_lent(
        self, places: Sequence[int], block_ids: Sequence[int], after: None = None, num_tokens: Sequence[int] = ()
    ) -> WallClock:
        clock, shape = WallClock(), self._arena.shape[1:]
        blocks = [self._lent[at : at + prod(shape)].reshape(shape) for at in places]
        self._fill(blocks, block_ids, num_tokens)
        clock.stop()
        return clock

    def clear(self, block_ids: Sequence[int]) -> None:
        """Fill pages with zeros."""
        check_block_ids(block_ids, self.layout.num_blocks)
        for pages in self._pages:
            for block_id in block_ids:
                pages[block_id] = 0

    def before_writes(self, block_ids: Sequence[int]) -> None:
        """Nothing: no save is under way when a call returns."""

    def fence(self) -> None:
        """Nothing is under way when a call returns."""

    def load_aside(
        self, slots: Sequence[int], block_ids: Sequence[int], after: None = None, num_tokens: Sequence[int] = ()
    ) -> WallClock:
        clock = WallClock()
        self.load(slots, block_ids, num_tokens)
        clock.stop()
        return clock

    def is_settled(self, slots: Sequence[int]) -> bool:
        """True: no copy is under way when a call returns."""
        return True

    def take_unfit(self, wait_for: Sequence[int] | None = ()) -> set[int]:
        """None: pages are kept whatever they hold."""
        return set()

    def mark_saved(self, number: int) -> None:
        if self._shared is not None:
            self._shared.copied[0] = number

    def clock(self) -> WallClock:
        """Starts now."""
        return WallClock()

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """What `slots` hold, uint8 [blocks, layers, page_bytes]."""
        return self.arena[list(slots)]

    def close(self) -> None:
        """Nothing: the arena is ordinary memory."""
