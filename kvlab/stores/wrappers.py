"""Stores around a store: to count, to slow down as a network would, to fail as a medium would."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvlab.errors import ConfigError, StoreError
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, buffers
from kvlab.stores.forks import Lock
from kvlab.stores.shown import call_of


class WrapperStore(Store):
    """Hands every call on to `inner`. Subclasses change what they are for: most only `_around`."""

    def __init__(self, inner: Store, *, name: str | None = None) -> None:
        self.inner = inner
        self.name = name or inner.name

    def _as_call(self) -> str:
        return call_of(self, self.inner)

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        return self.inner.max_bytes

    @property
    def counters(self) -> StoreCounters:  # type: ignore[override]
        return self.inner.counters

    @property
    def used_bytes(self) -> int:
        return self.inner.used_bytes

    @property
    def is_up(self) -> bool:
        return self.inner.is_up

    def _around(self, method: str, num_bytes: int) -> None:
        """Called once per call with the bytes it moves: before a `put`, after a `get`."""

    def put(self, key: str, value: Value) -> bool:
        self._around("put", sum(piece.nbytes for piece in buffers(value)))
        return self.inner.put(key, value)

    def get(self, key: str) -> Buffer | None:
        value = self.inner.get(key)
        self._around("get", 0 if value is None else memoryview(value).nbytes)
        return value

    def get_into(self, key: str, out: memoryview) -> int | None:
        size = self.inner.get_into(key, out)
        self._around("get_into", size or 0)
        return size

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        size = self.inner.get_pieces(key, out)
        self._around("get_pieces", size or 0)
        return size

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        head = self.inner.get_head(key, num_bytes)
        self._around("get_head", 0 if head is None else memoryview(head).nbytes)
        return head

    def size_of(self, key: str) -> int | None:
        self._around("size_of", 0)
        return self.inner.size_of(key)

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self._around("contains_many", 0)
        return self.inner.contains_many(keys)

    def delete(self, key: str) -> bool:
        self._around("delete", 0)
        return self.inner.delete(key)

    def keys(self) -> Iterator[str]:
        self._around("keys", 0)
        return self.inner.keys()

    def touch(self, keys: Iterable[str]) -> None:
        self._around("touch", 0)
        self.inner.touch(keys)

    def renew(self) -> None:
        self.inner.renew()

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        self._around("quarantine", 0)
        return self.inner.quarantine(key, reason, found)

    def why_missing(self, key: str) -> str:
        return self.inner.why_missing(key)

    def stats(self) -> dict[str, int | float | str]:
        return {**self.inner.stats(), "tier": self.name}

    def close(self) -> None:
        self.inner.close()


class CountingStore(WrapperStore):
    """Counts calls and bytes by method, in `calls` and `bytes`."""

    def __init__(self, inner: Store, *, name: str | None = None) -> None:
        super().__init__(inner, name=name)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._lock = Lock()

    def _around(self, method: str, num_bytes: int) -> None:
        with self._lock:
            self.calls[method] += 1
            self.bytes[method] += num_bytes

    def stats(self) -> dict[str, int | float | str]:
        return {**super().stats(), **{f"calls_{method}": count for method, count in sorted(self.calls.items())}}


class LatencyStore(WrapperStore):
    """A network you can feel on a laptop: each call costs `latency_s`, and bytes pass at `bytes_per_s`.

    Bytes of concurrent calls share the one line, as they would; latencies overlap.
    """

    def __init__(
        self, inner: Store, *, latency_s: float = 0.0, bytes_per_s: float = float("inf"), name: str | None = None
    ) -> None:
        super().__init__(inner, name=name)
        if latency_s < 0 or bytes_per_s <= 0:
            raise ConfigError(f"latency_s must be >= 0 and bytes_per_s > 0, got {latency_s} and {bytes_per_s}")
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._line_free = 0.0
        self._lock = Lock()

    def _as_call(self) -> str:
        return call_of(self, self.inner, latency_s=self._latency_s, bytes_per_s=self._bytes_per_s)

    def _around(self, method: str, num_bytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._line_free = max(self._line_free, now) + num_bytes / self._bytes_per_s
            until = self._line_free + self._latency_s
        time.sleep(max(0.0, until - now))


class FaultStore(WrapperStore):
    """Fails as media do. Each knob is the share of calls hit, drawn from `seed`; set them while it runs.

    Parameters
    ----------
    fail
        calls that raise StoreError.
    corrupt
        reads in which one bit is wrong.
    truncate
        reads that end early (`get` only).
    lose
        writes that claim success and store nothing.
    slow_s
        seconds every call takes longer.
    """

    def __init__(
        self,
        inner: Store,
        *,
        fail: float = 0.0,
        corrupt: float = 0.0,
        truncate: float = 0.0,
        lose: float = 0.0,
        slow_s: float = 0.0,
        seed: int = 0,
        name: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner, name=name)
        self.fail, self.corrupt, self.truncate, self.lose, self.slow_s = fail, corrupt, truncate, lose, slow_s
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = Lock()
        self._sleep = sleep
        self._seed = seed

    def _as_call(self) -> str:
        knobs = {name: getattr(self, name) for name in ("fail", "corrupt", "truncate", "lose", "slow_s")}
        return call_of(self, self.inner, **knobs, seed=self._seed)

    def put(self, key: str, value: Value) -> bool:
        if self._happens("lose", self.lose):
            return True
        return super().put(key, value)

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is None or not memoryview(value).nbytes:
            return value
        if self._happens("corrupt", self.corrupt):
            value = bytearray(value)
            self._flip_a_bit(memoryview(value))
        if self._happens("truncate", self.truncate):
            value = memoryview(value)[: memoryview(value).nbytes // 2]
        return value

    def get_into(self, key: str, out: memoryview) -> int | None:
        size = super().get_into(key, out)
        if size and self._happens("corrupt", self.corrupt):
            self._flip_a_bit(out.cast("B")[:size])
        return size

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        size = super().get_pieces(key, out)
        if size and self._happens("corrupt", self.corrupt):
            self._flip_a_bit(max(out, key=len).cast("B")[:size])
        return size

    def _around(self, method: str, num_bytes: int) -> None:
        if self.slow_s:
            self._sleep(self.slow_s)
        if self._happens("fail", self.fail):
            raise StoreError(f"injected failure of {method} in {self.name}", reason="injected")

    def _happens(self, what: str, share: float) -> bool:
        with self._lock:
            hit = share > 0 and self._random.random() < share
            self.injected[what] += hit
        return hit

    def _flip_a_bit(self, view: memoryview) -> None:
        with self._lock:
            at = self._random.randrange(view.nbytes)
        view[at] ^= 1
