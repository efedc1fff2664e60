"""Which fault comes next, and what it makes of a value."""

import random
import threading
from collections import Counter, deque
from collections.abc import Sequence

from kvlab.errors import ConfigError

DELAY, DROP, TRUNCATE, FLIP, SWAP, REPLAY = KINDS = ("delay", "drop", "truncate", "flip", "swap", "replay")
KEPT_BYTES = 64 << 20  # of values that may be given in the place of others


class Faults:
    """Draws faults and counts those that were done. Threads may share it.

    Parameters
    ----------
    kinds
        of `KINDS`; default all.
    rate
        the share of values that get one.
    seed
        the same seed draws the same faults, in the order of the calls.
    """

    def __init__(self, kinds: Sequence[str] = KINDS, *, rate: float = 0.1, seed: int = 0) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise ConfigError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")
        if not kinds or not 0 <= rate <= 1:
            raise ConfigError(f"faults need one kind or more, and 0 <= rate <= 1, got {list(kinds)} and {rate}")
        self.kinds, self.rate = tuple(kinds), rate
        self.counts: Counter[str] = Counter()
        self.seen = 0  # values that could have had one
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._values: deque[bytes] = deque()  # the latest last
        self._bytes = 0

    def draw(self) -> str:
        """A kind, or nothing."""
        with self._lock:
            self.seen += 1
            return self._rng.choice(self.kinds) if self._rng.random() < self.rate else ""

    def did(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    @property
    def total(self) -> int:
        """Faults that were done."""
        return sum(self.counts.values())

    def choose(self, count: int) -> int:
        """A number below `count`."""
        with self._lock:
            return self._rng.randrange(count)

    def spoil(self, kind: str, value: bytes) -> bytes:
        """What `kind` makes of a value; the same where nothing can be done, as there is no other value to give."""
        spoiled = value
        with self._lock:
            if kind == TRUNCATE:
                spoiled = value[: self._rng.randrange(len(value))] if value else value
            elif kind == FLIP:
                spoiled = self._flipped(value)
            elif kind == SWAP:
                spoiled = self._other(value)
            elif kind == REPLAY:
                spoiled = self._values[-1] if self._values else value
        return spoiled

    def keep(self, value: bytes) -> None:
        """A value as it should be, which may be given in the place of another."""
        with self._lock:
            self._values.append(value)
            self._bytes += len(value)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._values.popleft())

    def _flipped(self, value: bytes) -> bytes:
        data = bytearray(value)
        for _ in range(self._rng.choice((1, 1, 8)) if data else 0):
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(data)

    def _other(self, value: bytes) -> bytes:
        """Of the same length where there is one, so that only its content tells."""
        others = [one for one in self._values if one != value]
        return self._rng.choice([one for one in others if len(one) == len(value)] or others or [value])
