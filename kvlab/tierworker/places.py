"""Places for clients of whom nothing is known yet. They are few, and none is kept for long."""

import socket
import threading
import time
from contextlib import suppress


class Places:
    """Up to `most` sockets: a new one takes the place of the one that has been there longest, which is shut down. Its
    thread sees it end, and closes it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._since: dict[socket.socket, float] = {}  # the oldest first
        self._lock = threading.Lock()

    def enter(self, sock: socket.socket) -> None:
        with self._lock:
            self._since[sock] = time.monotonic()
            if len(self._since) > self._most:
                self._shut(next(iter(self._since)))

    def leave(self, sock: socket.socket) -> bool:
        """Whether it still had a place."""
        with self._lock:
            return self._since.pop(sock, None) is not None

    def end_those_of(self, seconds: float) -> None:
        """Shut those down that have been there for so long."""
        end = time.monotonic() - seconds
        with self._lock:
            for sock in [sock for sock, since in self._since.items() if since < end]:
                self._shut(sock)

    def _shut(self, sock: socket.socket) -> None:
        del self._since[sock]
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
