"""HTTP/1.1 for large values: one connection, a deadline for each call, a body read into the caller's buffers.

Python's own client has a timeout for each read and none for a call, and takes a body that ends early for a whole one.
An answer is not believed to be well formed: lines, headers and bodies have limits.
"""

import re
import select
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvlab.errors import StoreError
from kvlab.stores.wire import ProtocolError, Wire

JOIN_BYTES = 1 << 14  # smaller pieces of a body are sent with the headers
MOST_HEADER_BYTES = 64 << 10  # of one answer
MOST_HEADERS = 200
MOST_INTERIM = 4  # answers that only say to go on
MOST_BODY = 8 << 20  # of an answer that is no value: a list of 1,000 names has at most 2 MiB
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)( .*)?")
_DIGITS = re.compile(r"\d{1,18}", re.ASCII)
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?")


class CutBodyError(StoreError):
    """The body ended before the length that its answer announced."""

    def __init__(self) -> None:
        super().__init__("the server closed the connection in the middle of a body", reason="truncated")


@dataclass
class Answer:
    """The head of an answer. `length` is its body's, None where it comes in chunks or until the end."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  # by names in lower case
    length: int | None
    chunked: bool
    keeps: bool  # the connection, for another request


class HttpConnection(Wire):
    """One request at a time; its answer's body is read, or the connection is of no use any more."""

    @property
    def is_stale(self) -> bool:
        """Whether the server has hung up, or sent what was not asked for, while the connection was idle."""
        watch = select.poll()
        with suppress(OSError, ValueError):
            watch.register(self._socket, select.POLLIN)
            return bool(self.unread) or bool(watch.poll(0))
        return True

    def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Sequence[memoryview] | None = None,
    ) -> Answer:
        """Send a request and read the head of its answer."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"content-length: {sum(piece.nbytes for piece in body)}")
        small = bytearray("\r\n".join([*lines, "", ""]).encode("latin-1"))
        try:
            for piece in body or ():
                if piece.nbytes <= JOIN_BYTES:
                    small += piece
                    continue
                self.send(small, deadline)
                self.send(piece, deadline)
                small = bytearray()
            self.send(small, deadline)
        except ConnectionError as error:
            return self._early(method, deadline, error)
        return self._head(method, deadline)

    def read_value(self, into: Sequence[memoryview], deadline: float) -> None:
        """The first bytes of a body, as many as `into` holds."""
        try:
            self.fill(into, deadline)
        except ConnectionError:
            raise CutBodyError from None

    def read_text(self, answer: Answer, deadline: float) -> bytes:
        """A body that is no value. One without a length is not read: `answer.keeps` is False then."""
        try:
            if answer.chunked:
                return self._chunks(deadline)
            length = answer.length or 0
            _check_body(length)
            room = bytearray(length)
            self.fill([memoryview(room)], deadline)
        except ConnectionError:
            raise CutBodyError from None
        return bytes(room)

    def _early(self, method: str, deadline: float, error: ConnectionError) -> Answer:
        """A server may answer before it has read a body, and hang up."""
        try:
            answer = self._head(method, deadline)
        except (ConnectionError, ProtocolError):
            raise error from None
        if answer.status < 300:
            raise ProtocolError("the server took a request that it had not read")
        answer.keeps = False
        return answer

    def _head(self, method: str, deadline: float) -> Answer:
        for _ in range(MOST_INTERIM):
            match = _STATUS.fullmatch(self.line(deadline))
            if match is None:
                raise ProtocolError("the server answered something that is no HTTP/1.1")
            status, headers = int(match[2]), self._headers(deadline)
            if status >= 200:
                return _answer(method, status, headers, match[1] == b"1")
        raise ProtocolError("the server goes on without an answer")

    def _headers(self, deadline: float) -> dict[str, str]:
        found: dict[str, str] = {}
        num_bytes = num_lines = 0
        while line := self.line(deadline):
            num_bytes += len(line)
            num_lines += 1
            name, colon, value = line.decode("latin-1").partition(":")
            if num_bytes > MOST_HEADER_BYTES or num_lines > MOST_HEADERS or not colon or name != name.strip():
                raise ProtocolError("the server answered with headers that are malformed, or more than any answer has")
            name, value = name.lower(), value.strip()
            if name in ("content-length", "transfer-encoding") and found.get(name, value) != value:
                raise ProtocolError("the server announced two lengths of one body")
            found[name] = value
        return found

    def _chunks(self, deadline: float) -> bytes:
        body = bytearray()
        while True:
            match = _CHUNK.fullmatch(self.line(deadline))
            if match is None:
                raise ProtocolError("the server sent a chunk without a length")
            length = int(match[1], 16)
            _check_body(len(body) + length)
            if not length:
                self._headers(deadline)  # after the last chunk
                return bytes(body)
            at = len(body)
            body += bytes(length)
            with memoryview(body) as view:
                self.fill([view[at:]], deadline)
            if self.take(2, deadline) != b"\r\n":
                raise ProtocolError("the server sent a chunk longer than it had announced")


def _answer(method: str, status: int, headers: dict[str, str], is_new: bool) -> Answer:
    told, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if (told is not None and (coding is not None or not _DIGITS.fullmatch(told))) or coding not in (None, "chunked"):
        raise ProtocolError("the server announced a body whose length is not to be told")
    length = None if told is None else int(told)
    keeps = is_new and headers.get("connection", "").lower() != "close"
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers, length, chunked=False, keeps=keeps)
    return Answer(status, headers, length, chunked=coding is not None, keeps=keeps and (told or coding) is not None)


def _check_body(length: int) -> None:
    if length > MOST_BODY:
        raise ProtocolError(f"the server announced a body of more than {MOST_BODY} bytes where no value was asked for")
