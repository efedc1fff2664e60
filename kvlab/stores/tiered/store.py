"""Several tiers as one store: fast and small above, slow and large below."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from kvlab.errors import ConfigError
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, buffers, cut, held
from kvlab.stores.circuit_breaker import FIRST_WAIT_S, LONGEST_WAIT_S
from kvlab.stores.forks import Lock
from kvlab.stores.reuse import ReuseCounter
from kvlab.stores.shown import call_of
from kvlab.stores.tiered.background import BackgroundWriter
from kvlab.stores.tiered.guarded import GuardedStore
from kvlab.stores.tiered.order import Copy, Writes

KEPT_SOURCES = 1 << 14


class TieredStore(Store):
    """Reads from the fastest tier that has it and copies it to those above; writes to all of them.

    `stores` are given fastest first; the stack owns and closes them. A tier that fails is left alone for a growing
    while (`first_wait_s` to `longest_wait_s`) and never fails a call: its values are misses, its writes are dropped.
    What a tier had under a key before a write or delete that it did not take is a miss in it from then on, as long as
    this stack is open; one that has missed more than 65,536 is left out until the stack is cleared or opened again.
    Writes of one key come one after the other, and no copy of a value replaces a later one. Reads do not
    wait for puts and deletes.

    Parameters
    ----------
    write
        ``"through"``: `put` returns when every tier has it. ``"back"``: when the first has it; a background
        thread carries it to the others, reading it from the first; `close` drains. At most `max_queued` keys wait,
        more are dropped and counted (`writer` in `rows`), so are those that left the first tier too early.
    store_threshold
        carry a value to the secondary tiers only at the n-th time its key is put or read; what is used
        once only then never costs them a write. A key must then always be put with the same value, as those of kvlab's
        objects are: what a secondary tier has under it from before is not replaced.
    promote
        copy what a secondary tier had to the tiers above.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        write: Literal["through", "back"] = "through",
        store_threshold: int = 1,
        promote: bool = True,
        max_queued: int = 256,
        name: str = "tiered",
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        if not stores:
            raise ConfigError("a tiered store needs at least one store")
        if write not in ("through", "back") or store_threshold < 1:
            raise ConfigError(f"write must be through or back, store_threshold >= 1; got {write!r}, {store_threshold}")
        self.name = name
        self._options: dict[str, object] = {"write": write, "store_threshold": store_threshold, "promote": promote}
        self._options |= {"max_queued": max_queued, "first_wait_s": first_wait_s, "longest_wait_s": longest_wait_s}
        names = [store.name for store in stores]
        for index, store in enumerate(stores):  # so that rows tell two folders apart
            if names.count(store.name) > 1:
                store.name = f"{store.name}{index}"
        self.tiers = [GuardedStore(store, first_wait_s=first_wait_s, longest_wait_s=longest_wait_s) for store in stores]
        self.counters = StoreCounters()
        self._store_threshold = store_threshold
        self._promote = promote
        self._came_from: OrderedDict[str, GuardedStore] = OrderedDict()
        self._uses = ReuseCounter()
        self._lock = Lock()
        self._writes = Writes()
        # Of this thread's last read: `promoted`, its key and level, where it was promoted; `tier`, where it came from.
        self._last = threading.local()
        self._writer = BackgroundWriter(self._carry_down, max_keys=max_queued) if write == "back" else None

    def _as_call(self) -> str:
        return call_of(self, [tier.store for tier in self.tiers], **self._options)

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        return sum(tier.ask(lambda store: store.max_bytes, tier.store, default=0) for tier in self.tiers)

    @property
    def used_bytes(self) -> int:
        return sum(tier.ask(lambda store: store.used_bytes, tier.store, default=0) for tier in self.tiers)

    def put(self, key: str, value: Value) -> bool:
        """True if at least one tier holds it now."""
        is_queued = False
        value = buffers(value)  # what is no buffer is the caller's mistake, and no failure of a tier
        with self._writes.turn(key):
            stored = self.tiers[0].put(key, value)
            if self._is_due(key) or not stored:
                if stored and self._writer is not None:
                    for tier in self.tiers[1:]:
                        tier.miss(key)  # until it is carried down, if it ever is
                    is_queued = True
                else:
                    if self._writer is not None:
                        self._writer.cancel(key)  # the value before, which may be on its way
                    stored |= any([tier.put(key, value) for tier in self.tiers[1:]])
            with self._lock:
                self.counters.puts += stored
                self.counters.refused += not stored
                self._came_from.pop(key, None)
        if is_queued and self._writer is not None:
            self._writer.add(key)  # when the turn is over: what is read within one is not carried down
        return stored

    def get(self, key: str) -> Buffer | None:
        with self._writes.copy(key) as copy:
            for level, tier in enumerate(self.tiers):
                value = tier.read(tier.store.get, key) if tier.may_read(key) else None
                if value is not None:
                    self._found(copy, level, value)
                    return value
        self._missed()
        return None

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        with self._writes.copy(key) as copy:
            for level, tier in enumerate(self.tiers):
                size = tier.call(tier.store.get_pieces, key, out, default=None) if tier.may_read(key) else None
                if size is not None:
                    self._found(copy, level, cut(out, size))
                    return size
        self._missed()
        return None

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        for tier in self.tiers:
            head = tier.read(tier.store.get_head, key, num_bytes) if tier.may_read(key) else None
            if head is not None:
                return head
        return None

    def size_of(self, key: str) -> int | None:
        for tier in self.tiers:
            size = None if tier.misses(key) else tier.call(tier.store.size_of, key, default=None)
            if size is not None:
                return size
        return None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Each tier is asked once, for those the tiers above do not have."""
        found = [False] * len(keys)
        for tier in self.tiers:
            missing = [index for index, there in enumerate(found) if not there and not tier.misses(keys[index])]
            if not missing:
                continue
            asked = [keys[index] for index in missing]
            answers = tier.call(held, tier.store, asked, default=[False] * len(asked))
            for index, there in zip(missing, answers, strict=True):
                found[index] = there
        return found

    def delete(self, key: str) -> bool:
        with self._writes.turn(key):
            if self._writer is not None:
                self._writer.cancel(key)  # or it would come back
            return any([tier.delete(key) for tier in self.tiers])

    def clear(self) -> None:
        with self._writes.clear():
            if self._writer is not None:
                self._writer.cancel()
            for tier in self.tiers:
                tier.clear()

    def keys(self) -> Iterator[str]:
        nothing: list[str] = []
        listing: Callable[[Store], list[str]] = lambda store: list(store.keys())  # noqa: E731 - listed within the call
        listed = ((tier, key) for tier in self.tiers for key in tier.call(listing, tier.store, default=nothing))
        return iter({key: None for tier, key in listed if not tier.misses(key)})

    def touch(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        for tier in self.tiers:
            tier.call(tier.store.touch, keys, default=None)

    def renew(self) -> None:
        """What this thread read last is broken: the next read must not find the copies of it in faster tiers."""
        key, level = getattr(self._last, "promoted", None) or ("", 0)
        for tier in self.tiers[:level]:
            tier.delete(key)
        for tier in self.tiers:
            tier.call(tier.store.renew, default=None)

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        """The tier the value last came from loses it, and those it was copied to; a good copy further down stays.

        A value that was not read recently leaves every tier.
        """
        with self._lock:
            source = self._came_from.pop(key, None)
        gone = False
        with self._writes.turn(key):
            if self._writer is not None:
                self._writer.cancel(key)
            for tier in self.tiers:
                gone |= tier.quarantine(key, reason, found)
                if tier is source:
                    break
        with self._lock:
            self.counters.dropped += gone
        return gone

    def why_missing(self, key: str) -> str:
        """``tier_down`` if a tier that cannot be asked might have it, else what the first tier knows."""
        if not all(tier.is_up for tier in self.tiers):
            return "tier_down"
        reasons = (tier.call(tier.store.why_missing, key, default="never_stored") for tier in self.tiers)
        return next((reason for reason in reasons if reason != "never_stored"), "never_stored")

    @property
    def served_by(self) -> str:
        return getattr(self._last, "tier", self.name)

    def rows(self) -> list[dict[str, int | float | str]]:
        """One row per tier: its counters, how often it was down; for the first, what its writer has to do and did."""
        rows: list[dict[str, int | float | str]] = []
        for tier in self.tiers:
            rows.extend(tier.rows())
        if self._writer is not None:
            queued, written, dropped = self._writer.waiting, self._writer.written, self._writer.dropped
            rows[0] |= {"writer_waiting": queued, "writer_written": written, "writer_dropped": dropped}
        return rows

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until the secondary tiers have what they are to get; False if that took longer than `timeout_s`."""
        return self._writer is None or self._writer.drain(timeout_s)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for tier in self.tiers:
            tier.close()

    def _found(self, copy: Copy, level: int, value: Value) -> None:
        key = copy.key
        with self._lock:
            self.counters.hits += 1
            self.counters.get_bytes += sum(piece.nbytes for piece in buffers(value))
            self._came_from[key] = self.tiers[level]
            if len(self._came_from) > KEPT_SOURCES:
                self._came_from.popitem(last=False)
        self._last.tier = self.tiers[level].store.name
        self._last.promoted = (key, level) if self._promote and level and copy.is_current else None
        if self._promote:
            for tier in self.tiers[:level]:
                tier.put(key, value, copy=copy, wait=False)
        if level == 0 and self._store_threshold > 1 and self._is_due(key, exactly=True):
            if self._writer is not None:
                self._writer.add(key)
            else:
                for tier in self.tiers[1:]:
                    tier.put(key, value, copy=copy)

    def _missed(self) -> None:
        with self._lock:
            self.counters.misses += 1

    def _is_due(self, key: str, *, exactly: bool = False) -> bool:
        """Count one more use of `key`; whether the secondary tiers are to have it by now (`exactly`: just now)."""
        if self._store_threshold == 1:
            return True
        with self._lock:
            num_uses = self._uses.add(key)
        return num_uses == self._store_threshold if exactly else num_uses >= self._store_threshold

    def _carry_down(self, key: str) -> None:
        """A later write of `key` ends this copy; where it is a put, the key is written back again."""
        first, *others = self.tiers
        with self._writes.copy(key) as copy:
            value = first.read(first.store.get, key) if first.may_read(key) else None
            if value is not None:
                for tier in others:
                    tier.put(key, value, copy=copy)
            elif self._writer is not None:  # evicted or deleted meanwhile
                self._writer.dropped += 1
