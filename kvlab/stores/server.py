"""One server on a socket: its connections, its health, and one word for each way it fails."""

import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvlab.errors import StoreError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.pool import Pool
from kvlab.stores.wire import Wire

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Wire)
T = TypeVar("T")


class AnswerError(StoreError):
    """The server answered one request with an error. Its connection is of use, and so may be the server."""


class ServerDownError(StoreError):
    """The server does not answer, answers too late or not to the point, or does not let us in."""


class EnoughError(Exception):
    """Raised by the work of a call: `found` is its result, and the rest of the reply is not wanted."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


class Server(Generic[C]):
    """Calls raise ServerDownError with its reason, at once while the server is left alone."""

    down_error: type[ServerDownError] = ServerDownError

    def __init__(self, name: str, connect: Callable[[float], C], health: CircuitBreaker) -> None:
        self.health = health
        self.last_reason = ""
        self._name = name
        self._pool = Pool(connect)

    def __str__(self) -> str:
        return self._name

    def run(self, work: Callable[[C], T], deadline: float) -> T:
        """`work` on a connection of this server. Connections that died while idle are replaced once."""
        if not self.health.may_ask():
            raise self.down_error(f"{self} is left alone after: {self.last_reason}", reason="left_alone")
        was_idle = False
        while True:
            connection, was_idle = self._take(deadline, new=was_idle)
            try:
                result = work(connection)
            except AnswerError as error:  # the connection is fine, the server may not be
                self._pool.give_back(connection)
                if not self.is_fatal(error):
                    self.health.succeeded()
                    raise
                down = self._down(error)
            except ValueTooLongError:
                self._pool.drop(connection)  # the rest of the value is still on its way
                raise
            except EnoughError as enough:
                self._pool.drop(connection)
                self._is_back()
                found: T = enough.found
                return found
            except ConnectionError as error:
                self._pool.drop(connection)
                if was_idle:
                    self.close_idle()
                    continue
                down = self._down(error)
            except OSError as error:
                self._pool.drop(connection)
                down = self._down(error)
            except BaseException:
                self._pool.drop(connection)
                raise
            else:
                self._pool.give_back(connection)
                self._is_back()
                return result
            raise down

    def close_idle(self) -> None:
        self._pool.close_idle()

    def is_fatal(self, error: AnswerError) -> bool:
        """Whether other requests would fail too."""
        return False

    def reason(self, error: BaseException) -> str:
        return reason_of(error)

    def hide(self, text: str) -> str:
        """`text`, in which a server's words may stand, without secrets."""
        return text

    def _take(self, deadline: float, *, new: bool) -> tuple[C, bool]:
        try:
            return self._pool.take(deadline, new=new)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            down = self._down(error)
        raise down

    def _is_back(self) -> None:
        if self.health.succeeded():
            log.warning("%s is back", self)

    def _down(self, error: BaseException) -> ServerDownError:
        """To be raised where `error` is handled no more. It may show a secret, and is the cause only if it does not."""
        reason, text = self.reason(error), self.hide(str(error))
        self.last_reason = reason
        self.close_idle()
        if self.health.failed():
            log.warning("%s failed (%s): %s", self, reason, text)
        down = self.down_error(f"{self} failed ({reason}): {text}", reason=reason)
        down.__cause__ = error if text == str(error) else None
        return down


def reason_of(error: BaseException) -> str:
    """One word for counters."""
    if isinstance(error, StoreError):
        return error.reason
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLError):  # a peer that dies in a handshake is no fault of certificates
        return "disconnected" if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) else "tls"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, socket.gaierror | ValueError):
        return "unreachable"
    return "disconnected"
