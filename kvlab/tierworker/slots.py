"""The slots of one engine, as its tier worker or a cache server maps them."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvlab.hostmemory import aligned, scratch
from kvlab.sharedmemory import SharedSlots
from kvlab.tierworker.messages import Memory, Runs, Write

COPY_WAIT_S = 60.0  # for an engine's copy that a write waits for
MOST_KEPT = 64 << 20  # bytes of a thread's memory between two calls


class MappedSlots:
    """The slots that `memory` tells of, in the memory `fd`. ConfigError where they cannot be mapped."""

    def __init__(self, memory: Memory, fd: int) -> None:
        self._shared = SharedSlots(memory.num_slots, memory.layers * memory.page_bytes, fd=fd)
        # [slots, layers, page_bytes]
        self._pages = self._shared.slots.reshape(memory.num_slots, memory.layers, memory.page_bytes)

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def slot_bytes(self) -> int:
        return self._shared.slot_bytes

    def shape(self, runs: Runs) -> tuple[int, int, int]:
        """Of what these slots hold: slots, layers, bytes of a page."""
        return sum(count for _, count in runs), *self._pages.shape[1:]

    def in_one_run(self, runs: Runs) -> NDArray[np.uint8] | None:
        """The slots themselves, where they lie in one run."""
        (first, count), *others = runs
        return None if others else self._pages[first : first + count]

    def room(self, num_slots: int) -> NDArray[np.uint8]:
        """Memory for so many slots' content, this thread's own until its next call."""
        num_bytes = num_slots * self.slot_bytes
        memory = scratch("slots", num_bytes) if num_bytes <= MOST_KEPT else aligned(num_bytes)
        return np.frombuffer(memory, np.uint8, count=num_bytes).reshape(num_slots, *self._pages.shape[1:])

    def content(self, runs: Runs) -> NDArray[np.uint8]:
        """What the slots hold: in place where they lie in one run."""
        pages = self.in_one_run(runs)
        if pages is None:
            pages = self.room(sum(count for _, count in runs))
            at = 0
            for first, count in runs:
                pages[at : at + count] = self._pages[first : first + count]
                at += count
        return pages

    def scatter(self, runs: Runs, content: NDArray[np.uint8]) -> None:
        at = 0
        for first, count in runs:
            self._pages[first : first + count] = content[at : at + count]
            at += count

    def holds(self, write: Write) -> bool:
        """Whether the slots are of the generation that the write names."""
        owners = self._shared.owners
        return all(bool((owners[first : first + count] == write.generation).all()) for first, count in write.runs)

    def has_copied(self, number: int, is_given_up: Callable[[], bool]) -> bool:
        """Wait until the engine's saves up to `number` are in their slots: a GPU says so in shared memory."""
        deadline = time.monotonic() + COPY_WAIT_S
        while int(self._shared.copied[0]) < number:
            if time.monotonic() > deadline or is_given_up():
                return False
            time.sleep(0.0005)
        return True
