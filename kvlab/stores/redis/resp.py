"""Redis' protocol for large values: one connection, a deadline per call, replies read into the caller's buffer.

Client libraries join a value with its command before sending and collect a reply in pieces before joining them, which
copies 14 MiB three times. benchmarks/stores.py shows both ways side by side.

A reply is believed to be neither well formed nor of the kind that was asked for: numbers, nesting, items and bytes have
limits, and each command's reply is checked (`ok`, `number`, `bulk`, `array`) before the connection is used again.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from kvlab.stores.base import ValueTooLongError
from kvlab.stores.server import AnswerError
from kvlab.stores.url import Secret
from kvlab.stores.wire import ProtocolError, Wire

Reply: TypeAlias = Any  # int, Status, memoryview (a bulk string), None, a list of those, or a ReplyError among them
BufferFactory: TypeAlias = Callable[[int], Sequence[memoryview]]
T = TypeVar("T")

JOIN_BYTES = 1 << 14  # smaller arguments are sent together
MOST_DEPTH = 8  # of arrays in arrays; CLUSTER SLOTS has 4
MOST_ITEMS = 1 << 19  # of a reply; a cluster whose slots all lie apart has 330,000
MOST_BYTES = 16 << 20  # of a reply's strings, values aside
MOST_TEXT = 200  # of an error reply is kept
MOST_DIGITS = 20  # of a number
# The first words of error replies that are counted as they are. A server may answer anything; counters are few.
_REASONS = {
    *("ask", "busy", "clusterdown", "crossslot", "err", "loading", "masterdown", "misconf", "moved", "noauth"),
    *("noperm", "noreplicas", "noscript", "oom", "readonly", "tryagain", "wrongpass", "wrongtype", "unkillable"),
}
LONGEST_VALUE = 512 << 20  # of a Redis with its own settings


class ReplyError(AnswerError):
    """The server answered with an error; its first word (OOM, MOVED, WRONGTYPE...) is the `reason` if Redis has it.
    `target` is where a redirection leads to: as the server may name anything, not to be shown."""

    def __init__(self, message: str, target: str = "") -> None:
        word = message.split(" ", 1)[0].lower()
        super().__init__(message or "an error without words", reason=word if word in _REASONS else "refused")
        self.target = Secret(target)


class Status(bytes):
    """A simple string, which no value is."""


class RespConnection(Wire):
    """`hidden` are secrets, which are starred out of error replies: servers repeat the commands they refuse."""

    def __init__(self, sock: socket.socket, hidden: Sequence[str] = ()) -> None:
        super().__init__(sock)
        self._hidden = [secret.encode() for secret in hidden]
        self._items = self._bytes = 0

    def call(self, args: Sequence[Any], deadline: float) -> Reply:
        """Send one command and read its reply; an error reply is raised."""
        reply = self.calls([args], deadline)[0]
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def calls(self, commands: Sequence[Sequence[Any]], deadline: float) -> list[Reply]:
        """Send all commands in one go and read their replies, error replies in their places."""
        self._send(commands, deadline)
        self._items = self._bytes = 0  # of all replies together: they are kept until the last one is here
        replies = [self._reply(deadline, 0) for _ in commands]
        self._check_end()
        return replies

    def fetch(
        self, args: Sequence[Any], deadline: float, room: BufferFactory, most: int
    ) -> Sequence[memoryview] | None:
        """Send a command whose reply is a value of at most `most` bytes: `room(size)` gives buffers for it, which fill
        one after the other. None if there is none; an error reply is raised."""
        self._send([args], deadline)
        line = self.line(deadline)
        if line[:1] == b"-":
            self._check_end()
            raise self._error(line[1:])
        if line[:1] != b"$":
            raise ProtocolError(f"the server answered {_shown(line)} where a value was asked for")
        size = self._length(line)
        if size < 0:
            self._check_end()
            return None
        if size > max(most, LONGEST_VALUE):
            raise ProtocolError(f"the server announced a value of {size} bytes, longer than any can be")
        if size > most:
            raise ValueTooLongError(f"the server announced a value of {size} bytes; the limit is {most}")
        into = room(size)
        self._string(into, deadline)
        self._check_end()
        return into

    def _send(self, commands: Sequence[Sequence[Any]], deadline: float) -> None:
        small = bytearray()
        for args in commands:
            small += b"*%d\r\n" % len(args)
            for arg in args:
                pieces = arg if isinstance(arg, list) else [arg.encode() if isinstance(arg, str) else arg]
                small += b"$%d\r\n" % sum(len(piece) for piece in pieces)
                for piece in pieces:
                    if len(piece) <= JOIN_BYTES:
                        small += piece
                        continue
                    self.send(small, deadline)
                    self.send(piece, deadline)
                    small = bytearray()
                small += b"\r\n"
        self.send(small, deadline)

    def _reply(self, deadline: float, depth: int) -> Reply:
        line = self.line(deadline)
        kind = line[:1]
        self._items += 1
        if self._items > MOST_ITEMS or depth > MOST_DEPTH:
            raise ProtocolError("the server answered with more items, or deeper ones, than any reply has")
        if kind == b":":
            return self._number(line[1:])
        if kind == b"-":
            return self._error(line[1:])
        if kind == b"+":
            return Status(line[1:])
        if kind == b"*":
            length = self._length(line)
            return None if length < 0 else [self._reply(deadline, depth + 1) for _ in range(length)]
        if kind != b"$":
            raise ProtocolError(f"the server answered {_shown(line)}, which is no Redis protocol")
        length = self._length(line)
        if length < 0:
            return None
        self._bytes += length
        if self._bytes > MOST_BYTES:
            raise ProtocolError(f"the server answered with more than {MOST_BYTES} bytes where no value was asked for")
        into = memoryview(bytearray(length))
        self._string([into], deadline)
        return into

    def _number(self, digits: bytes) -> int:
        if len(digits) > MOST_DIGITS or not (digits.isdigit() or (digits[:1] == b"-" and digits[1:].isdigit())):
            raise ProtocolError(f"the server answered {_shown(digits)}, which is no number")
        return int(digits)

    def _length(self, line: bytes) -> int:
        length = self._number(line[1:])
        if length < -1:
            raise ProtocolError(f"the server answered {_shown(line)}, which is no length")
        return length

    def _error(self, raw: bytes) -> ReplyError:
        words = raw.decode(errors="replace").split(" ", 3) if raw.startswith((b"MOVED ", b"ASK ")) else []
        target = words[2] if len(words) > 2 else ""
        for secret in self._hidden:
            raw = raw.replace(secret, b"***")
        text = raw[:MOST_TEXT].decode(errors="replace")
        return ReplyError("".join(char if char.isprintable() else "?" for char in text), target)

    def _check_end(self) -> None:
        if self.unread:
            raise ProtocolError("the server sent more than it was asked for")

    def _string(self, into: Sequence[memoryview], deadline: float) -> None:
        """A string's bytes, and the mark that ends it."""
        self.fill(into, deadline)
        if self.take(2, deadline) != b"\r\n":
            raise ProtocolError("the server sent a string longer than it had announced")


def send_command(args: Sequence[Any], deadline: float, parse: Callable[[Reply], T]) -> Callable[[RespConnection], T]:
    """A single command, for the code that picks the connection; `parse` raises ProtocolError on a malformed reply."""
    return lambda connection: parse(connection.call(args, deadline))


def send_pipeline(
    commands: Sequence[Sequence[Any]], deadline: float, parse: Callable[[Reply], T], leave: frozenset[str]
) -> Callable[[RespConnection], list[T | ReplyError]]:
    """The work of several commands in one round trip. Error replies for the reasons `leave` stay in their places, any
    other is raised."""

    def work(connection: RespConnection) -> list[T | ReplyError]:
        replies = connection.calls(commands, deadline)
        found: list[T | ReplyError] = [reply if isinstance(reply, ReplyError) else parse(reply) for reply in replies]
        for reply in found:
            if isinstance(reply, ReplyError) and reply.reason not in leave:
                raise reply
        return found

    return work


def ok(reply: Reply) -> None:
    if not isinstance(reply, Status) or reply != b"OK":
        raise ProtocolError(f"the server answered {_shown(reply)} where OK was due")


def number(reply: Reply, most: int = 1 << 62) -> int:
    if not isinstance(reply, int) or not 0 <= reply <= most:
        raise ProtocolError(f"the server answered {_shown(reply)} where a number from 0 to {most} was due")
    return reply


def flag(reply: Reply) -> bool:
    return number(reply, 1) == 1


def bulk(reply: Reply) -> bytes:
    if not isinstance(reply, memoryview):
        raise ProtocolError(f"the server answered {_shown(reply)} where a string was due")
    return bytes(reply)


def text(reply: Reply) -> str:
    try:
        return bulk(reply).decode()
    except UnicodeDecodeError:
        raise ProtocolError("the server answered with bytes that are no text") from None


def array(reply: Reply, at_least: int = 0) -> list[Reply]:
    if not isinstance(reply, list) or len(reply) < at_least:
        raise ProtocolError(f"the server answered {_shown(reply)} where a list of {at_least} or more was due")
    return reply


def _shown(reply: Reply) -> str:
    """A lie by its kind and length: a server may repeat a password in it."""
    if isinstance(reply, list):
        return f"a list of {len(reply)}"
    if isinstance(reply, memoryview | bytes):
        return f"a string of {len(reply)} bytes"
    return "nothing" if reply is None else f"a {type(reply).__name__}"
