"""The memory tier's index, owned by the scheduler: which object lies in which slots of the workers' arenas.

A slot holds one engine block over all layers of one rank. The index never sees a byte; workers copy what they are
told, and every rank does the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvlab.errors import ConfigError
from kvlab.stores.eviction import get_policy


@dataclass
class Entry:
    """An object's place. Not `ready` while a worker still fills it from a lower tier."""

    slots: tuple[int, ...]
    pins: int = 0
    ready: bool = True


class SlotIndex:
    """Objects by hash within `num_slots` slots; the eviction policy chooses among those nobody pins."""

    def __init__(self, num_slots: int, *, policy: str = "lru") -> None:
        if num_slots < 1:
            raise ConfigError("the memory tier must hold at least one block; give it a larger size")
        self.num_slots = num_slots
        self._entries: dict[bytes, Entry] = {}
        self._policy = get_policy(policy)
        self._pinned: set[bytes] = set()
        self._runs: dict[int, int] = {0: num_slots}  # free runs: first slot -> length
        self._run_ends: dict[int, int] = {num_slots: 0}  # slot after a free run -> its first slot
        self.num_free = num_slots
        self.num_pinned_slots = 0
        self.evicted: dict[bytes, None] = {}  # the latest to leave, so that a miss can say so
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Give a prompt's keys last-first: suffixes leave before prefixes."""
        for key in keys:
            self._policy.touch(key)

    def can_reserve(self, count: int) -> bool:
        """Whether `count` slots could be had by evicting what nobody pins."""
        return self.num_slots - self.num_pinned_slots >= count

    def reserve(self, key: bytes, count: int, *, ready: bool = True) -> Entry | None:
        """Slots for a new object, evicting others as needed; None if what is pinned leaves no room."""
        if key in self._entries:
            raise ConfigError(f"object {key.hex()} is in the index already")
        if not self.can_reserve(count):
            return None
        while self.num_free < count:
            victim = self._policy.victim(self._pinned)
            if not isinstance(victim, bytes):
                return None
            self.drop(victim)
            self.num_evictions += 1
            self.evicted[victim] = None
            if len(self.evicted) > 65536:
                self.evicted.pop(next(iter(self.evicted)))
        entry = Entry(self._take(count), ready=ready)
        self._entries[key] = entry
        self._policy.admit(key, count)
        self.evicted.pop(key, None)
        return entry

    def pin(self, key: bytes) -> None:
        entry = self._entries[key]
        entry.pins += 1
        if entry.pins == 1:
            self._pinned.add(key)
            self.num_pinned_slots += len(entry.slots)

    def unpin(self, key: bytes) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.pins == 0:
            return
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned.discard(key)
            self.num_pinned_slots -= len(entry.slots)

    def drop(self, key: bytes) -> None:
        """Forget an object, pinned or not, and free its slots."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.pins:
            self._pinned.discard(key)
            self.num_pinned_slots -= len(entry.slots)
        self._policy.discard(key)
        self._give_back(entry.slots)

    def clear(self) -> None:
        """Drop everything that nobody pins."""
        for key in [key for key in self._entries if key not in self._pinned]:
            self.drop(key)

    def _take(self, count: int) -> tuple[int, ...]:
        """Free slots, in one run where there is one: contiguous slots move in one copy."""
        fitting = next((start for start, length in self._runs.items() if length >= count), None)
        slots: list[int] = []
        while len(slots) < count:
            start = fitting if fitting is not None else next(iter(self._runs))
            length = self._runs.pop(start)
            del self._run_ends[start + length]
            used = min(length, count - len(slots))
            slots.extend(range(start, start + used))
            if used < length:
                self._runs[start + used] = length - used
                self._run_ends[start + length] = start + used
        self.num_free -= count
        return tuple(slots)

    def _give_back(self, slots: tuple[int, ...]) -> None:
        self.num_free += len(slots)
        at = 0
        while at < len(slots):
            end = at + 1
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            first, after = slots[at], slots[end - 1] + 1
            if first in self._run_ends:  # a free run ends here: grow it
                first = self._run_ends.pop(first)
                del self._runs[first]
            if after in self._runs:  # and one begins after
                length = self._runs.pop(after)
                del self._run_ends[after + length]
                after += length
            self._runs[first] = after - first
            self._run_ends[after] = first
            at = end
