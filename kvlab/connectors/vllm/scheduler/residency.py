"""Where is an object? One answer, from the memory tier's index and from what is known of the secondary tiers."""

import enum
from collections.abc import Iterable, Mapping

from kvlab.connectors.vllm.scheduler.slots import SlotIndex

KEPT_KEYS = 1 << 16


class LatestKeys:
    """A set of object hashes that forgets the oldest beyond `KEPT_KEYS`."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}  # the oldest first

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, key: bytes) -> None:
        self.discard(key)
        self._keys[key] = None
        if len(self._keys) > KEPT_KEYS:
            del self._keys[next(iter(self._keys))]

    def discard(self, key: bytes) -> None:
        self._keys.pop(key, None)

    def clear(self) -> None:
        self._keys.clear()


class Where(enum.Enum):
    """Where an object is."""

    MEMORY = "memory"
    PENDING = "pending"  # a worker fills its slots right now
    SECONDARY = "secondary"
    CORRUPT = "broken"  # a secondary tier answered with broken or absent data when it was last read
    MISSING = "missing"


class Residency:
    """Joins the memory tier's `index` to what lookups, reads and writes have told of the secondary tiers. Without
    `keeps_memory`, host memory is only a way to the secondary tiers, and only what is pending counts as there.

    An object that the secondary tiers hold, as far as is known, is not written again. What a tier has lost since is
    learned at the next lookup, which comes before any load.
    """

    def __init__(self, index: SlotIndex, *, keeps_memory: bool) -> None:
        self.index = index
        self._keeps_memory = keeps_memory
        self._written = LatestKeys()  # a lookup found them in the secondary tiers, or a write succeeded
        self._corrupt = LatestKeys()

    def where(self, key: bytes, answer: Mapping[bytes, bool]) -> Where:
        """`answer`: what the secondary tiers have just said they hold; {} if they were not asked."""
        entry = self.index.get(key)
        if entry is not None and (self._keeps_memory or not entry.ready):
            return Where.MEMORY if entry.ready else Where.PENDING
        if key in self._corrupt:
            return Where.CORRUPT
        return Where.SECONDARY if answer.get(key, False) else Where.MISSING

    def is_in_memory(self, key: bytes) -> bool:
        """Whether its slots hold the object, or will."""
        return self.where(key, {}) in (Where.MEMORY, Where.PENDING)

    def is_exact(self, key: bytes) -> bool:
        """Whether its slots hold the object, or will, as it was computed."""
        entry = self.index.get(key)
        return entry is not None and entry.exact

    def is_written(self, key: bytes) -> bool:
        """Whether the secondary tiers hold a sound copy, as far as is known."""
        return key in self._written and key not in self._corrupt

    def is_corrupt(self, key: bytes) -> bool:
        return key in self._corrupt

    def learn(self, keys: Iterable[bytes], answer: Mapping[bytes, bool]) -> None:
        """What the secondary tiers said of a prompt's objects. Keys behind the first miss were not asked for and become
        unknown."""
        for key in keys:
            if answer.get(key):
                self._written.add(key)
            else:
                self._written.discard(key)

    def written(self, key: bytes) -> None:
        """All ranks have written the object to the secondary tiers."""
        self._corrupt.discard(key)
        self._written.add(key)

    def corrupt(self, key: bytes) -> None:
        """A secondary tier answered with broken or absent data."""
        self._corrupt.add(key)

    def clear(self) -> None:
        """Nothing is anywhere: keys have other names from now on."""
        self.index.clear()
        self._written.clear()
        self._corrupt.clear()
