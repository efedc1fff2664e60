"""A tier in LMCache's cache server: one value for each key, shared by every process that can reach it."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import aligned
from kvlab.stores.base import Value, check_fits, cut
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.lm.wire import MOST_BYTES, LMConnection, name_of
from kvlab.stores.one_server import OneServerStore
from kvlab.stores.remote import remember
from kvlab.stores.server import EnoughError, Server
from kvlab.stores.url import StoreURL
from kvlab.stores.wire import ProtocolError, connected

log = logging.getLogger(__name__)

DEFAULT_PORT = 65432


class _CutValueError(Exception):
    """The server announced a value and hung up."""


class LMStore(OneServerStore):
    """Values in an LMCache server (``python -m lmcache.v1.server HOST PORT``).

    The server has no budget, evicts nothing, lists nothing and removes nothing: its memory only grows until it is
    started again. A removed value is replaced by an empty one with a mark. `keys` and `used_bytes` tell of what this
    store has put itself, its latest 65,536 keys. Every call ends within `timeout_s`; a server that fails is left alone
    for `first_wait_s`, doubled up to `longest_wait_s`, and tried again.

    Parameters
    ----------
    prefix
        stores of another prefix do not see these values.
    limit
        values over this many bytes are refused before anything is sent, and not read either.
    """

    batch = 512
    max_bytes = 1 << 62  # none
    lost = "vanished"  # the server was started again

    def __init__(
        self,
        host: str,
        port: int,
        prefix: str = "",
        *,
        timeout_s: float = 1.0,
        limit: int = 512 << 20,
        first_wait_s: float = 0.25,
        longest_wait_s: float = 10.0,
        name: str = "lm",
    ) -> None:
        super().__init__(name, host, port, prefix, timeout_s=timeout_s, limit=limit)
        self._prefix = prefix
        self._held: OrderedDict[str, int] = OrderedDict()  # put by this store, and the lengths
        self._server = Server(
            f"LMCache server at {host}:{port}",
            lambda deadline: LMConnection(connected((host, port), None, deadline)),
            CircuitBreaker(first_wait_s, longest_wait_s),
        )

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        url.refuse_login("LMCache's server knows no users: all who reach it read and write; sign objects by auth=")
        if "size" in url.options:
            raise ConfigError(
                f"size is no option of {url.shown!r}: the server evicts nothing and its memory grows until it is "
                "started again; Redis and memcached have budgets"
            )
        arguments = cls.common_arguments(url, DEFAULT_PORT, timeout_ms=1000)
        if arguments["limit"] > MOST_BYTES:
            raise ConfigError(f"limit must be less than 2GiB in {url.shown!r}: LMCache's server takes no longer values")
        return arguments

    def keys(self) -> Iterator[str]:
        """Those that this store has put and that are there still."""
        with self._lock:
            held = list(self._held)
        if not held:
            self.contains("")  # a server that is not there has not nothing
            log.info("an LMCache server lists nothing: keys are those that this store has put")
        return (key for key, there in zip(held, self.contains_many(held), strict=True) if there)

    @property
    def used_bytes(self) -> int:
        """Of what this store has put."""
        with self._lock:
            return sum(self._held.values())

    # ---- calls

    def _name(self, key: str) -> bytes:
        return name_of(self._prefix, key)

    def _send(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> None:
        self._place_at(self._name(key), pieces, deadline)
        with self._lock:
            remember(self._held, key, size)

    def _place_at(self, name: bytes, pieces: Sequence[memoryview], deadline: float, *, removed: bool = False) -> None:
        """The server takes requests one by one: that the last one is answered says that the value has arrived."""

        def work(connection: LMConnection) -> bool:
            connection.put(name, pieces, deadline, removed=removed)
            return connection.exist([name], deadline)[0]

        if not self._server.run(work, deadline):
            raise ProtocolError("the server does not have what it was given")

    def _fetch(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        def work(connection: LMConnection) -> Sequence[memoryview] | None:
            head = connection.ask(self._name(key), deadline)
            if head is None or head.removed:
                return None
            self._check_limit(head.size)
            if out is not None:
                check_fits(key, head.size, out)
            into = [aligned(head.size)[: head.size]] if out is None else cut(out, head.size)
            _read(connection, into, deadline)
            connection.check_end()
            return into

        try:
            return self._server.run(work, deadline)
        except _CutValueError:
            self._bury(key, deadline)
            return None

    def _size(self, key: str, deadline: float) -> int | None:
        """A reply begins with the length; of a value the connection is then closed, as all of it is on its way."""

        def work(connection: LMConnection) -> int | None:
            head = connection.ask(self._name(key), deadline)
            if head is not None and head.size:
                raise EnoughError(head.size)
            return None if head is None or head.removed else 0

        return self._server.run(work, deadline)

    def _head(self, key: str, num_bytes: int, deadline: float) -> bytes | None:
        def work(connection: LMConnection) -> bytes | None:
            head = connection.ask(self._name(key), deadline)
            if head is None or head.removed:
                return None
            self._check_limit(head.size)
            found = bytearray(min(head.size, num_bytes))
            _read(connection, [memoryview(found)], deadline)
            if len(found) < head.size:
                raise EnoughError(bytes(found))
            return bytes(found)

        try:
            return self._server.run(work, deadline)
        except _CutValueError:
            self._bury(key, deadline)
            return None

    def _remove(self, key: str, found: Value | None, deadline: float) -> bool:
        """What another client puts between the look and the removal is lost: the server knows no conditions."""
        is_there = self._size(key, deadline) is not None if found is None else self._still_is(key, found, deadline)
        if not is_there:
            return False
        self._mark_removed(key, deadline)
        return True

    def _mark_removed(self, key: str, deadline: float) -> None:
        self._place_at(name_of(self._prefix, key, of_removed=True), [], deadline)
        self._place_at(self._name(key), [], deadline, removed=True)
        with self._lock:
            self._held.pop(key, None)

    def _bury(self, key: str, deadline: float) -> None:
        """The server keeps the length of a value whose writer was cut off, and no value. It says that the key is there,
        so that no writer puts it again, until it is removed. Where the server is gone, that is raised."""
        error = StoreError(f"{self._server} announced a value and hung up", reason="truncated")
        try:
            self._mark_removed(key, deadline)
        except StoreError:
            raise error from None
        self._failed(error)
        self._left(key, "set_aside:truncated")
        self.counters.dropped += 1

    def _exist(self, keys: Sequence[str], deadline: float) -> list[bool]:
        names = [name for key in keys for name in (self._name(key), name_of(self._prefix, key, of_removed=True))]
        told = self._server.run(lambda connection: connection.exist(names, deadline), deadline)
        there = dict(zip(keys, told[::2], strict=True))
        for key, was_removed in zip(keys, told[1::2], strict=True):
            if there[key] and was_removed:
                there[key] = self._size(key, deadline) is not None
        return [there[key] for key in keys]


def _read(connection: LMConnection, into: Sequence[memoryview], deadline: float) -> None:
    try:
        connection.read(into, deadline)
    except ConnectionError:
        raise _CutValueError from None
