"""Least frequently used."""

from collections import OrderedDict
from collections.abc import Container, Hashable

from kvlab.stores.eviction.base import EvictionPolicy


class LFUPolicy(EvictionPolicy):
    """Least often used since it entered first; among equals, least recently used first.

    All steps O(1) but for the search of the next lower count, which is over distinct counts (Shah, Mitra, Matani:
    "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010).
    """

    name = "lfu"

    def __init__(self) -> None:
        self._uses: dict[Hashable, int] = {}
        self._by_uses: dict[int, OrderedDict[Hashable, None]] = {}
        self._fewest = 1

    def admit(self, key: Hashable, size: int) -> None:
        if key in self._uses:
            self.touch(key)
            return
        self._uses[key] = self._fewest = 1
        self._by_uses.setdefault(1, OrderedDict())[key] = None

    def touch(self, key: Hashable) -> None:
        uses = self._uses.get(key)
        if uses is None:
            return
        self._leave(key, uses)
        self._uses[key] = uses + 1
        self._by_uses.setdefault(uses + 1, OrderedDict())[key] = None

    def discard(self, key: Hashable) -> None:
        uses = self._uses.pop(key, None)
        if uses is not None:
            self._leave(key, uses)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        if not self._uses:
            return None
        if not pinned:
            if self._fewest not in self._by_uses:
                self._fewest = min(self._by_uses)
            return next(iter(self._by_uses[self._fewest]))
        return next((key for uses in sorted(self._by_uses) for key in self._by_uses[uses] if key not in pinned), None)

    def _leave(self, key: Hashable, uses: int) -> None:
        same = self._by_uses[uses]
        del same[key]
        if not same:
            del self._by_uses[uses]
