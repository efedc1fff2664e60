"""Redis' protocol for large values: one connection, a deadline per call, replies read into the caller's buffer.

redis-py makes the connection (TCP, unix, TLS, authentication) and is then stepped around: it joins a value with its
command before sending and collects a reply in pieces before joining them, which copies 14 MiB three times.
benchmarks/stores.py shows both ways side by side.

Without TLS the kernel keeps the deadline and moves a whole value in one call. With Python's own timeouts a value takes
many calls, and beside a busy engine a thread waits up to 5 ms for the interpreter after each: 14 MiB then took 14 ms
instead of 8.
"""

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from redis.connection import AbstractConnection

from kvlab.errors import StoreError

Reply: TypeAlias = Any  # int, bytes, None, a list of those, or a ReplyError among them
Room: TypeAlias = Callable[[int], Sequence[memoryview]]

CHUNK = 1 << 16
MAX_BULK = 1 << 40  # a reply that claims more is broken; nothing is allocated for it
JOIN_BYTES = 1 << 14  # smaller arguments are sent together


class ReplyError(StoreError):
    """The server answered with an error; the first word (OOM, MOVED, WRONGTYPE...) is its `reason`."""

    def __init__(self, text: str) -> None:
        super().__init__(text, reason=text.split(" ", 1)[0].lower())
        self.text = text


class Wire:
    """A connected, authenticated redis-py connection, spoken to directly. Used by one thread at a time.

    Whatever goes wrong in the middle of a call (deadline, lost peer, odd reply) leaves it unusable: `close` it.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._socket: socket.socket = vars(connection)["_sock"]  # redis-py keeps it to itself
        self._kernel_waits = not isinstance(self._socket, ssl.SSLSocket)
        if self._kernel_waits:
            self._socket.settimeout(None)
        self._buffer = bytearray(CHUNK)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.used = False  # whether it has answered before: a dead peer is only found out by the next call

    def call(self, args: Sequence[Any], deadline: float, room: Room | None = None) -> Reply:
        """Send one command and read its reply; an error reply is raised. `room(size)` gives buffers for the reply's
        bulk string, which fill one after the other; without it one is made."""
        reply = self.calls([args], deadline, room)[0]
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def calls(self, commands: Sequence[Sequence[Any]], deadline: float, room: Room | None = None) -> list[Reply]:
        """Send all commands in one go and read their replies, error replies in their places."""
        self._send(commands, deadline)
        replies = [self._reply(deadline, room) for _ in commands]
        self.used = True
        return replies

    def close(self) -> None:
        self._connection.disconnect()

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
                    self._sendall(small, deadline)
                    self._sendall(piece, deadline)
                    small = bytearray()
                small += b"\r\n"
        self._sendall(small, deadline)

    def _sendall(self, data: bytes | bytearray | memoryview, deadline: float) -> None:
        view, at = memoryview(data), 0
        while at < len(view):  # not `sendall`: it would start the kernel's clock anew whenever a part was taken
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                at += self._socket.send(view[at:])
            except BlockingIOError:
                raise TimeoutError("the deadline passed") from None

    def _receive(self, into: memoryview, deadline: float, *, whole: bool) -> int:
        """Some bytes, or with `whole` as many as `into` holds if the deadline allows; at least one."""
        self._limit(socket.SO_RCVTIMEO, deadline)
        flags = socket.MSG_WAITALL if whole and self._kernel_waits else 0
        try:
            got = self._socket.recv_into(into, 0, flags)
        except BlockingIOError:
            raise TimeoutError("the deadline passed") from None
        if not got:
            raise ConnectionError("the server closed the connection")
        return got

    def _limit(self, option: int, deadline: float) -> None:
        """The next call to the socket ends at `deadline`."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline passed")
        if self._kernel_waits:
            seconds, rest = divmod(left, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1e6) + 1))
        else:
            self._socket.settimeout(left)

    def _reply(self, deadline: float, room: Room | None = None) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))
        if kind == b"+":
            return rest
        try:
            number = int(rest)
        except ValueError:
            number, kind = 0, b""
        if kind == b":":
            return number
        if kind == b"$" and -1 <= number <= MAX_BULK:
            return None if number < 0 else self._bulk(number, deadline, room)
        if kind == b"*" and -1 <= number <= MAX_BULK:
            return None if number < 0 else [self._reply(deadline, room) for _ in range(number)]
        raise StoreError(f"the server answered {line[:40]!r}, which is no Redis protocol", reason="protocol")

    def _bulk(self, size: int, deadline: float, room: Room | None) -> Sequence[memoryview] | memoryview:
        into = [memoryview(bytearray(size))] if room is None else room(size)
        for piece in into:
            at = min(piece.nbytes, self._end - self._start)
            piece[:at] = self._view[self._start : self._start + at]
            self._start += at
            while at < piece.nbytes:
                at += self._receive(piece[at:], deadline, whole=True)
        while self._end - self._start < 2:
            self._fill(deadline)
        self._start += 2
        return into[0] if room is None else into

    def _line(self, deadline: float) -> bytes:
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            self._fill(deadline)
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    def _fill(self, deadline: float) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == CHUNK:
            if self._start == 0:
                raise StoreError("the server answered a line without end", reason="protocol")
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        self._end += self._receive(self._view[self._end :], deadline, whole=False)


def one(args: Sequence[Any], deadline: float, room: Room | None = None) -> Callable[[Wire], Reply]:
    """The work of a single command, for whoever picks the connection."""
    return lambda wire: wire.call(args, deadline, room)


def many(commands: Sequence[Sequence[Any]], deadline: float) -> Callable[[Wire], list[Reply]]:
    """The work of several commands in one round trip."""
    return lambda wire: wire.calls(commands, deadline)
