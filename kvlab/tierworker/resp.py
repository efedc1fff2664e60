"""A cache server's tiers in Redis' protocol, for other hosts: kvlab's ``redis://`` store or any Redis client."""

import logging
import socket
import threading
import time
from functools import partial
from types import TracebackType
from typing import Self

from kvlab.errors import ConfigError
from kvlab.stores import Store
from kvlab.tierworker.budget import Budget
from kvlab.tierworker.places import Places
from kvlab.tierworker.resp_commands import Connection
from kvlab.tierworker.resp_wire import ClosedError, Wire
from kvlab.tierworker.scans import Scans

logger = logging.getLogger("kvlab.serve")

MAX_CONNECTIONS = 1024  # of clients that are known
MAX_STRANGERS = 64  # that have not given the password
MAX_SCANS, MAX_SCANS_OF_ONE = 32, 4
ACCEPT_AGAIN_S = 0.2


class RespServer:
    """Answers at `address` (host:port) while the context runs. `budget`: of values on their way, where others share it.
    ConfigError where it cannot listen, or where others than this host could ask without a password."""

    def __init__(self, store: Store, address: str, *, password: str = "", budget: Budget | None = None) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"--tcp must be HOST:PORT, got {address!r}")
        self.store = store
        self._scans = Scans(MAX_SCANS, MAX_SCANS_OF_ONE)
        self._password = password.encode()
        self._num_known = 0
        self._strangers = Places(MAX_STRANGERS)
        self._lock = threading.Lock()
        try:
            family, _, _, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            if not password and not _is_loopback(str(place[0])):
                raise ConfigError(
                    f"--tcp {address} can be reached from other hosts and has no password; give --password-file FILE"
                )
            self._socket = socket.create_server(place[:2], family=family, backlog=128)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"cannot listen at {address!r}: {error}") from error
        self._is_closed = False
        if budget is None:
            budget = Budget(store)
            budget.ask()
        self.budget = budget
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="kvlab-resp", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        self._socket.close()

    def _admit(self, sock: socket.socket) -> bool:
        """Whether there is a place among those who are known, which `sock` then has, and no other any more."""
        with self._lock:
            if self._num_known >= MAX_CONNECTIONS:
                return False
            self._num_known += 1
        self._strangers.leave(sock)
        return True

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:  # closed; or without a free file descriptor, which another client gives back
                time.sleep(ACCEPT_AGAIN_S)
                continue
            if self._password:
                self._strangers.enter(sock)
            elif not self._admit(sock):
                sock.close()
                continue
            wire = Wire(sock, self.budget, is_known=not self._password)
            client = Connection(wire, self.store, self._scans, self._password, admit=partial(self._admit, sock))
            try:
                threading.Thread(target=self._serve, args=(sock, client), name="kvlab-resp", daemon=True).start()
            except RuntimeError:  # no thread can be started
                self._left(sock, client)
                time.sleep(ACCEPT_AGAIN_S)

    def _left(self, sock: socket.socket, client: Connection) -> None:
        self._strangers.leave(sock)
        sock.close()
        self._scans.end(client)
        if client.wire.is_known:
            with self._lock:
                self._num_known -= 1

    def _serve(self, sock: socket.socket, client: Connection) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone keeps no place
            client.run()
        except (ClosedError, OSError) as error:
            logger.debug("kvlab serve: a client is gone: %s", error)
        except Exception:
            logger.exception("kvlab serve: a client's command failed")
        finally:
            self._left(sock, client)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
