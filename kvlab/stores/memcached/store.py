"""A tier in memcached: one item for each key, shared by every process that can reach the server."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from kvlab.errors import ConfigError
from kvlab.hostmemory import aligned
from kvlab.stores.base import MAX_KEY_BYTES, Value, buffers, check_fits, cut
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.memcached.names import MOST_PREFIX, is_digest, key_of, name_of
from kvlab.stores.memcached.wire import Item, MemcachedConnection
from kvlab.stores.one_server import OneServerStore
from kvlab.stores.server import AnswerError, EnoughError, Server
from kvlab.stores.tls import tls_of
from kvlab.stores.url import Secret, StoreURL
from kvlab.stores.wire import ProtocolError, connected
from kvlab.units import format_bytes

DEFAULT_PORT = 11211
PASSWORD = "KVLAB_MEMCACHED_PASSWORD"
LISTING = 60  # times the deadline of a call: how long a list of all names may take
MOST_LISTED_BYTES = 1 << 29  # of memory for names
BUSY_WAIT_S = 0.02


class MemcachedStore(OneServerStore):
    """Values in a memcached server, 1.6 or later.

    The budget is the server's ``-m`` and the order of leaving its own; ``-I`` is the longest value it takes, 1 MiB by
    default, which most objects exceed. Every call ends within `timeout_s`; a server that fails is left alone for
    `first_wait_s`, doubled up to `longest_wait_s`, and tried again.

    Parameters
    ----------
    prefix
        stores of another prefix do not see these values.
    ttl_s
        seconds a value lives on the server; 0 for ever.
    limit
        values over this many bytes are refused before anything is sent, and not read either.
    """

    refusals = frozenset({"too_large", "full"})
    _server: Server[MemcachedConnection]

    def __init__(
        self,
        host: str,
        port: int,
        prefix: str = "",
        *,
        user: str = "",
        password: Secret | None = None,
        tls: Any = None,
        timeout_s: float = 1.0,
        ttl_s: float = 0.0,
        limit: int = 512 << 20,
        first_wait_s: float = 0.25,
        longest_wait_s: float = 10.0,
        name: str = "memcached",
    ) -> None:
        super().__init__(name, host, port, prefix, timeout_s=timeout_s, limit=limit)
        self._prefix = f"{quote(prefix, safe='/:')}/" if prefix else ""
        self._ttl_s = max(1, round(ttl_s)) if ttl_s else 0

        def connect(deadline: float) -> MemcachedConnection:
            connection = MemcachedConnection(connected((host, port), tls, deadline))
            if password is not None:
                try:
                    connection.log_in(user, password, deadline)
                except BaseException:
                    connection.close()
                    raise
            return connection

        self._server = _Memcached(f"memcached at {host}:{port}", connect, CircuitBreaker(first_wait_s, longest_wait_s))

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        if "size" in url.options:
            raise ConfigError(f"size is no option of {url.shown!r}: the budget is the server's, memcached -m MEGABYTES")
        prefix = url.path.strip("/")
        if len(quote(prefix, safe="/:")) > MOST_PREFIX or "//" in prefix:
            raise ConfigError(f"the prefix of {url.shown!r} must be names with single slashes, of {MOST_PREFIX} bytes")
        password = url.take_secret("password", url.password, variable=PASSWORD)
        if bool(url.user) != (password is not None):
            raise ConfigError(
                f"a login needs user and password in {url.shown!r}: user:password@host, or user@host and "
                f"password_file= or {PASSWORD} in the environment"
            )
        if " " in url.user:
            raise ConfigError(f"a user of memcached has no space in its name, got one in {url.shown!r}")
        tls = url.take_bool("tls", False)
        context = tls_of(url) if tls else None
        return {
            **cls.common_arguments(url, DEFAULT_PORT, timeout_ms=1000),
            "user": url.user,
            "password": password,
            "tls": context,
            "ttl_s": url.take_ms("ttl_ms", "0"),
        }

    def touch(self, keys: Iterable[str]) -> None:
        """To the server a look is a use."""
        self.contains_many(list(keys))

    def keys(self) -> Iterator[str]:
        """Without those that are being read at this moment, which the server leaves out. One that lists for longer than
        60 deadlines, or names that take more than 512 MiB, has failed."""
        with self._counting():
            names = self._server.run(self._names, time.monotonic() + LISTING * self._timeout_s)
            keys = (
                self._key_told(name) if is_digest(self._prefix, name) else key_of(self._prefix, name) for name in names
            )
            found = {key: None for key in keys if key is not None}
        return iter(found)

    # ---- calls

    def _send(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> None:
        name, before = name_of(self._prefix, key)
        sent = [memoryview(before), *pieces]
        self._server.run(lambda connection: connection.store(name, sent, len(before), self._ttl_s, deadline), deadline)

    def _fetch(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        name, before = name_of(self._prefix, key)
        found: list[Sequence[memoryview]] = []

        def room(item: Item) -> list[memoryview]:
            size = _value_size(item, before)
            if size is None:
                raise EnoughError(None)
            self._check_limit(size)
            if out is not None:
                check_fits(key, size, out)
            found.append([aligned(size)[:size]] if out is None else cut(out, size))
            return [memoryview(bytearray(len(before))), *found[0]]

        item = self._server.run(lambda connection: connection.fetch(name, room, deadline), deadline)
        return None if item is None else found[0]

    def _size(self, key: str, deadline: float) -> int | None:
        item = self._look([key], deadline)[0]
        return None if item is None else _value_size(item, name_of(self._prefix, key)[1])

    def _head(self, key: str, num_bytes: int, deadline: float) -> bytes | None:
        found = self._versioned_head(key, num_bytes, deadline)
        return None if found is None else found[0]

    def _versioned_head(self, key: str, num_bytes: int, deadline: float) -> tuple[bytes, int] | None:
        """The first bytes of a value, and the version of the item that they are of."""
        name, before = name_of(self._prefix, key)

        def work(connection: MemcachedConnection) -> tuple[bytes, int] | None:
            head = bytearray()

            def room(item: Item) -> list[memoryview]:
                size = _value_size(item, before)
                if size is None:
                    raise EnoughError(None)
                head.extend(bytes(min(size, num_bytes)))
                return [memoryview(bytearray(len(before))), memoryview(head)]

            item = connection.fetch(name, room, deadline)
            if item is None:
                return None
            found = bytes(head), item.version
            if len(before) + len(head) < item.size:  # the rest is on its way
                raise EnoughError(found)
            return found

        return self._server.run(work, deadline)

    def _remove(self, key: str, found: Value | None, deadline: float) -> bool:
        """With `found` only the item that was compared is removed, and none that replaces it meanwhile."""
        name, version = name_of(self._prefix, key)[0], 0
        if found is not None:
            wanted = b"".join(buffers(found))
            head = self._versioned_head(key, max(len(wanted), 8), deadline)
            if head is None or head[0] != wanted:
                return False
            version = head[1]
        return self._server.run(lambda connection: connection.remove(name, version, deadline), deadline)

    def _exist(self, keys: Sequence[str], deadline: float) -> list[bool]:
        return [item is not None for item in self._look(keys, deadline)]

    def _look(self, keys: Sequence[str], deadline: float) -> list[Item | None]:
        names = {key: name_of(self._prefix, key) for key in keys}
        asked = [name for name, _ in names.values()]
        told = self._server.run(lambda connection: connection.look(asked, deadline), deadline)
        found = {
            key: item
            for (key, (_, before)), item in zip(names.items(), told, strict=True)
            if item is not None and _value_size(item, before) is not None
        }
        return [found.get(key) for key in keys]

    def _names(self, connection: MemcachedConnection) -> list[bytes]:
        """Names of this prefix as the server writes them. It makes one list at a time."""
        end = time.monotonic() + LISTING * self._timeout_s
        while True:
            found, held = [], 0
            try:
                for name in connection.listed(end):
                    if is_digest(self._prefix, name) or key_of(self._prefix, name) is not None:
                        found.append(name)
                        held += 2 * sys.getsizeof(name)
                    if held > MOST_LISTED_BYTES:
                        raise ProtocolError(f"the server listed more than {format_bytes(MOST_LISTED_BYTES)} of names")
                return found
            except AnswerError as error:
                if error.reason != "busy" or time.monotonic() > end:
                    raise
                time.sleep(BUSY_WAIT_S)

    def _key_of(self, listed: bytes) -> str | None:
        return key_of(self._prefix, listed)

    def _key_told(self, listed: bytes) -> str | None:
        """The key that stands before the value of a name that is a digest. All of the value is read: one that is on its
        way is missing from lists."""
        name, deadline, raw = unquote_to_bytes(listed), self._deadline(), bytearray()

        def room(item: Item) -> list[memoryview]:
            if item.size > self._limit:
                raise EnoughError(None)
            raw.extend(bytes(min(item.flags, item.size, MAX_KEY_BYTES)))
            return [memoryview(raw), aligned(item.size - len(raw))[: item.size - len(raw)]]

        self._server.run(lambda connection: connection.fetch(name, room, deadline), deadline)
        with suppress(UnicodeDecodeError):
            key = raw.decode("utf-8", "surrogatepass")
            return key if name_of(self._prefix, key) == (name, bytes(raw)) else None
        return None

    def _totals(self, deadline: float) -> dict[str, int]:
        """The server's ``-m``, and all its items."""
        told = self._server.run(lambda connection: connection.stats(deadline), deadline)
        if b"bytes" not in told or b"limit_maxbytes" not in told:
            raise ProtocolError("the server does not tell its memory")
        most = told[b"limit_maxbytes"]
        return {"max_bytes": most, "used_bytes": min(told[b"bytes"], most)}


class _Memcached(Server[MemcachedConnection]):
    def is_fatal(self, error: AnswerError) -> bool:
        return error.reason in ("auth", "unknown_command")


def _value_size(item: Item, before: bytes) -> int | None:
    """None where the item is another program's."""
    return item.size - len(before) if item.flags == len(before) <= item.size else None
