"""memcached's meta protocol: one line a request, one line a reply, a value behind it.

A server may answer anything: lines, numbers and values have limits, and its words are not repeated in messages.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvlab.errors import StoreError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.server import AnswerError
from kvlab.stores.url import Secret
from kvlab.stores.wire import ProtocolError, Wire

JOIN_BYTES = 1 << 14  # smaller pieces of a value are sent with its request
MOST_ITEM = 1 << 30  # a server takes no longer items, whatever its settings
MOST_STATS = 1000  # lines
_NUMBER = re.compile(rb"\d{1,20}")
_REFUSALS = (  # how the server's words begin, and one word for counters
    (b"SERVER_ERROR object too large", "too_large"),
    (b"SERVER_ERROR out of memory", "full"),  # before a value is read
    (b"SERVER_ERROR Out of memory", "full"),  # and in the middle
    (b"CLIENT_ERROR unauthenticated", "auth"),
    (b"CLIENT_ERROR authentication failure", "auth"),
    (b"SERVER_ERROR", "server_error"),
    (b"CLIENT_ERROR", "bad_request"),
    (b"ERROR", "unknown_command"),  # as a server older than 1.6 knows no meta protocol
    (b"BUSY", "busy"),
)


@dataclass(frozen=True)
class Item:
    """What a reply tells of an item: bytes, the client's own number, the version."""

    size: int
    flags: int
    version: int


class MemcachedConnection(Wire):
    """A fault in the middle of a reply leaves it unusable."""

    def log_in(self, user: str, password: Secret, deadline: float) -> None:
        """The first request of a server that was started with `-Y`."""
        token = f"{user} {password.reveal()}".encode()
        self.send(b"set login 0 0 %d\r\n%s\r\n" % (len(token), token), deadline)
        if self.line(deadline) != b"STORED":
            raise StoreError("the server refused the user or password", reason="auth")

    def store(self, name: bytes, pieces: Sequence[memoryview], flags: int, ttl_s: int, deadline: float) -> None:
        size = sum(piece.nbytes for piece in pieces)
        small = bytearray(b"ms %s %d T%d F%d\r\n" % (name, size, ttl_s, flags))
        for piece in pieces:
            if piece.nbytes <= JOIN_BYTES:
                small += piece
                continue
            self.send(small, deadline)
            self.send(piece, deadline)
            small = bytearray()
        self.send(small + b"\r\n", deadline)
        if self._line(deadline) != b"HD":
            raise ProtocolError("the server answered something else where a value was stored")
        self.check_end()

    def look(self, names: Sequence[bytes], deadline: float) -> list[Item | None]:
        """What is there of these, in one round trip."""
        self.send(b"".join(b"mg %s s f c\r\n" % name for name in names), deadline)
        found = [self._item(self._line(deadline), b"HD") for _ in names]
        self.check_end()
        return found

    def fetch(self, name: bytes, room: Callable[[Item], Sequence[memoryview]], deadline: float) -> Item | None:
        """The value goes into what `room` gives for it: all of it, or its first bytes, behind which the connection is
        of no use. None if there is none."""
        self.send(b"mg %s s f c v\r\n" % name, deadline)
        item = self._item(self._line(deadline), b"VA")
        if item is None:
            self.check_end()
            return None
        into = room(item)
        self.fill(into, deadline)
        if sum(piece.nbytes for piece in into) == item.size:
            if self.take(2, deadline) != b"\r\n":
                raise ProtocolError("the server sent a value longer than it had announced")
            self.check_end()
        return item

    def remove(self, name: bytes, version: int, deadline: float) -> bool:
        """With a version other than 0 only that of the item."""
        self.send(b"md %s%s\r\n" % (name, b" C%d" % version if version else b""), deadline)
        line = self._line(deadline)
        self.check_end()
        if line not in (b"HD", b"NF", b"EX"):
            raise ProtocolError("the server answered something else where an item was removed")
        return line == b"HD"

    def stats(self, deadline: float) -> dict[bytes, int]:
        """Those that are numbers."""
        self.send(b"stats\r\n", deadline)
        found: dict[bytes, int] = {}
        for _ in range(MOST_STATS):
            line = self._line(deadline)
            if line == b"END":
                self.check_end()
                return found
            words = line.split(b" ")
            if words[0] != b"STAT":
                break
            if len(words) == 3 and _NUMBER.fullmatch(words[2]):
                found[words[1]] = int(words[2])
        raise ProtocolError("the server answered something else where its numbers were due")

    def listed(self, deadline: float) -> Iterator[bytes]:
        """The names of all items, as the server writes them. The connection is of use once all are read."""
        # Not by its queues: what moves from one to another meanwhile would be left out.
        self.send(b"lru_crawler metadump hash\r\n", deadline)
        while (line := self._line(deadline, b"\n").rstrip(b"\r")) != b"END":  # the server ends only this line by both
            name, mark, _ = line.partition(b" ")
            if not name.startswith(b"key=") or not mark:
                raise ProtocolError("the server answered something else where names were due")
            yield name.removeprefix(b"key=")
        self.check_end()

    def check_end(self) -> None:
        if self.unread:
            raise ProtocolError("the server sent more than it was asked for")

    def _line(self, deadline: float, end: bytes = b"\r\n") -> bytes:
        line = self.line(deadline, end)
        for words, reason in _REFUSALS:
            if line.startswith(words):
                raise AnswerError(f"the server refused a request ({reason})", reason=reason)
        return line

    def _item(self, line: bytes, wanted: bytes) -> Item | None:
        """None for a miss."""
        if line == b"EN":
            return None
        word, *told = line.split(b" ")
        if wanted == b"VA" and word == b"VA" and told:
            length = told.pop(0)
        else:
            length = next((text[1:] for text in told if text.startswith(b"s")), b"")
        numbers = {text[:1]: text[1:] for text in told}
        flags, version = numbers.get(b"f", b""), numbers.get(b"c", b"")
        if word != wanted or not all(_NUMBER.fullmatch(text) for text in (length, flags, version)):
            raise ProtocolError("the server answered something else where an item was asked for")
        if int(length) > MOST_ITEM:
            raise ValueTooLongError("the server announced an item longer than any can be")
        return Item(int(length), int(flags), int(version))
