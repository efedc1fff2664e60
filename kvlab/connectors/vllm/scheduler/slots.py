"""The memory tier's index, owned by the scheduler: which object lies in which slots of the workers' arenas.

A slot holds one engine block over all layers of one rank. The index never sees a byte; workers copy what they are
told, and every rank does the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from kvlab.errors import ConfigError
from kvlab.stores.eviction import get_policy


@dataclass(eq=False)
class Entry:
    """An object's place. Not `ready` while a worker still fills it from a secondary tier.

    `generation` is unique to this reservation of these slots: a copy names it, and is made only while the slots are
    of that generation. `leases` counts the operations that may still touch the slots; `dropped`: no lookup finds the
    object any more, and its slots become free when the last lease ends. `owner`: the cache_salt of the request that
    brought it.
    """

    key: bytes
    slots: tuple[int, ...]
    generation: int
    leases: int = 0
    ready: bool = True
    dropped: bool = False
    owner: str | None = None
    exact: bool = True  # no lossy tier gave it, nor the KV that it was computed from


class SlotIndex:
    """Objects by hash within `num_slots` slots; the eviction policy chooses among those without a lease. One owner's
    objects are to have at most `max_owner_slots`, see `make_room_of`."""

    def __init__(self, num_slots: int, *, policy: str = "lru", max_owner_slots: int | None = None) -> None:
        if num_slots < 1:
            raise ConfigError("the memory tier must hold at least one block; give it a larger size")
        self.num_slots = num_slots
        self._entries: dict[bytes, Entry] = {}
        self._generation_entries: dict[int, Entry] = {}
        self._policy = get_policy(policy)
        self._leased: set[bytes] = set()  # keys of entries that the policy must not choose
        self._generations = count(1)
        self._runs: dict[int, int] = {0: num_slots}  # free runs: first slot -> length
        self._run_ends: dict[int, int] = {num_slots: 0}  # slot after a free run -> its first slot
        self.num_free = num_slots
        self.num_leased_slots = 0  # those of dropped entries included
        self.evicted: dict[bytes, None] = {}  # the latest to leave, so that a miss can say so
        self.num_evictions = 0
        self._max_owner_slots = num_slots if max_owner_slots is None else max_owner_slots
        self._owned: dict[str, dict[bytes, int]] = {}  # owner -> its objects' numbers of slots, the oldest use first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def generation(self, number: int) -> Entry | None:
        """The object of this reservation, if it was not dropped."""
        return self._generation_entries.get(number)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Give a prompt's keys last-first: suffixes leave before prefixes."""
        for key in keys:
            self._policy.touch(key)
            entry = self._entries.get(key) if self._owned else None
            if entry is not None and entry.owner is not None:
                owned = self._owned[entry.owner]
                owned[key] = owned.pop(key)

    def make_room_of(self, owner: str | None, num_slots: int) -> bool:
        """Evict the owner's own objects, least recently used first, until another `num_slots` leave it within
        `max_owner_slots`. False if what is leased leaves no room."""
        if owner is None or self._max_owner_slots >= self.num_slots:
            return True
        owned = self._owned.get(owner, {})
        allowed = self._max_owner_slots - num_slots
        held = sum(owned.values())
        for key in list(owned):
            if held <= allowed or allowed < 0:
                break
            if key not in self._leased:
                held -= owned[key]
                self._evict(key)
        return held <= allowed

    def can_reserve(self, num_slots: int) -> bool:
        """Whether `num_slots` slots could be had by evicting what has no lease."""
        return self.num_slots - self.num_leased_slots >= num_slots

    def reserve(self, key: bytes, num_slots: int, *, ready: bool = True, owner: str | None = None) -> Entry | None:
        """Slots for a new object, evicting others as needed; None if what is leased leaves no room."""
        if key in self._entries:
            raise ConfigError(f"object {key.hex()} is in the index already")
        if not self.can_reserve(num_slots):
            return None
        while self.num_free < num_slots:
            victim = self._policy.victim(self._leased)
            if not isinstance(victim, bytes):
                return None
            self._evict(victim)
        entry = Entry(key, self._take(num_slots), next(self._generations), ready=ready, owner=owner)
        if owner is not None:
            self._owned.setdefault(owner, {})[key] = num_slots
        self._entries[key] = self._generation_entries[entry.generation] = entry
        self._policy.admit(key, num_slots)
        self.evicted.pop(key, None)
        return entry

    def _evict(self, key: bytes) -> None:
        self.drop(self._entries[key])
        self.num_evictions += 1
        self.evicted[key] = None
        if len(self.evicted) > 65536:
            self.evicted.pop(next(iter(self.evicted)))

    def lease(self, entry: Entry) -> None:
        """An operation that outlives this step will touch the entry's slots. They stay as they are until `release`."""
        entry.leases += 1
        if entry.leases == 1:
            self.num_leased_slots += len(entry.slots)
            if not entry.dropped:
                self._leased.add(entry.key)

    def release(self, entry: Entry) -> None:
        """One of the entry's operations has ended in every process."""
        if entry.leases == 0:
            raise ValueError(f"object {entry.key.hex()} is released more often than it was leased")
        entry.leases -= 1
        if entry.leases:
            return
        self.num_leased_slots -= len(entry.slots)
        if entry.dropped:
            self._give_back(entry.slots)
        else:
            self._leased.discard(entry.key)

    def drop(self, entry: Entry) -> None:
        """No lookup finds this object any more. Its slots are free at once, or when the last lease ends."""
        if entry.dropped:
            return
        entry.dropped = True
        del self._entries[entry.key], self._generation_entries[entry.generation]
        self._leased.discard(entry.key)
        self._policy.discard(entry.key)
        if entry.owner is not None:
            owned = self._owned[entry.owner]
            del owned[entry.key]
            if not owned:
                del self._owned[entry.owner]
        if not entry.leases:
            self._give_back(entry.slots)

    def clear(self) -> None:
        """Drop every object, and what is known of those before."""
        for entry in list(self._entries.values()):
            self.drop(entry)
        self.evicted.clear()

    def _take(self, wanted: int) -> tuple[int, ...]:
        """Free slots, in one run where there is one: contiguous slots move in one copy."""
        fitting = next((start for start, length in self._runs.items() if length >= wanted), None)
        slots: list[int] = []
        while len(slots) < wanted:
            start = fitting if fitting is not None else next(iter(self._runs))
            length = self._runs.pop(start)
            del self._run_ends[start + length]
            used = min(length, wanted - len(slots))
            slots.extend(range(start, start + used))
            if used < length:
                self._runs[start + used] = length - used
                self._run_ends[start + length] = start + used
        self.num_free -= wanted
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
