"""One tier of a stack, which never fails a call."""

import logging
from collections.abc import Callable
from typing import TypeVar

from kvlab.stores.backoff import FIRST_WAIT_S, LONGEST_WAIT_S, Backoff
from kvlab.stores.base import Store, ValueTooLongError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Tier:
    """Calls a store; a call that raises answers with its default, and the store is left alone for a growing while.

    Going down is logged once per outage, coming back too.
    """

    def __init__(
        self, store: Store, *, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S
    ) -> None:
        self.store = store
        self.health = Backoff(first_wait_s, longest_wait_s)
        self.last_error = ""

    @property
    def is_up(self) -> bool:
        return self.health.is_up

    def call(self, method: Callable[..., T], *args: object, default: T) -> T:
        """``method(*args)`` of this tier's store, or `default` if it fails or is left alone."""
        if not self.health.may_ask():
            return default
        try:
            result = method(*args)
        except ValueTooLongError:
            raise  # the caller's affair
        except Exception as error:  # a stack must outlive whatever a tier of somebody else's raises
            self.last_error = f"{type(error).__name__}: {error}"
            if self.health.failed():
                log.warning("tier %s failed, going on without it: %s", self.store.name, self.last_error)
            return default
        if self.health.succeeded():
            log.warning("tier %s is back", self.store.name)
        return result

    def row(self) -> dict[str, int | float | str]:
        """How it has fared, for pandas."""
        return {
            "up": int(self.is_up),
            "outages": self.health.outages,
            "failures": self.health.failures,
            "last_error": self.last_error,
        }
