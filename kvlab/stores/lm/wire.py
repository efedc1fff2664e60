"""The protocol of LMCache's cache server: requests and replies with a head of fixed length.

A PUT has no reply, a GET's reply is a head and the value, the reply to EXIST is a head. Nothing tells which request a
reply is of, and the server ends a connection whose request it cannot read.
"""

import hashlib
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvlab.stores.wire import ProtocolError, Wire

PUT, GET, EXIST = 1, 2, 3
_OK, _FAIL = 200, 400
_BINARY, _UINT8 = 4, 6  # LMCache's format for plain bytes, which keeps a shape as it is, and its type
_REQUEST = struct.Struct("<9i150s")  # command, length, format, type, location, shape of 4, key
_REPLY = struct.Struct("<9i")  # code, length, format, type, shape of 4, location
_REMOVED = 7  # last of the shape where a value was removed; of a value it is 0
MOST_BYTES = (1 << 31) - 1  # lengths are signed


@dataclass(frozen=True)
class Head:
    """What a reply to GET announces. `removed`: nothing of a value is left."""

    size: int
    removed: bool


def name_of(prefix: str, key: str, *, of_removed: bool = False) -> bytes:
    """What a key is called on the server, which takes names of its own form alone and reads a number in them. The
    second name of a key, with `of_removed`, exists once the key was ever removed: EXIST cannot tell."""
    raw = f"{prefix}\0{key}".encode("utf-8", "surrogatepass")
    return f"kvlab{'.removed' if of_removed else ''}@1@0@{hashlib.sha256(raw).hexdigest()}@uint8".encode()


class LMConnection(Wire):
    """A request in the middle of another's reply leaves it unusable."""

    def put(self, name: bytes, pieces: Sequence[memoryview], deadline: float, *, removed: bool = False) -> None:
        """The server says nothing to it. Ask `exist` behind it: it has then taken the value."""
        size = sum(piece.nbytes for piece in pieces)
        self.send(_request(PUT, name, size, _REMOVED if removed else 0), deadline)
        for piece in pieces:
            if piece.nbytes:
                self.send(piece, deadline)

    def exist(self, names: Sequence[bytes], deadline: float) -> list[bool]:
        self.send(b"".join(_request(EXIST, name) for name in names), deadline)
        found: list[Head | None] = []
        for _ in names:
            if found and self.unread < _REPLY.size:
                self._acknowledge()
            found.append(self._reply(deadline))
        self.check_end()
        if any(head is not None and head.size for head in found):
            raise ProtocolError("the server announced a value where none was asked for")
        return [head is not None for head in found]

    def ask(self, name: bytes, deadline: float) -> Head | None:
        """The head of the reply to GET; as many bytes of value as it says are to be read next, by `read`."""
        self.send(_request(GET, name), deadline)
        head = self._reply(deadline)
        if head is None:
            self.check_end()
        else:
            self._acknowledge()
        return head

    def read(self, into: Sequence[memoryview], deadline: float) -> None:
        """The value, or its first bytes: then the connection is of no further use."""
        self.fill(into, deadline)

    def check_end(self) -> None:
        if self.unread:
            raise ProtocolError("the server sent more than it was asked for")

    def _acknowledge(self) -> None:
        """The server sends a head and its value apart, and each head alone. The next part waits until the last one is
        acknowledged, which takes 40 ms unless it is done now."""
        if hasattr(socket, "TCP_QUICKACK"):
            with suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _reply(self, deadline: float) -> Head | None:
        code, size, kind, _, *shape, _ = _REPLY.unpack(self.take(_REPLY.size, deadline))
        if code == _FAIL:
            return None
        if code != _OK or size < 0:
            raise ProtocolError("the server answered something that is no reply of LMCache's server")
        return Head(size, removed=kind == _BINARY and not size and shape[3] == _REMOVED)


def _request(command: int, name: bytes, size: int = 0, last: int = 0) -> bytes:
    return _REQUEST.pack(command, size, _BINARY, _UINT8, 0, size, 0, 0, last, name.ljust(150))
