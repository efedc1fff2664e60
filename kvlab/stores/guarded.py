"""One tier of a stack, which never fails a call."""

import logging
from collections.abc import Callable
from typing import TypeVar

from kvlab.stores.circuit_breaker import FIRST_WAIT_S, LONGEST_WAIT_S, CircuitBreaker
from kvlab.stores.base import Store, ValueTooLongError

log = logging.getLogger(__name__)

T = TypeVar("T")


class GuardedStore:
    """Calls a store; a call that raises answers with its default, and the store is left alone for a growing while.

    A write that fails keeps the next writes away and no reads: a full disk can be read, and so can a folder that
    another process has locked. Going down is logged once per outage, coming back too.
    """

    def __init__(
        self, store: Store, *, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S
    ) -> None:
        self.store = store
        self.health = CircuitBreaker(first_wait_s, longest_wait_s)
        self.write_health = CircuitBreaker(first_wait_s, longest_wait_s)
        self.last_error = ""

    @property
    def is_up(self) -> bool:
        return self.health.is_up

    def call(self, method: Callable[..., T], *args: object, default: T) -> T:
        """``method(*args)`` of this tier's store, or `default` if it fails or is left alone."""
        return self._call(self.health, "", method, args, default)

    def write(self, method: Callable[..., T], *args: object, default: T) -> T:
        """As `call`, for a method that changes what the store holds."""
        return self._call(self.write_health, "'s writes", method, args, default)

    def _call(self, health: CircuitBreaker, what: str, method: Callable[..., T], args: tuple[object, ...], default: T) -> T:
        if not health.may_ask():
            return default
        try:
            result = method(*args)
        except ValueTooLongError:
            raise  # the caller's affair
        except Exception as error:  # a stack must outlive whatever a tier of somebody else's raises
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
