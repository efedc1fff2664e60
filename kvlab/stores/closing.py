"""Ends a store for good, though it may raise or never return."""

import logging

from kvlab.stores.base import Store
from kvlab.threads import Threads

logger = logging.getLogger("kvlab")


def close_store(store: Store, *, stall_s: float = 30.0) -> None:
    """Close `store` in a thread of its own: an error is logged, and a call that takes longer than `stall_s` seconds is
    left alone."""
    thread = Threads(1, "kvlab-close")
    closing = thread.submit(store.close)
    if not thread.close(stall_s=stall_s):
        logger.warning("tier %s is not closed after %g s; it is left alone", store.name, stall_s)
    elif (error := closing.exception()) is not None:
        logger.warning("tier %s could not be closed: %s: %s", store.name, type(error).__name__, error)
