"""One tier of a stack, which never fails a call."""

import logging
from collections.abc import Callable
from typing import TypeVar

from kvlab.errors import StoreError
from kvlab.stores.base import Buffer, Store, Value, ValueTooLongError
from kvlab.stores.circuit_breaker import FIRST_WAIT_S, LONGEST_WAIT_S, CircuitBreaker
from kvlab.stores.forks import Lock
from kvlab.stores.tiered.order import Copy, Turns

log = logging.getLogger(__name__)

T = TypeVar("T")
MOST_MISSED = 1 << 16  # keys whose values this tier did not take are remembered


class GuardedStore:
    """Calls a store; a call that raises answers with its default, and the store is left alone for a growing while.

    A write that fails keeps the next writes away and no reads: a full disk can be read, and so can a folder that
    another process has locked. Going down is logged once per outage, coming back too.

    A tier that does not take a write or a delete keeps what it had under that key before, which is not to be read: it
    `misses` the key until it has taken a later write or has deleted it. One that has missed more than `MOST_MISSED`
    keys and cannot say that it has nothing under the oldest, or a `clear`, is left out until it has been cleared.

    Writes and deletes of one key take turns, so that the miss which one of them ends is not that of a later one.
    """

    def __init__(
        self, store: Store, *, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S
    ) -> None:
        self.store = store
        self.health = CircuitBreaker(first_wait_s, longest_wait_s)
        self.write_health = CircuitBreaker(first_wait_s, longest_wait_s)
        self.last_error = ""
        self._told: list[dict[str, int | float | str]] = [{"tier": store.name}]
        self._is_left_out = False
        self._missed: dict[str, object] = {}  # by key, something new for each miss; the oldest first
        self._lock = Lock()
        self._turns = Turns()

    @property
    def is_up(self) -> bool:
        return self.health.is_up and not self._is_left_out

    def misses(self, key: str) -> bool:
        """Whether what may lie under `key` is older than the last write or delete of it."""
        return self._is_left_out or key in self._missed

    def may_read(self, key: str) -> bool:
        """Not `misses`. What is too old is deleted, if the tier can be asked again and no write of `key` is under way:
        that may be an older one, which lands after the delete."""
        if key in self._missed:
            with self._turns.turn(key, wait=False) as is_mine:
                if is_mine:
                    self._delete(key)
            return False
        return not self._is_left_out

    def put(self, key: str, value: Value, *, copy: Copy | None = None, wait: bool = True) -> bool:
        """Whether the tier holds `value` now. One that does not take it loses what it held under `key` before. A `copy`
        of another tier's value is not written once there is a newer one, nor without `wait` while another writes."""
        with self._turns.turn(key, wait=wait) as is_mine:
            before = self._missed.get(key)  # asked for first: a miss that comes after the next line is not ended here
            if not is_mine or (copy is not None and not copy.is_current):
                return False
            if self.write(self.store.put, key, value, default=False):
                self._has_taken(key, before)
                return True
            self._delete(key)
            return False

    def delete(self, key: str) -> bool:
        with self._turns.turn(key):
            return self._delete(key)

    def _delete(self, key: str) -> bool:
        before = self._missed.get(key)
        there = self.write(self.store.delete, key, default=None)
        if there is None:
            self.miss(key)
        else:
            self._has_taken(key, before)
        return bool(there)

    def quarantine(self, key: str, reason: str, found: Value | None) -> bool:
        with self._turns.turn(key):
            gone = self.write(self.store.quarantine, key, reason, found, default=None)
            if gone is None:
                self.miss(key)
            return bool(gone)

    def clear(self) -> None:
        """If the tier does not take it, it is left out until it takes one."""

        def clear() -> bool:
            self.store.clear()
            return True

        self._turns.wait_for_all()  # older values, which must not land after it
        self._leave_out()
        self._is_left_out = not self.write(clear, default=False)

    def miss(self, key: str) -> None:
        """There is a newer value, or none, under `key`, of which this tier has not heard."""
        with self._lock:
            if self._is_left_out:
                return
            self._missed.pop(key, None)
            self._missed[key] = object()
            if len(self._missed) <= MOST_MISSED:
                return
            oldest = next((each for each in self._missed if not self._turns.is_taken(each)), key)
        with self._turns.turn(oldest, wait=False) as is_mine:
            if not is_mine:
                return  # all of them are being written: as few as there are threads
            before = self._missed.get(oldest)
            unknown: int | None = -1
            is_gone = self.write(self.store.delete, oldest, default=None) is not None
            is_gone = is_gone or self.call(self.store.size_of, oldest, default=unknown) is None
            if is_gone:
                self._has_taken(oldest, before)
        if not is_gone:
            self._leave_out()
            advice = "it is left out until it is cleared or opened again"
            log.warning("tier %s has missed more than %d writes: %s", self.store.name, MOST_MISSED, advice)

    def _leave_out(self) -> None:
        with self._lock:
            self._is_left_out = True
            self._missed.clear()

    def _has_taken(self, key: str, miss: object) -> None:
        """A write or delete that began when `miss` was the last one."""
        with self._lock:
            if self._missed.get(key) is miss:
                self._missed.pop(key, None)

    def read(self, method: Callable[..., Buffer | None], *args: object) -> Buffer | None:
        """As `call`; what is not bytes is a failure too."""

        def read() -> Buffer | None:
            value = method(*args)
            if value is not None:
                memoryview(value)
            return value

        return self.call(read, default=None)

    def close(self) -> None:
        try:
            self.store.close()
        except BaseException as error:  # the tiers below are to be closed too
            self.last_error = f"{type(error).__name__}: {error}"
            log.warning("tier %s could not be closed: %s", self.store.name, self.last_error)

    def call(self, method: Callable[..., T], *args: object, default: T) -> T:
        """``method(*args)`` of this tier's store, or `default` if it fails or is left alone."""
        return self._call(self.health, "", method, args, default)

    def rows(self) -> list[dict[str, int | float | str]]:
        """The store's own, or the last that it gave, each with how the tier has fared."""
        self._told = self.ask(self.store.rows, default=self._told)
        return [{**row, **self.row()} for row in self._told]

    def ask(self, method: Callable[..., T], *args: object, default: T) -> T:
        """As `call`, for what a store says of itself: it may give the last known numbers of a server that does not
        answer, which is a failure all the same."""
        found = [default]

        def asked() -> None:
            found[0] = method(*args)
            if not self.store.is_up:
                raise StoreError("it does not answer; its numbers are the last known", reason="no_answer")

        self.call(asked, default=None)
        return found[0]

    def write(self, method: Callable[..., T], *args: object, default: T) -> T:
        """As `call`, for a method that changes what the store holds."""
        return self._call(self.write_health, "'s writes", method, args, default)

    def _call(
        self, health: CircuitBreaker, what: str, method: Callable[..., T], args: tuple[object, ...], default: T
    ) -> T:
        if not health.may_ask():
            return default
        try:
            result = method(*args)
        except ValueTooLongError:
            raise  # an error of the caller
        except Exception as error:  # a stack must survive any error that a tier of another package raises
            self.last_error = f"{type(error).__name__}: {error}"
            if health.failed():
                log.warning("tier %s%s failed, going on without: %s", self.store.name, what, self.last_error)
            return default
        if health.succeeded():
            log.warning("tier %s%s: back again", self.store.name, what)
        return result

    def row(self) -> dict[str, int | float | str]:
        """How it has fared, for pandas."""
        return {
            "up": int(self.is_up),
            "takes_writes": int(self.write_health.is_up),
            "outages": self.health.outages + self.write_health.outages,
            "failures": self.health.failures + self.write_health.failures,
            "last_error": self.last_error,
        }
