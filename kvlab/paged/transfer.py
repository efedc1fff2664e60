"""`Transfer`: how blocks move between an engine's pages and the slots of a host arena, and how to get one."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvlab.paged.cpu import CPUTransfer
from kvlab.paged.layout import PageLayout
from kvlab.sharedmemory import SharedSlots


class Clock(Protocol):
    """Times work that may still be under way."""

    def seconds(self) -> float | None:
        """From the beginning of the work to its end; None while it is under way."""

    def delay(self) -> float:
        """Seconds by which the work held up the engine's own."""

    def stop(self) -> None:
        """The work ends here."""


class Transfer(Protocol):
    """Moves blocks between pages and arena slots. A copy that returns a clock is still under way; the engine's
    next work is ordered behind it all the same. `arena` is uint8 [slots, ...], a block each: its pages (layers,
    page_bytes), or what a codec makes of them. Then `coded_tokens` is how many a block has, else 0; and `num_tokens`
    says how many tokens of each block are the object's; all, if it is empty."""

    layout: PageLayout
    arena: torch.Tensor
    coded_tokens: int

    def save(self, block_ids: Sequence[int], slots: Sequence[int], num_tokens: Sequence[int] = ()) -> Clock | None:
        """Copy pages into slots."""

    def load(self, slots: Sequence[int], block_ids: Sequence[int], num_tokens: Sequence[int] = ()) -> Clock | None:
        """Copy slots into pages; the engine's next work sees them."""

    def load_aside(
        self, slots: Sequence[int], block_ids: Sequence[int], after: Any, num_tokens: Sequence[int] = ()
    ) -> Clock:
        """The same behind the fence `after`, and beside the engine's work."""

    def map_lent(self, memory: NDArray[np.uint8]) -> bool:
        """Make `memory`, uint8 [bytes] of another process, a source of `load_lent`; whether it can be one."""

    def load_lent(
        self, places: Sequence[int], block_ids: Sequence[int], after: Any, num_tokens: Sequence[int]
    ) -> Clock:
        """`load_aside`, from blocks that begin at these bytes of the lent memory instead of slots."""

    def fence(self) -> Any:
        """The end of the engine's work so far."""

    def before_writes(self, block_ids: Sequence[int]) -> None:
        """The engine's next work may write to these pages: it waits for saves that have not read them."""

    def clear(self, block_ids: Sequence[int]) -> None:
        """Fill pages with zeros, before the engine's next work."""

    def clock(self) -> Clock:
        """Starts with the engine's next work."""

    def is_settled(self, slots: Sequence[int]) -> bool:
        """Whether no copy uses these slots, so that another process may write to them."""

    @property
    def num_unheard(self) -> int:
        """The latest saves of which it is not known yet whether the codec can keep their blocks."""

    def take_unfit(self, wait_for: Sequence[int] | None = ()) -> set[int]:
        """Slots whose blocks turned out to be none that the codec can keep; their saves have failed. Waits for what is
        not known of the slots `wait_for`; None: of all."""

    def mark_saved(self, number: int) -> None:
        """Once all saves so far are in their slots, the counter ``copied`` of shared memory is `number`."""

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """What `slots` hold once the copies into them have ended, uint8 [blocks, ...]."""

    def close(self) -> None:
        """Give the arena back."""


def open_transfer(
    layout: PageLayout, num_slots: int, *, staging_bytes: int, shared: SharedSlots | None = None
) -> Transfer:
    """The transfer between these pages and an arena of `num_slots` slots: `shared`, or new memory. `staging_bytes`: GPU
    memory for its rings, where the pages lie on a GPU."""
    if layout.pages[0].device.type != "cuda":
        return CPUTransfer(layout, num_slots, shared=shared)
    from kvlab.paged.cuda import CudaTransfer  # loads Triton

    return CudaTransfer(layout, num_slots, staging_bytes=staging_bytes, shared=shared)
