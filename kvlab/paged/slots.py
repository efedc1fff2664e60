"""Slots of a host arena lie in runs of neighbours, and what moves a run at a time moves fast."""

import threading
from collections.abc import Sequence

import torch

from kvlab.hostmemory import reserve

_rooms = threading.local()


def runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(position in `slots`, first slot, count) of each run of neighbouring slots: one copy each."""
    first, size = slots[0], len(slots)
    if list(slots) == list(range(first, first + size)):  # as most are
        return [(0, first, size)]
    starts = [0, *(at for at in range(1, size) if slots[at] != slots[at - 1] + 1)]
    return [(at, slots[at], end - at) for at, end in zip(starts, [*starts[1:], size], strict=True)]


def room(arena: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Memory for so many slots' content, this thread's own and the same at its next call: what the system newly gives
    costs its first user more than the copy."""
    num_bytes = num_blocks * arena[0].numel()
    memory = getattr(_rooms, "memory", None)
    if memory is None or memory.nbytes < num_bytes:
        memory = _rooms.memory = reserve(num_bytes)
    return torch.from_numpy(memory[:num_bytes].reshape(num_blocks, *arena.shape[1:]))


def view(arena: torch.Tensor, slots: Sequence[int]) -> torch.Tensor | None:
    """`slots` of `arena`, uint8 [slots, layers, page_bytes], in place; None where they do not lie in one run."""
    (_, first, count), *others = runs(slots)
    return None if others else arena[first : first + count]


def gather(arena: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """The content of `slots`: in place where they lie in one run, else a copy in this thread's `room`.

    Copied by runs, through numpy: to index a tensor takes twelve times as long, and starts a team of OpenMP threads
    for every thread that does so.
    """
    held = view(arena, slots)
    if held is None:
        held = room(arena, len(slots))
        for into, first, count in runs(slots):
            held[into : into + count].numpy()[:] = arena[first : first + count].numpy()
    return held


def fill(arena: torch.Tensor, slots: Sequence[int], content: torch.Tensor) -> None:
    """Write `content`, uint8 [blocks, layers, page_bytes], into `slots` of `arena`."""
    for into, first, count in runs(slots):
        arena[first : first + count].numpy()[:] = content[into : into + count].numpy()
