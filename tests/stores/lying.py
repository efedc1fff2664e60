"""Stores that are told lies, and whether they recover."""

import contextlib

from servers import wait_for

from kvlab.errors import StoreError

OPTIONS = "timeout_ms=300&retry_ms=1&longest_retry_ms=1&limit=1MiB"
URLS = {
    "single": "redis://:pw@127.0.0.1:{}/1?" + OPTIONS,
    "sentinel": "redis-sentinel://:pw@127.0.0.1:{}/main?" + OPTIONS,
    "cluster": "redis-cluster://:pw@127.0.0.1:{}?" + OPTIONS,
}


def recovers(store):
    """Once the server is honest, so are the answers."""

    def right():
        with contextlib.suppress(StoreError):
            value = store.get("kvlab:a")
            assert value is None or bytes(value) == b"value of a"
            return value is not None and store.contains_many(["kvlab:b", "kvlab:c"]) == [True, False]

    wait_for(right, "the store to recover")
