"""Requests to one bucket: its connections and its health."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import quote

from kvlab.errors import ConfigError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.http import Answer, HttpConnection
from kvlab.stores.pool import Pool
from kvlab.stores.s3.answers import OF_REQUESTS, S3Error, error_of
from kvlab.stores.s3.signing import query_of, signed
from kvlab.stores.s3.url import S3Target
from kvlab.stores.server import ServerDownError, reason_of
from kvlab.stores.wire import connected

log = logging.getLogger(__name__)

T = TypeVar("T")
Read = Callable[[HttpConnection, Answer], T]  # of an answer that is no error


class BucketDownError(ServerDownError):
    """The bucket's server does not answer, answers too late or not to the point, or does not let us in."""


class Bucket:
    """Calls raise S3Error where one request failed, and BucketDownError where others would fail too: at once while the
    server is left alone."""

    def __init__(self, target: S3Target, health: CircuitBreaker) -> None:
        self.target = target
        self.health = health
        self.last_reason = ""
        self._pool = Pool(self._connect)

    def __str__(self) -> str:
        return f"bucket {self.target.bucket!r} at {self.target.host_header}"

    def ask(
        self,
        method: str,
        name: str,
        read: Read[T],
        deadline: float,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        body: Sequence[memoryview] | None = None,
    ) -> T:
        """What `read` makes of the answer about the object `name`, or about the bucket where that is empty.

        An idle connection that the server has closed is replaced once.
        """
        if not self.health.may_ask():
            raise BucketDownError(f"{self} is left alone after: {self.last_reason}", reason="left_alone")
        path = quote(f"/{self.target.bucket}" + (f"/{self.target.prefix}{name}" if name else ""), safe="/-_.~")
        options = query_of(query or {})
        try:
            credentials = self.target.credentials.get()
        except ConfigError as error:
            raise self._down("denied", str(error)) from None
        sent = {"host": self.target.host_header, **(headers or {})}
        sent = signed(method, path, options, sent, credentials, self.target.region)
        where = f"{path}?{options}" if options else path
        was_idle = False
        while True:
            connection, was_idle = self._take(deadline, new=was_idle)
            try:
                answer = connection.ask(method, where, sent, deadline, body)
                result = self._read(connection, method, answer, read, deadline)
            except S3Error as error:
                if error.reason in OF_REQUESTS:
                    self.health.succeeded()
                    raise
                if error.reason == "denied":  # they may have been replaced
                    self.target.credentials.forget()
                raise self._down(error.reason, str(error)) from None
            except ValueTooLongError:
                self._pool.drop(connection)  # the value is still on its way
                raise
            except ConnectionError as error:
                self._pool.drop(connection)
                if was_idle:
                    self._pool.close_idle()
                    continue
                raise self._down(reason_of(error), str(error)) from None
            except OSError as error:
                self._pool.drop(connection)
                raise self._down(reason_of(error), str(error)) from None
            except BaseException:
                self._pool.drop(connection)
                raise
            if self.health.succeeded():
                log.warning("%s is back", self)
            return result

    def renew(self) -> None:
        self._pool.close_idle()

    def _read(self, connection: HttpConnection, method: str, answer: Answer, read: Read[T], deadline: float) -> T:
        """Give the connection back when its answer is read, or drop it where more may come."""
        try:
            if answer.status >= 300:
                raise error_of(answer.status, self._error_text(connection, method, answer, deadline))
            result = read(connection, answer)
        except S3Error:
            self._done(connection, answer)
            raise
        self._done(connection, answer)
        return result

    def _error_text(self, connection: HttpConnection, method: str, answer: Answer, deadline: float) -> bytes:
        if method == "HEAD" or (answer.length is None and not answer.chunked):
            return b""
        return connection.read_text(answer, deadline)

    def _done(self, connection: HttpConnection, answer: Answer) -> None:
        if answer.keeps and not connection.unread:
            self._pool.give_back(connection)
        else:
            self._pool.drop(connection)

    def _take(self, deadline: float, *, new: bool) -> tuple[HttpConnection, bool]:
        try:
            while True:
                connection, was_idle = self._pool.take(deadline, new=new)
                if not was_idle or not connection.is_stale:
                    return connection, was_idle
                self._pool.drop(connection)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            raise self._down(reason_of(error), str(error)) from None

    def _connect(self, deadline: float) -> HttpConnection:
        return HttpConnection(connected((self.target.host, self.target.port), self.target.tls, deadline))

    def _down(self, reason: str, text: str) -> BucketDownError:
        self.last_reason = reason
        self._pool.close_idle()
        if self.health.failed():
            log.warning("%s failed (%s): %s", self, reason, text)
        return BucketDownError(f"{self} failed ({reason}): {text}", reason=reason)
