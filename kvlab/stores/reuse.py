"""How often was this key seen? What is seen once is most of the traffic, and not worth a slow write."""

from collections import OrderedDict
from collections.abc import Hashable

KEPT_SIGHTS = 1 << 16


class ReuseCounter:
    """Counts by key; the 65,536 keys seen last are remembered. Not thread-safe: the owner holds a lock."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Hashable, int] = OrderedDict()

    def add(self, key: Hashable) -> int:
        """Count one more use of `key`; how many there are now."""
        num_uses = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > KEPT_SIGHTS:
            self._counts.popitem(last=False)
        return num_uses
