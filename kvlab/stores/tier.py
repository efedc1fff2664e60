"""One tier of a stack, and whether it is to be asked: a medium that fails is left alone for a growing while."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvlab.stores.base import Store, ValueTooLongError

log = logging.getLogger(__name__)

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0

T = TypeVar("T")


class Tier:
    """Calls a store and never lets it fail: a call that raises answers with its default.

    After a failure the tier is down for `wait_s`, doubled with each failure in a row; then a single call tries it.
    Going down is logged once per outage, coming back too.
    """

    def __init__(
        self, store: Store, *, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S
    ) -> None:
        self.store = store
        self.outages = 0
        self.failures = 0
        self.last_error = ""
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._wait_s = 0.0
        self._ask_again = 0.0
        self._lock = threading.Lock()

    @property
    def is_up(self) -> bool:
        """Whether calls reach the store; a tier whose wait is over counts as down until a call succeeded."""
        return self._wait_s == 0.0

    def call(self, method: Callable[..., T], *args: object, default: T) -> T:
        """``method(*args)`` of this tier's store, or `default` if it fails or is left alone."""
        if self._wait_s and not self._may_try():
            return default
        try:
            result = method(*args)
        except ValueTooLongError:
            raise  # the caller's affair
        except Exception as error:  # a stack must outlive whatever a tier of somebody else's raises
            self._failed(error)
            return default
        if self._wait_s:
            self._recovered()
        return result

    def _may_try(self) -> bool:
        with self._lock:
            now = time.monotonic()
            if now < self._ask_again:
                return False
            self._ask_again = now + self._wait_s  # the others stay away while one tries
            return True

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            if not self._wait_s:
                self.outages += 1
                log.warning("tier %s failed, going on without it: %s", self.store.name, self.last_error)
            self._wait_s = min(max(self._first_wait_s, 2 * self._wait_s), self._longest_wait_s)
            self._ask_again = time.monotonic() + self._wait_s

    def _recovered(self) -> None:
        with self._lock:
            if self._wait_s:
                self._wait_s = 0.0
                log.warning("tier %s is back", self.store.name)
