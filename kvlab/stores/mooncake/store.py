"""A tier in Mooncake Store: objects in the memory of its nodes, found through its master."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import xxhash

from kvlab.errors import ConfigError
from kvlab.hostmemory import aligned
from kvlab.stores.base import Value, check_fits, cut, fits_key
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.mooncake.client import Agent, AgentConnection, AgentServer
from kvlab.stores.mooncake.numbers import names, totals
from kvlab.stores.one_server import OneServerStore
from kvlab.stores.server import AnswerError
from kvlab.stores.url import StoreURL

T = TypeVar("T")
DEFAULT_PORT, NUMBERS_PORT = 50051, 9003
MARK = b"kvlab\0\0\1"
HEAD_BYTES = len(MARK) + 8  # before each value: the mark and a digest, as an object may be replaced while it is read
TRIES = 8
LISTING = 60  # times the deadline of a call: how long a list of all names may take
_PROTOCOL = re.compile(r"[a-z_]{2,16}")


class MooncakeStore(OneServerStore):
    """Objects in a Mooncake Store.

    The budget is the memory of the nodes (`mooncake_client`), the order of leaving the master's. Every call ends within
    `timeout_s`, though the library's may not; a master that fails is left alone for `first_wait_s`, doubled up to
    `longest_wait_s`, and tried again. The library lives in a process of its own (`kvlab.stores.mooncake.agent`).

    Parameters
    ----------
    prefix
        stores of another prefix do not see these values.
    limit
        values over this many bytes are refused before anything is sent, and not read either.
    numbers_port
        the master's ``--metrics_port``: `keys`, `used_bytes` and `max_bytes` ask there.
    """

    refusals = frozenset({"full"})
    _server: AgentServer

    def __init__(
        self,
        host: str,
        port: int,
        prefix: str = "",
        *,
        protocol: str = "tcp",
        device: str = "",
        metadata: str = "P2PHANDSHAKE",
        numbers_port: int = NUMBERS_PORT,
        timeout_s: float = 3.0,
        limit: int = 512 << 20,
        first_wait_s: float = 0.25,
        longest_wait_s: float = 10.0,
        name: str = "mooncake",
    ) -> None:
        super().__init__(name, host, port, prefix, timeout_s=timeout_s, limit=limit)
        self._numbers = (host, numbers_port)
        self._start = f"kvlab/{quote(prefix)}{'/' if prefix else ''}"
        if find_spec("mooncake") is None:
            with_gpu = "with a GPU mooncake-transfer-engine instead"
            raise ConfigError(f"mooncake:// needs Mooncake: pip install '/path/to/kvlab[mooncake]', {with_gpu}")
        self._agent = Agent(host, str(port), metadata, protocol, device)
        self._agent.start()
        health = CircuitBreaker(first_wait_s, longest_wait_s)
        self._server = AgentServer(f"Mooncake at {host}:{port}", self._agent.connect, health)

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        url.refuse_login("Mooncake knows no users: all who reach its ports read and write; sign objects by auth=")
        if "size" in url.options:
            raise ConfigError(f"size is no option of {url.shown!r}: the budget is the memory of Mooncake's nodes")
        protocol, device = url.take("protocol", "tcp"), url.take("device", "")
        if not _PROTOCOL.fullmatch(protocol):
            raise ConfigError(f"protocol must be tcp, rdma or another of Mooncake's in {url.shown!r}")
        numbers_port = url.take("metrics_port", str(NUMBERS_PORT))
        if not (numbers_port.isascii() and numbers_port.isdigit() and 0 < int(numbers_port) < 1 << 16):
            raise ConfigError(f"metrics_port must be a port in {url.shown!r}")
        return {
            **cls.common_arguments(url, DEFAULT_PORT, timeout_ms=3000),
            "protocol": protocol,
            "device": device,
            "metadata": url.take("metadata", "P2PHANDSHAKE"),
            "numbers_port": int(numbers_port),
        }

    def keys(self) -> Iterator[str]:
        """From the master's page of numbers."""
        with self._counting():
            told = self._listed()
        keys = [self._key(name) for name in told]
        return iter({key: None for key in keys if key is not None})

    def close(self) -> None:
        super().close()
        self._agent.end()

    # ---- calls

    def _name(self, key: str) -> str:
        return self._start + quote(key.encode("utf-8", "surrogatepass"), safe=":@,")

    def _key(self, name: bytes) -> str | None:
        """None for other programs' names and other prefixes'."""
        rest = name.removeprefix(self._start.encode())
        if rest == name or b"/" in rest:
            return None
        with suppress(UnicodeDecodeError):
            key = unquote_to_bytes(rest).decode("utf-8", "surrogatepass")
            return key if fits_key(key) and self._name(key).encode() == name else None
        return None

    def _send(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> None:
        name, length, head = self._name(key), HEAD_BYTES + size, _head_of(pieces)

        def work(connection: AgentConnection) -> None:
            into, at = connection.room(length), 0
            for piece in (memoryview(head), *pieces):
                into[at : at + piece.nbytes] = piece
                at += piece.nbytes
            connection.put(name, length, self._timeout_s / 2, deadline)

        self._server.run(work, deadline)

    def _fetch(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        def take(value: memoryview) -> Sequence[memoryview]:
            if out is not None:
                check_fits(key, value.nbytes, out)
            into, at = [aligned(value.nbytes)[: value.nbytes]] if out is None else cut(out, value.nbytes), 0
            for piece in into:
                piece[:] = value[at : at + piece.nbytes]
                at += piece.nbytes
            return into

        return self._object(key, take, deadline)

    def _head(self, key: str, num_bytes: int, deadline: float) -> bytes | None:
        return self._object(key, lambda value: bytes(value[:num_bytes]), deadline)

    def _object(self, key: str, take: Callable[[memoryview], T], deadline: float) -> T | None:
        name = self._name(key)

        def work(connection: AgentConnection) -> T | None:
            for _ in range(TRIES):
                found = connection.get(name, HEAD_BYTES + self._limit, deadline)
                if found is None:
                    return None
                value = found[HEAD_BYTES:]
                if found[:HEAD_BYTES] == _head_of([value]):
                    return take(value)
            raise AnswerError("an object under this name is no kvlab's, or replaced all the time", reason="protocol")

        return self._server.run(work, deadline)

    def _size(self, key: str, deadline: float) -> int | None:
        name = self._name(key)
        length = self._server.run(lambda connection: connection.size(name, deadline), deadline)
        return None if length is None or length < HEAD_BYTES else length - HEAD_BYTES

    def _remove(self, key: str, found: Value | None, deadline: float) -> bool:
        """What another client puts between the look and the removal is lost: Mooncake knows no conditions."""
        name = self._name(key)
        if found is not None and not self._still_is(key, found, deadline):
            return False
        return self._server.run(lambda connection: connection.remove(name, deadline), deadline)

    def _exist(self, keys: Sequence[str], deadline: float) -> list[bool]:
        names = [self._name(key) for key in keys]
        return self._server.run(lambda connection: connection.exist(names, deadline), deadline)

    def _listed(self) -> list[bytes]:
        return names(*self._numbers, time.monotonic() + LISTING * self._timeout_s)

    def _totals(self, deadline: float) -> dict[str, int]:
        """Of all nodes."""
        return totals(*self._numbers, deadline)


def _head_of(pieces: Sequence[memoryview]) -> bytes:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return MARK + digest.digest()
