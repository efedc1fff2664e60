"""ARC: balances recency and frequency by what it regrets."""

from collections import OrderedDict
from collections.abc import Container, Hashable

from kvlab.stores.eviction.base import EvictionPolicy


class _Queue(OrderedDict[Hashable, int]):
    """Keys and bytes, oldest first, with the sum at hand."""

    total = 0

    def push(self, key: Hashable, size: int) -> None:
        self[key] = size
        self.total += size

    def take(self, key: Hashable) -> int:
        size = self.pop(key)
        self.total -= size
        return size

    def drop_oldest(self) -> None:
        self.take(next(iter(self)))


class ARCPolicy(EvictionPolicy):
    """Two LRU queues, seen once and seen again, and the names of what left each; a name that comes back moves the
    target size of the first queue towards the one it was missed in. (Megiddo, Modha, "ARC: a self-tuning, low
    overhead replacement cache", FAST 2003; in bytes instead of pages.)

    Room is made before the newcomer is known, so the target moves one miss later than in the paper. Names
    remembered: together with what is held at most twice the bytes the tier ever held.
    """

    name = "arc"

    def __init__(self) -> None:
        self._once, self._again = _Queue(), _Queue()
        self._once_ghosts, self._again_ghosts = _Queue(), _Queue()
        self._target = 0.0  # bytes for `_once`
        self._capacity = 0
        self._chosen: Hashable | None = None

    def admit(self, key: Hashable, size: int) -> None:
        if key in self._once or key in self._again:
            (self._once if key in self._once else self._again).take(key)
            self._again.push(key, size)
        elif key in self._once_ghosts:
            pull = max(1.0, self._again_ghosts.total / self._once_ghosts.total if self._once_ghosts.total else 1.0)
            self._once_ghosts.take(key)
            self._target = min(self._target + pull * size, float(self._capacity))
            self._again.push(key, size)
        elif key in self._again_ghosts:
            pull = max(1.0, self._once_ghosts.total / self._again_ghosts.total if self._again_ghosts.total else 1.0)
            self._again_ghosts.take(key)
            self._target = max(self._target - pull * size, 0.0)
            self._again.push(key, size)
        else:
            self._once.push(key, size)
        self._capacity = max(self._capacity, self._once.total + self._again.total)
        self._trim()

    def touch(self, key: Hashable) -> None:
        if key in self._again:
            self._again.move_to_end(key)
        elif key in self._once:
            size = self._once.pop(key)
            self._once.total -= size
            self._again[key] = size
            self._again.total += size

    def discard(self, key: Hashable) -> None:
        for held, ghosts in ((self._once, self._once_ghosts), (self._again, self._again_ghosts)):
            if key in held:
                size = held.take(key)
                if key == self._chosen:
                    ghosts.push(key, size)
        self._trim()

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        first, second = (self._once, self._again) if self._once.total > self._target else (self._again, self._once)
        self._chosen = next((key for queue in (first, second) for key in queue if not (pinned and key in pinned)), None)
        return self._chosen

    def evict(self) -> Hashable | None:
        once_first = self._once.total > self._target
        if self._once and (once_first or not self._again):
            held, ghosts = self._once, self._once_ghosts
        else:
            held, ghosts = self._again, self._again_ghosts
        if not held:
            return None
        key, size = held.popitem(last=False)
        held.total -= size
        ghosts.push(key, size)
        self._trim()
        return key

    def _trim(self) -> None:
        while self._once_ghosts and self._once.total + self._once_ghosts.total > self._capacity:
            self._once_ghosts.drop_oldest()
        held = self._once.total + self._again.total + self._once_ghosts.total
        while self._again_ghosts and held + self._again_ghosts.total > 2 * self._capacity:
            self._again_ghosts.drop_oldest()
