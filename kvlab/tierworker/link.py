"""Messages over a stream socket: ``<u32 length of JSON><u32 length of bytes>``, the JSON object, the bytes.

A message may carry one file descriptor. Lengths are checked before anything is kept for them.
"""

import json
import os
import select
import socket
import struct
import threading
from collections import deque
from typing import Any, TypeAlias

from kvlab.container import parse_json
from kvlab.errors import KVLabError

_LENGTHS = struct.Struct("<II")
MAX_JSON = 1 << 20
MAX_BYTES = 8 << 20  # hashes of a prompt of 8 million tokens
MAX_FDS = 4  # that have come and belong to no message yet
RECEIVED_AT_ONCE = 1 << 18
PIECES_AT_ONCE = 4
Message: TypeAlias = dict[str, Any]


class LinkError(KVLabError):
    """The peer is gone, or sent what is no message."""


class Link:
    """One end. `send` never waits: what the socket does not take is kept for `flush`. Safe for several senders, and one
    receiver."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.queued_bytes = 0
        self._queue: deque[tuple[memoryview, int]] = deque()  # what is to be sent, and a descriptor with it or -1
        self._lock = threading.Lock()
        self._is_closed = False
        self._received = bytearray()
        self._fds: list[int] = []

    def send(self, message: Message, data: bytes = b"", *, fd: int = -1) -> None:
        """Raises LinkError where the peer is gone. `fd` is to stay open until it is sent."""
        text = json.dumps(message, separators=(",", ":")).encode()
        if len(text) > MAX_JSON or len(data) > MAX_BYTES:
            raise LinkError(f"a message of {len(text)} and {len(data)} bytes is too long")
        frame = memoryview(b"".join((_LENGTHS.pack(len(text), len(data)), text, data)))
        with self._lock:
            if self._is_closed:  # another may have its descriptor's number by now
                raise LinkError("the link is closed")
            self._queue.append((frame, fd))
            self.queued_bytes += frame.nbytes
            self._flush()

    def flush(self) -> bool:
        """Send what is queued; whether nothing is left."""
        with self._lock:
            self._flush()
            return not self._queue

    def _flush(self) -> None:
        while self._queue:
            frame, fd = self._queue[0]
            try:
                sent = socket.send_fds(self.socket, [frame], [fd]) if fd >= 0 else self.socket.send(frame)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkError(f"the peer is gone: {error.strerror}") from error
            self.queued_bytes -= sent
            if sent == frame.nbytes:
                self._queue.popleft()
            else:
                self._queue[0] = (frame[sent:], -1)

    def receive(self) -> list[tuple[Message, bytes]]:
        """The messages that have come; none if the socket holds no more. LinkError where the peer is gone, or sent what
        is no message."""
        messages: list[tuple[Message, bytes]] = []
        for _ in range(PIECES_AT_ONCE):  # a peer that sends without end gets no more
            try:
                piece, fds, _, _ = socket.recv_fds(self.socket, RECEIVED_AT_ONCE, 1)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise LinkError(f"the peer is gone: {error.strerror}") from error
            for fd in fds:
                os.set_inheritable(fd, False)
            self._fds += fds
            if len(self._fds) > MAX_FDS:
                raise LinkError("the peer sends file descriptors without end")
            if not piece:
                if messages:
                    return messages  # the next call says that it is gone
                raise LinkError("the peer is gone")
            self._received += piece
            messages += self._whole()
            if len(piece) < RECEIVED_AT_ONCE:
                return messages
        return messages

    def _whole(self) -> list[tuple[Message, bytes]]:
        found: list[tuple[Message, bytes]] = []
        at = 0
        while len(self._received) - at >= _LENGTHS.size:
            json_bytes, data_bytes = _LENGTHS.unpack_from(self._received, at)
            if json_bytes > MAX_JSON or data_bytes > MAX_BYTES:
                raise LinkError(f"a message claims {json_bytes} and {data_bytes} bytes")
            start = at + _LENGTHS.size
            end = start + json_bytes + data_bytes
            if len(self._received) < end:
                break
            try:
                message = parse_json(self._received[start : start + json_bytes].decode())
            except (ValueError, RecursionError) as error:
                raise LinkError("a message is no JSON") from error
            if not isinstance(message, dict):
                raise LinkError("a message is no JSON object")
            found.append((message, bytes(self._received[start + json_bytes : end])))
            at = end
        del self._received[:at]
        return found

    def take_fd(self) -> int:
        """The descriptor that came with a message; LinkError if none did."""
        if not self._fds:
            raise LinkError("a message came without its file descriptor")
        return self._fds.pop(0)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to receive, or comes within `timeout_s`."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return bool(poller.poll(max(timeout_s, 0.0) * 1e3))

    @property
    def is_up(self) -> bool:
        """Whether the peer has not closed its end, whatever has come and was not received."""
        if self._is_closed:
            return False
        poller = select.poll()
        poller.register(self.socket, select.POLLRDHUP)
        return not poller.poll(0)

    def close(self) -> None:
        """No message is sent any more once this returns, by no thread."""
        with self._lock:
            self._is_closed = True
            self._queue.clear()
            self.queued_bytes = 0
            self.socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
