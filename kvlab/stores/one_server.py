"""What stores at one address share: a limit on values, questions in batches, the options of their URLs."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kvlab.errors import StoreError
from kvlab.stores.base import Buffer, Value, ValueTooLongError, buffers, fits_key
from kvlab.stores.remote import ObjectStore
from kvlab.stores.server import AnswerError, Server
from kvlab.stores.shown import call_of
from kvlab.stores.url import StoreURL


class OneServerStore(ObjectStore):
    """Asks `_server`, which a subclass makes. Values over `limit` bytes are refused before anything is sent, and not
    read either."""

    batch = 1024  # keys asked for at once, by one deadline
    refusals: frozenset[str] = frozenset()  # answers to a put that are no failures
    _server: Server[Any]

    def __init__(self, name: str, host: str, port: int, prefix: str, *, timeout_s: float, limit: int) -> None:
        super().__init__(name, timeout_s)
        self._place = (host, port, *([prefix] if prefix else []))
        self._limit = limit
        self._known: dict[str, int] = {}

    @staticmethod
    def common_arguments(url: StoreURL, default_port: int, *, timeout_ms: int) -> dict[str, Any]:
        """Those of a URL that all such stores take."""
        host, port = url.take_place(default_port)
        return {
            "host": host,
            "port": port,
            "prefix": url.path.strip("/"),
            "timeout_s": url.take_ms("timeout_ms", str(timeout_ms)),
            "limit": url.take_bytes("limit", "512MiB"),
            "first_wait_s": url.take_ms("retry_ms", "250"),
            "longest_wait_s": url.take_ms("longest_retry_ms", "10000"),
        }

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        if not fits_key(key):
            return None
        with self._counting():
            return self._head(key, num_bytes, self._deadline())

    def contains(self, key: str) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """One round trip for each `batch` of keys, each with a deadline of its own."""
        found: dict[str, bool] = {}
        asked = [key for key in keys if fits_key(key)]
        for at in range(0, len(asked), self.batch):
            some = asked[at : at + self.batch]
            with self._counting():
                found |= zip(some, self._exist(some, self._deadline()), strict=True)
        return [found.get(key, False) for key in keys]

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        """The server's budget, as last heard."""
        if not self._known:
            self._ask_totals()
        return self._known.get("max_bytes", 0)

    @property
    def used_bytes(self) -> int:
        """Of all values at the server, other programs' too. The last known number if it does not answer."""
        self._ask_totals()
        return self._known.get("used_bytes", 0)

    def renew(self) -> None:
        """A connection that is out of step gives other keys' values for ever."""
        self._server.close_idle()

    def close(self) -> None:
        self._server.close_idle()

    @abstractmethod
    def _send(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> None:
        """Put a value that is within the limit."""

    @abstractmethod
    def _head(self, key: str, num_bytes: int, deadline: float) -> bytes | None:
        """The first bytes of a value."""

    @abstractmethod
    def _exist(self, keys: Sequence[str], deadline: float) -> list[bool]:
        """For each of these keys, all of which fit, whether the server has a value."""

    def _totals(self, deadline: float) -> dict[str, int]:
        """`max_bytes` and `used_bytes` of the server."""
        return {}

    def _as_call(self) -> str:
        return call_of(self, *self._place)

    def _is_up(self) -> bool:
        return self._server.health.is_up

    def _write(self, key: str, pieces: Sequence[memoryview], size: int, deadline: float) -> str:
        if size > self._limit:
            return "too_large"
        try:
            self._send(key, pieces, size, deadline)
        except AnswerError as error:
            if error.reason in self.refusals:
                return error.reason
            raise
        return ""

    def _still_is(self, key: str, found: Value, deadline: float) -> bool:
        """Whether the value is `found`, or begins with it."""
        wanted = b"".join(buffers(found))
        return self._head(key, max(len(wanted), 8), deadline) == wanted

    def _check_limit(self, size: int) -> None:
        if size > self._limit:
            raise ValueTooLongError(f"the server announced a value of {size} bytes; the limit is {self._limit}")

    def _ask_totals(self) -> None:
        with suppress(StoreError), self._counting():
            self._known = self._totals(self._deadline())
