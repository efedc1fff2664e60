"""Objects of the memory tier that requests have pinned."""

import math
import time
from collections.abc import Callable, Iterable

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.connectors.vllm.scheduler.slots import Entry, SlotIndex


class Pins:
    """Objects of the memory tier that stay until they are released or their time is over: each pin is a lease. At most
    `max_slots` slots are pinned at a time."""

    def __init__(self, index: SlotIndex, max_slots: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = index
        self._max_slots = max_slots
        self._clock = clock
        self._pins: dict[bytes, tuple[Entry, float]] = {}  # with the time at which each ends
        self.num_slots = 0

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, keys: Iterable[bytes], ttl_s: float | None) -> tuple[int, int]:
        """Pin those of `keys` that are in memory; a later pin replaces the time of an earlier one. The numbers of
        objects that are pinned now, and of those refused because too much is."""
        self.expire()  # a pin of an object that was dropped is none of the one that has its key now
        until, pinned, refused = self._clock() + (math.inf if ttl_s is None else ttl_s), 0, 0
        for key in keys:
            entry = self._index.get(key)
            if entry is None or not entry.ready:
                continue
            if key not in self._pins:
                if self.num_slots + len(entry.slots) > self._max_slots:
                    refused += 1
                    continue
                self._index.lease(entry)
                self.num_slots += len(entry.slots)
            self._pins[key] = (entry, until)
            pinned += 1
        return pinned, refused

    def apply(self, state: RequestState, chunker: Chunker) -> int:
        """Pin or release the objects of a request's prompt, as its hints say; the number of pins refused."""
        keys, hints = state.object_keys(chunker), state.hints
        if hints.release:
            self.release(keys)
            return 0
        state.row["pinned_objects"], refused = self.pin(keys, hints.ttl_s)
        return refused

    def release(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._pins:
                self._end(key)

    def expire(self) -> None:
        """End the pins whose time is over, and those of objects that were dropped. Called for each new request."""
        if self._pins:
            now = self._clock()
            for key, (entry, until) in list(self._pins.items()):
                if entry.dropped or now >= until:
                    self._end(key)

    def clear(self) -> None:
        self.release(list(self._pins))

    def _end(self, key: bytes) -> None:
        entry, _ = self._pins.pop(key)
        self.num_slots -= len(entry.slots)
        self._index.release(entry)
