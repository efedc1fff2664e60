"""Stores that are told lies, and whether they recover."""

import contextlib

from servers import wait_for

from kvlab.errors import StoreError
from kvlab.stores.base import ValueTooLongError

OPTIONS = "timeout_ms=300&retry_ms=1&longest_retry_ms=1&limit=1MiB"
URLS = {
    "single": "redis://:pw@127.0.0.1:{}/1?" + OPTIONS,
    "sentinel": "redis-sentinel://:pw@127.0.0.1:{}/main?" + OPTIONS,
    "cluster": "redis-cluster://:pw@127.0.0.1:{}?" + OPTIONS,
}
CALLS = {
    "get": lambda store: store.get("kvlab:a"),
    "get_into": lambda store: store.get_into("kvlab:a", memoryview(bytearray(100))),
    "get_head": lambda store: store.get_head("kvlab:a", 5),
    "size_of": lambda store: store.size_of("kvlab:a"),
    "contains_many": lambda store: store.contains_many(["kvlab:a", "kvlab:b", "c", "d"]),
    "put": lambda store: store.put("p", [b"x" * 100, b"y" * 100_000]),
    "delete": lambda store: store.delete("kvlab:a"),
    "quarantine": lambda store: store.quarantine("kvlab:a", "test", b"value of a"),
    "keys": lambda store: list(store.keys()),
    "used_bytes": lambda store: store.used_bytes,
}


def outcome(call, store):
    """The reason of a failure, or nothing."""
    try:
        call(store)
    except ValueTooLongError:
        return "value too long"
    except StoreError as error:
        return error.reason
    return ""


def recovers(store):
    """Once the server is honest, so are the answers."""

    def right():
        with contextlib.suppress(StoreError):
            value = store.get("kvlab:a")
            assert value is None or bytes(value) == b"value of a"
            return value is not None and store.contains_many(["kvlab:b", "kvlab:c"]) == [True, False]

    wait_for(right, "the store to recover")
