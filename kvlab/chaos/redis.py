"""A proxy before a Redis that spoils what it answers. Commands pass as they are; replies are read, value by value."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO

from kvlab.chaos.faults import DELAY, DROP, Faults
from kvlab.errors import ConfigError

LINES, BULKS, SEVERAL = b"+-:,#_(", b"$=!", b"*~>%|"  # first bytes of replies, of RESP2 and RESP3
SMALL = 64  # shorter values are the protocol's own, such as an answer to INFO
MAX_BYTES = 1 << 30  # of a value, and values of an array: what claims more is passed on no further


class RedisProxy:
    """Listens at `port` of `host`, and asks the Redis at `to`. Use as a context manager.

    A reply that is delayed comes `delay_ms` later; one that is dropped ends its connection; a value of `SMALL` bytes
    or more may be truncated, flipped, swapped with another or be the value before.
    """

    def __init__(
        self, to: tuple[str, int], faults: Faults, *, host: str = "127.0.0.1", port: int = 0, delay_ms: float = 50.0
    ) -> None:
        self.to, self.faults, self.delay_ms = to, faults, delay_ms
        try:
            self._listener = socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="kvlab-chaos", daemon=True).start()

    def __enter__(self) -> "RedisProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self.to) as server:
            with self._lock:
                self._sockets |= {client, server}
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asking = threading.Thread(target=_pass_on, args=(client, server), daemon=True)
            asking.start()
            try:
                with server.makefile("rb") as replies:
                    while (answer := self._reply(replies)) is not None:
                        client.sendall(answer)
            finally:
                for sock in (client, server):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                asking.join()
                with self._lock:
                    self._sockets -= {client, server}

    def _reply(self, replies: BinaryIO) -> bytes | None:
        """One reply, perhaps spoiled; None where the connection is to end."""
        kind = ""
        pieces: list[bytes] = []
        for head, value in _parts(replies):
            if value is None:
                pieces.append(head)
                continue
            kind = self.faults.draw() if len(value) >= SMALL else ""
            if kind == DROP:
                self.faults.did(DROP)
                return None
            if kind == DELAY:
                self.faults.did(DELAY)
                time.sleep(self.delay_ms / 1e3)
            given = self.faults.spoil(kind, value) if kind else value
            if given != value:
                self.faults.did(kind)
            self.faults.keep(value)
            pieces.append(b"%s%d\r\n%s\r\n" % (head[:1], len(given), given))
        return b"".join(pieces) if pieces else None


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _parts(replies: BinaryIO) -> Iterator[tuple[bytes, bytes | None]]:
    """The lines of one reply and of all within it, each with the value behind it where it has one; nothing where the
    stream ends, or does not speak the protocol."""
    left = 1
    while left:
        line = replies.readline(1 << 16)
        kind, text = line[:1], line[1:-2]
        left -= 1
        if not line.endswith(b"\r\n"):
            return
        if kind in LINES:
            yield line, None
            continue
        count = int(text) if text.lstrip(b"-").isdigit() else MAX_BYTES + 1
        if kind not in BULKS + SEVERAL or count > MAX_BYTES:
            return
        if kind in BULKS and count >= 0:
            value = replies.read(count + 2)
            if len(value) < count + 2:
                return
            yield line, value[:-2]
        else:
            left += max(count, 0) * (2 if kind in b"%|" else 1) + (kind == b"|")
            yield line, None
