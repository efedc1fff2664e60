"""Leaving a failed medium alone for a growing while."""

import time

from kvlab.stores.forks import Lock

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0


class CircuitBreaker:
    """After a failure no call may ask for a while, doubled with each failure in a row; then a single call may try."""

    def __init__(self, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self.outages = 0
        self.failures = 0
        self.wait_s = 0.0
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._ask_again = 0.0
        self._lock = Lock()

    @property
    def is_up(self) -> bool:
        """False from a failure to the next success, also when the wait is over."""
        return self.wait_s == 0.0

    def may_ask(self) -> bool:
        """Whether this call may go to the medium. When a wait is over, one caller tries and the others stay away."""
        if self.wait_s == 0.0:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._ask_again:
                return False
            self._ask_again = now + self.wait_s
            return True

    def failed(self) -> bool:
        """Take note of a failure; True if it begins an outage."""
        with self._lock:
            begins = self.wait_s == 0.0
            self.failures += 1
            self.outages += begins
            self.wait_s = min(max(self._first_wait_s, 2 * self.wait_s), self._longest_wait_s)
            self._ask_again = time.monotonic() + self.wait_s
            return begins

    def succeeded(self) -> bool:
        """Take note of a success; True if it ends an outage."""
        if self.wait_s == 0.0:
            return False
        with self._lock:
            ends = self.wait_s != 0.0
            self.wait_s = 0.0
            return ends

    def hurry(self) -> None:
        """Let the next call try at once."""
        self._ask_again = 0.0
