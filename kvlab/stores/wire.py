"""A connection to a server that may be slow, silent or hostile: a deadline for each call, bytes read into the caller's
buffers, lines of bounded length.

Without TLS the kernel keeps the deadline and moves a whole value in one call. With Python's own timeouts a value takes
many calls, and beside a busy engine a thread waits up to 5 ms for the interpreter after each: 14 MiB then took 14 ms
instead of 8.
"""

import socket
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kvlab.errors import StoreError
from kvlab.stores.lookup import addresses_of, time_left

CHUNK = 1 << 16


class ProtocolError(StoreError):
    """The server answered something that is no reply to what it was asked. The connection is of no use any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="protocol")


class Wire:
    """A connected socket. Used by one thread at a time.

    A fault in the middle of a call (deadline, lost peer, malformed reply) leaves it unusable: `close` it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._kernel_waits = not isinstance(sock, ssl.SSLSocket)
        if self._kernel_waits:
            sock.settimeout(None)
        self._buffer = bytearray(CHUNK)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @property
    def unread(self) -> int:
        """Bytes that the server has sent and that are read from the socket, but not by the caller."""
        return self._end - self._start

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also where a forked child has inherited the socket
        self.drop()

    def drop(self) -> None:
        """Close this process's descriptor and say nothing to the server: in a child the connection is the parent's."""
        with suppress(OSError):
            self._socket.close()

    def send(self, data: bytes | bytearray | memoryview, deadline: float) -> None:
        view, at = memoryview(data), 0
        while at < len(view):  # not `sendall`: it would restart the kernel's timeout after each part
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                at += self._socket.send(view[at:])
            except BlockingIOError:
                raise TimeoutError("the deadline passed") from None

    def fill(self, into: Sequence[memoryview], deadline: float) -> None:
        """The next bytes, as many as these buffers hold, one after the other."""
        for piece in into:
            at = min(piece.nbytes, self.unread)
            piece[:at] = self._view[self._start : self._start + at]
            self._start += at
            while at < piece.nbytes:
                at += self._receive(piece[at:], deadline, whole=True)

    def take(self, num_bytes: int, deadline: float) -> bytes:
        """The next few bytes."""
        while self.unread < num_bytes:
            self._fill(deadline)
        self._start += num_bytes
        return bytes(self._view[self._start - num_bytes : self._start])

    def line(self, deadline: float, end: bytes = b"\r\n") -> bytes:
        while (at := self._buffer.find(end, self._start, self._end)) < 0:
            self._fill(deadline)
        line = bytes(self._view[self._start : at])
        self._start = at + len(end)
        return line

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
        left = time_left(deadline)
        if self._kernel_waits:
            time_value = divmod(int(left * 1e6) + 1, 1_000_000)  # zero would be for ever
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *time_value))
        else:
            self._socket.settimeout(left)

    def _fill(self, deadline: float) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == CHUNK:
            if self._start == 0:
                raise ProtocolError("the server answered a line without end")
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        self._end += self._receive(self._view[self._end :], deadline, whole=False)


def connected(address: tuple[str, int] | str, tls: ssl.SSLContext | None, deadline: float) -> socket.socket:
    """A socket to this host and port, or to a path, through TLS where a context is given."""
    sock = _reach(address, deadline)
    if tls is None or isinstance(address, str):
        return sock
    try:
        sock.settimeout(time_left(deadline))  # of the whole handshake
        return tls.wrap_socket(sock, server_hostname=address[0])
    except BaseException:
        sock.close()
        raise


def _reach(address: tuple[str, int] | str, deadline: float) -> socket.socket:
    if isinstance(address, str):
        places: list[tuple[int, Any]] = [(socket.AF_UNIX, address)]
    else:
        places = addresses_of(*address, deadline)
    refused: OSError = ConnectionRefusedError(f"no address of {address}")
    for tried, (family, place) in enumerate(places):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(time_left(deadline) / (len(places) - tried))  # one that is silent leaves time for the next
            sock.connect(place)
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            refused = error
    raise refused
