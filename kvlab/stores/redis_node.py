"""One Redis server: its idle connections and its health."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis.exceptions
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

from kvlab.errors import StoreError
from kvlab.stores.backoff import Backoff
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.resp import ReplyError, Wire

log = logging.getLogger(__name__)

T = TypeVar("T")
IDLE_CONNECTIONS = 16
FATAL_REPLIES = {"loading", "masterdown", "noauth", "wrongpass", "clusterdown", "readonly", "misconf"}


class NodeDownError(StoreError):
    """The server does not answer, answers too late, or does not let us in."""


class Node:
    """A server at an address. Calls raise NodeDownError with its reason, at once while the server is left alone."""

    def __init__(self, address: tuple[str, int] | str, options: dict[str, Any], health: Backoff) -> None:
        self.address = address
        self.health = health
        self.last_reason = ""
        self._options = options
        self._idle: list[Wire] = []
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.address if isinstance(self.address, str) else f"{self.address[0]}:{self.address[1]}"

    def run(self, work: Callable[[Wire], T], deadline: float) -> T:
        """`work` on a connection of this server. A connection that died while idle is replaced once."""
        if not self.health.may_ask():
            raise NodeDownError(f"Redis at {self} is left alone after: {self.last_reason}", reason="left_alone")
        while True:
            wire, was_idle = self._take(deadline)
            try:
                result = work(wire)
            except ReplyError as error:  # the connection is fine, the server may not be
                self._give_back(wire)
                if error.reason in FATAL_REPLIES:
                    raise self._down(error.reason, error) from error
                self.health.succeeded()
                raise
            except ValueTooLongError:
                wire.close()  # the rest of the value is still on its way
                raise
            except ConnectionError as error:
                wire.close()
                if was_idle:
                    self._close_idle()
                    continue
                raise self._down("disconnected", error) from error
            except BaseException as error:
                wire.close()
                if isinstance(error, OSError):
                    raise self._down(_reason(error), error) from error
                raise
            self._give_back(wire)
            if self.health.succeeded():
                log.warning("Redis at %s is back", self)
            return result

    def close(self) -> None:
        self._close_idle()

    def _take(self, deadline: float) -> tuple[Wire, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        try:
            return Wire(_connect(self.address, self._options, deadline - time.monotonic())), False
        except (redis.exceptions.RedisError, OSError, ValueError) as error:
            raise self._down(_reason(error), error) from error

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            if len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(wire)
                return
        wire.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _down(self, reason: str, error: BaseException) -> NodeDownError:
        self.last_reason = reason
        self._close_idle()
        if self.health.failed():
            log.warning("Redis at %s failed (%s): %s", self, reason, error)
        return NodeDownError(f"Redis at {self} failed ({reason}): {error}", reason=reason)


def _connect(address: tuple[str, int] | str, options: dict[str, Any], timeout_s: float) -> AbstractConnection:
    if timeout_s <= 0:
        raise TimeoutError("the deadline passed before connecting")
    arguments = {key: value for key, value in options.items() if key != "tls"} | {
        "socket_timeout": timeout_s,
        "protocol": 2,  # no push messages between replies
        "retry": Retry(NoBackoff(), 0),
    }
    connection: AbstractConnection
    if isinstance(address, str):
        connection = UnixDomainSocketConnection(path=address, **arguments)
    else:
        kind: type[Connection] = SSLConnection if options.get("tls") else Connection
        connection = kind(host=address[0], port=address[1], socket_connect_timeout=timeout_s, **arguments)
    connection.connect()
    sock: socket.socket = vars(connection)["_sock"]
    if not isinstance(address, str):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _reason(error: BaseException | None) -> str:
    """One word for counters; causes are looked at first, for redis-py wraps what happened."""
    seen = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError) and not isinstance(seen, TimeoutError):
            return "tls"
        if isinstance(seen, redis.exceptions.AuthenticationError | redis.exceptions.AuthorizationError):
            return "auth"
        if isinstance(seen, TimeoutError | redis.exceptions.TimeoutError):
            return "timeout"
        if isinstance(seen, ConnectionRefusedError | FileNotFoundError | socket.gaierror):
            return "unreachable"
        if isinstance(seen, redis.exceptions.BusyLoadingError):
            return "loading"
        if isinstance(seen, StoreError):
            return seen.reason
        seen = seen.__cause__ or seen.__context__
    text = str(error).upper()
    if "CERTIFICATE" in text or "SSL" in text:
        return "tls"
    if "WRONGPASS" in text or "NOAUTH" in text or "AUTH" in text:
        return "auth"
    return "disconnected"
