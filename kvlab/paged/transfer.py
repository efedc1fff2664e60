"""Copies between an engine's pages and a host arena, for caches in CPU memory."""

from collections.abc import Sequence

import torch

from kvlab.paged.layout import PageLayout
from kvlab.paged.reference import scatter


class CPUTransfer:
    """Pages and arena lie in the same memory: a copy is a copy.

    `arena` is uint8 [slots, layers, page_bytes]; a slot holds one block.
    """

    def __init__(self, layout: PageLayout, num_slots: int) -> None:
        self.layout = layout
        self.arena = layout.buffer(num_slots)

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copy pages into slots; done when it returns."""
        blocks, rows = torch.as_tensor(block_ids), torch.as_tensor(slots)
        for layer, pages in enumerate(self.layout.pages):
            self.arena[rows, layer] = pages[blocks]

    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy slots into pages; done when it returns."""
        scatter(self.layout, block_ids, self.slots(slots))

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """The content of `slots`, uint8 [blocks, layers, page_bytes]: a view where they lie in one run."""
        first = slots[0]
        if all(slot == first + i for i, slot in enumerate(slots)):
            return self.arena[first : first + len(slots)]
        return self.arena[torch.as_tensor(slots)]

    def fill(self, slots: Sequence[int], buffer: torch.Tensor) -> None:
        """Write `buffer`, uint8 [blocks, layers, page_bytes], into slots."""
        self.arena[torch.as_tensor(slots)] = buffer
