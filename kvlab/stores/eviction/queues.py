"""The policies that are one queue: LRU, FIFO, MRU."""

from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable

from kvlab.stores.eviction.base import EvictionPolicy


class LRUPolicy(EvictionPolicy):
    """Least recently used first."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def admit(self, key: Hashable, size: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: Hashable) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def discard(self, key: Hashable) -> None:
        self._order.pop(key, None)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        if not pinned:
            return next(iter(self._order), None)
        return next((key for key in self._order if key not in pinned), None)

    def evict(self) -> Hashable | None:
        return self._order.popitem(last=False)[0] if self._order else None

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        order, renew = self._order, self._order.move_to_end
        for key in keys:
            if key in order:
                renew(key)


class FIFOPolicy(LRUPolicy):
    """First in, first out: use does not count."""

    name = "fifo"

    def touch(self, key: Hashable) -> None:
        pass

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        pass


class MRUPolicy(LRUPolicy):
    """Most recently used first: right for loops over more than fits, wrong for nearly all else."""

    name = "mru"

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        return next((key for key in reversed(self._order) if key not in pinned), None)

    def evict(self) -> Hashable | None:
        return self._order.popitem()[0] if self._order else None
