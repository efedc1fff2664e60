"""Several tiers as one store: fast and small above, slow and large below."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvlab.errors import ConfigError
from kvlab.stores.base import Buffer, Store, StoreStats, Value
from kvlab.stores.tier import FIRST_WAIT_S, LONGEST_WAIT_S, Tier

KEPT_SOURCES = 1 << 14


class TieredStore(Store):
    """Reads from the fastest tier that has it and copies it to those above; writes to all of them.

    `stores` are given fastest first; the stack owns and closes them. A tier that fails is left alone for a growing
    while (`first_wait_s` to `longest_wait_s`) and never fails a call: its values are misses, its writes are dropped.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        name: str = "tiered",
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        if not stores:
            raise ConfigError("a tiered store needs at least one store")
        self.name = name
        names = [store.name for store in stores]
        for index, store in enumerate(stores):  # so that rows tell two folders apart
            if names.count(store.name) > 1:
                store.name = f"{store.name}{index}"
        self.tiers = [Tier(store, first_wait_s=first_wait_s, longest_wait_s=longest_wait_s) for store in stores]
        self.stats_ = StoreStats()
        self._came_from: dict[str, Tier] = {}
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        return sum(tier.store.max_bytes for tier in self.tiers)

    @property
    def used_bytes(self) -> int:
        return sum(tier.call(lambda store: store.used_bytes, tier.store, default=0) for tier in self.tiers)

    def put(self, key: str, value: Value) -> bool:
        """True if at least one tier holds it now."""
        stored = [tier.call(tier.store.put, key, value, default=False) for tier in self.tiers]
        if any(stored):
            self.stats_.puts += 1
        else:
            self.stats_.refused += 1
        return any(stored)

    def get(self, key: str) -> Buffer | None:
        for level, tier in enumerate(self.tiers):
            value = tier.call(tier.store.get, key, default=None)
            if value is not None:
                self._found(key, level, value)
                return value
        self.stats_.misses += 1
        return None

    def get_into(self, key: str, out: memoryview) -> int | None:
        for level, tier in enumerate(self.tiers):
            size = tier.call(tier.store.get_into, key, out, default=None)
            if size is not None:
                self._found(key, level, out.cast("B")[:size])
                return size
        self.stats_.misses += 1
        return None

    def size_of(self, key: str) -> int | None:
        for tier in self.tiers:
            size = tier.call(tier.store.size_of, key, default=None)
            if size is not None:
                return size
        return None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Each tier is asked once, for those the tiers above do not have."""
        found = [False] * len(keys)
        for tier in self.tiers:
            missing = [index for index, there in enumerate(found) if not there]
            if not missing:
                break
            asked = [keys[index] for index in missing]
            answers = tier.call(tier.store.contains_many, asked, default=[False] * len(asked))
            for index, there in zip(missing, answers, strict=True):
                found[index] = there
        return found

    def delete(self, key: str) -> bool:
        return any([tier.call(tier.store.delete, key, default=False) for tier in self.tiers])

    def keys(self) -> Iterator[str]:
        nothing: list[str] = []
        listing: Callable[[Store], list[str]] = lambda store: list(store.keys())  # noqa: E731 - listed within the call
        return iter({key: None for tier in self.tiers for key in tier.call(listing, tier.store, default=nothing)})

    def touch(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        for tier in self.tiers:
            tier.call(tier.store.touch, keys, default=None)

    def set_aside(self, key: str, reason: str) -> None:
        """The tier the value last came from loses it, and those it was copied to; a good copy further down stays.

        A value that was not read lately leaves every tier.
        """
        with self._lock:
            source = self._came_from.pop(key, None)
        there = False
        for tier in self.tiers:
            there |= tier.call(tier.store.contains, key, default=False)
            tier.call(tier.store.set_aside, key, reason, default=None)
            if tier is source:
                break
        self.stats_.dropped += there

    def why_missing(self, key: str) -> str:
        """``tier_down`` if a tier that cannot be asked might have it, else what the first tier knows."""
        if not all(tier.is_up for tier in self.tiers):
            return "tier_down"
        reasons = (tier.store.why_missing(key) for tier in self.tiers)
        return next((reason for reason in reasons if reason != "never_stored"), "never_stored")

    def rows(self) -> list[dict[str, int | float | str]]:
        """One row per tier: its counters, and how often it was down."""
        rows: list[dict[str, int | float | str]] = []
        for tier in self.tiers:
            unknown: list[dict[str, int | float | str]] = [{"tier": tier.store.name}]
            for row in tier.call(tier.store.rows, default=unknown):
                health = {"up": int(tier.is_up), "outages": tier.outages, "failures": tier.failures}
                rows.append({**row, **health, "last_error": tier.last_error})
        return rows

    def close(self) -> None:
        for tier in self.tiers:
            tier.store.close()

    def _found(self, key: str, level: int, value: Buffer) -> None:
        with self._lock:
            self.stats_.hits += 1
            self.stats_.get_bytes += memoryview(value).nbytes
            self._came_from[key] = self.tiers[level]
            if len(self._came_from) > KEPT_SOURCES:
                self._came_from.pop(next(iter(self._came_from)))
        for tier in self.tiers[:level]:
            tier.call(tier.store.put, key, value, default=False)
