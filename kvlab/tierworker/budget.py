"""What all clients of a cache server may take of its memory together, on the way to its tiers and back."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvlab.errors import ConfigError
from kvlab.stores import Store
from kvlab.system import memory_bytes
from kvlab.units import format_bytes

LEAST_BYTES, MOST_BYTES = 256 << 20, 4 << 30
LOOK_S = 0.2  # between looks at whether it is still wanted
MOST_MAPPED = 2  # times the machine's memory: an engine that comes back maps its slots before the old ones are let go
MOST_MAPS = 512 << 20  # bytes of the tables that pages' maps are made to


class Budget:
    """Bytes on their way: twice the tiers of `store`, within bounds, once `ask` has asked it; or `max_bytes`.

    Who needs some waits in a row. The one that has held some for the longest does not: it may go over the bound, up to
    twice of it in all, so that those who hold a part never wait for each other.
    """

    def __init__(self, store: Store, max_bytes: int = 0) -> None:
        self._store = store
        self._is_fixed = bool(max_bytes)
        self.max_bytes = max_bytes or LEAST_BYTES
        self._held = 0
        self._holders: dict[Hold, None] = {}  # the one that began first is the first
        self._waiting: deque[Hold] = deque()
        self._changed = threading.Condition()

    def ask(self) -> None:
        """Ask the tiers for their size, now and then: one that was down has another later. May take a while."""
        if not self._is_fixed:
            self.max_bytes = min(max(2 * self._store.max_bytes, LEAST_BYTES), MOST_BYTES)

    @property
    def is_wanted(self) -> bool:
        """Whether a client waits for what others hold."""
        return bool(self._waiting)

    def _take(self, hold: "Hold", num_bytes: int, timeout_s: float, gives_up: Callable[[], bool]) -> bool:
        most = self.max_bytes
        if hold.num_bytes + num_bytes > most:
            return False
        with self._changed:
            self._waiting.append(hold)
            try:
                end = time.monotonic() + timeout_s
                while not self._may_take(hold, num_bytes, most):
                    if (left := end - time.monotonic()) <= 0 or gives_up():
                        return False
                    self._changed.wait(min(left, LOOK_S))
            finally:
                self._waiting.remove(hold)
                self._changed.notify_all()  # another is the first in the row
            self._held += num_bytes
            hold.num_bytes += num_bytes
            self._holders.setdefault(hold)
        return True

    def _may_take(self, hold: "Hold", num_bytes: int, most: int) -> bool:
        is_eldest = hold in self._holders and next(iter(self._holders)) is hold
        return is_eldest or (self._waiting[0] is hold and self._held + num_bytes <= most)

    def _give_back(self, hold: "Hold") -> None:
        with self._changed:
            self._held -= hold.num_bytes
            hold.num_bytes = 0
            self._holders.pop(hold, None)
            self._changed.notify_all()


class Hold:
    """What one client, or one call, holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.num_bytes = 0

    def take(self, num_bytes: int, timeout_s: float, *, gives_up: Callable[[], bool] = bool) -> bool:
        """So much more, once it is there; False where it is more than there ever is, is not there in time, or its
        caller `gives_up`."""
        return self.budget._take(self, num_bytes, timeout_s, gives_up)

    def give_back(self) -> None:
        """All of it."""
        if self.num_bytes:
            self.budget._give_back(self)


class Share:
    """A number of which sessions take parts, at once or not at all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, amount: int) -> bool:
        with self._lock:
            if self._taken + amount > self.most:
                return False
            self._taken += amount
            return True

    def give_back(self, amount: int) -> None:
        with self._lock:
            self._taken -= amount


@dataclass
class Limits:
    """Of all sessions together: content on its way, slots that are mapped, tables of what lies where in pages."""

    on_the_way: Budget
    mapped: Share = field(default_factory=lambda: Share(MOST_MAPPED * memory_bytes()))
    maps: Share = field(default_factory=lambda: Share(MOST_MAPS))


class Taken:
    """What one session has of the shares."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parts: list[tuple[Share, int]] = []

    def take(self, name: Literal["mapped", "maps"], amount: int, what: str) -> None:
        """ConfigError where it is too much."""
        share: Share = getattr(self._limits, name)
        if not share.take(amount):
            asked, most = format_bytes(amount), format_bytes(share.most)
            raise ConfigError(f"{what} of {asked} are too much: all engines together may have {most}")
        self._parts.append((share, amount))

    def give_back(self) -> None:
        """All of it."""
        while self._parts:
            share, amount = self._parts.pop()
            share.give_back(amount)
