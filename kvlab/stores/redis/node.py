"""One Redis server: its connections and its health."""

import logging
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

from kvlab.errors import StoreError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.pool import Pool
from kvlab.stores.redis.resp import ReplyError, RespConnection, ok
from kvlab.stores.redis.url import Login
from kvlab.stores.wire import connected

log = logging.getLogger(__name__)

T = TypeVar("T")
FATAL_REPLIES = {"loading", "masterdown", "noauth", "wrongpass", "clusterdown", "readonly", "misconf"}


class NodeDownError(StoreError):
    """The server does not answer, answers too late or not to the point, or does not let us in."""


class RedisNode:
    """A server at an address. Calls raise NodeDownError with its reason, at once while the server is left alone."""

    def __init__(self, address: tuple[str, int] | str, login: Login, health: CircuitBreaker) -> None:
        self.address = address
        self.health = health
        self.last_reason = ""
        self._login = login
        self._pool = Pool(lambda deadline: _connect(address, login, deadline))

    def __str__(self) -> str:
        """For messages: another server may have named this one, so the name is not trusted."""
        return self._login.hide(self.address if isinstance(self.address, str) else "{}:{}".format(*self.address))

    def run(self, work: Callable[[RespConnection], T], deadline: float) -> T:
        """`work` on a connection of this server. A connection that died while idle is replaced once."""
        if not self.health.may_ask():
            raise NodeDownError(f"Redis at {self} is left alone after: {self.last_reason}", reason="left_alone")
        while True:
            connection, was_idle = self._take(deadline)
            try:
                result = work(connection)
            except ReplyError as error:  # the connection is fine, the server may not be
                self._pool.give_back(connection)
                if error.reason not in FATAL_REPLIES:
                    self.health.succeeded()
                    raise
                down = self._down(error.reason, error)
            except ValueTooLongError:
                self._pool.drop(connection)  # the rest of the value is still on its way
                raise
            except ConnectionError as error:
                self._pool.drop(connection)
                if was_idle:
                    self.close_idle()
                    continue
                down = self._down("disconnected", error)
            except OSError as error:
                self._pool.drop(connection)
                down = self._down(_reason(error), error)
            except BaseException:
                self._pool.drop(connection)
                raise
            else:
                self._pool.give_back(connection)
                if self.health.succeeded():
                    log.warning("Redis at %s is back", self)
                return result
            raise down

    def close(self) -> None:
        self.close_idle()

    def close_idle(self) -> None:
        self._pool.close_idle()

    def _take(self, deadline: float) -> tuple[RespConnection, bool]:
        try:
            return self._pool.take(deadline)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            down = self._down(_reason(error), error)
        raise down

    def _down(self, reason: str, error: BaseException) -> NodeDownError:
        """To be raised where `error` is handled no more. It may show a secret, and is the cause only if it does not."""
        text = self._login.hide(str(error))
        self.last_reason = reason
        self.close_idle()
        if self.health.failed():
            log.warning("Redis at %s failed (%s): %s", self, reason, text)
        down = NodeDownError(f"Redis at {self} failed ({reason}): {text}", reason=reason)
        down.__cause__ = error if text == str(error) else None
        return down


def _connect(address: tuple[str, int] | str, login: Login, deadline: float) -> RespConnection:
    """A connection that is let in, by `deadline`."""
    sock = connected(address, login.tls, deadline)
    try:
        connection = RespConnection(sock, [secret.reveal() for secret in login.hidden])
        _log_in(connection, login, deadline)
    except BaseException:
        sock.close()
        raise
    return connection


def _log_in(connection: RespConnection, login: Login, deadline: float) -> None:
    commands: list[list[str]] = []
    if login.password is not None:
        commands.append(["AUTH", *([login.user] if login.user else []), login.password.reveal()])
    if login.db:
        commands.append(["SELECT", str(login.db)])
    for command, reply in zip(commands, connection.calls(commands, deadline) if commands else [], strict=True):
        if not isinstance(reply, ReplyError):
            ok(reply)
        elif reply.reason in ("loading", "masterdown", "busy"):
            raise reply
        elif command[0] == "AUTH":  # the server's words might repeat the command's
            raise StoreError("the server refused the user or password", reason="auth")
        else:
            raise StoreError(f"the server refused database {login.db}: {reply}", reason=reply.reason)


def _reason(error: BaseException) -> str:
    """One word for counters."""
    if isinstance(error, StoreError):
        return error.reason
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, ConnectionRefusedError | FileNotFoundError | socket.gaierror | ValueError):
        return "unreachable"
    return "disconnected"
