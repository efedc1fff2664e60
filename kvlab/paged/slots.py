"""Slots of a host arena lie in runs of neighbours, and what moves a run at a time moves fast."""

from collections.abc import Sequence


def runs(slots: Sequence[int], step: int = 1) -> list[tuple[int, int, int]]:
    """(position in `slots`, first slot, count) of each run of neighbouring slots: one copy each. `step`: from a slot to
    its neighbour, where they are named by bytes."""
    first, size = slots[0], len(slots)
    if list(slots) == list(range(first, first + size * step, step)):  # as most are
        return [(0, first, size)]
    starts = [0, *(at for at in range(1, size) if slots[at] != slots[at - 1] + step)]
    return [(at, slots[at], end - at) for at, end in zip(starts, [*starts[1:], size], strict=True)]
