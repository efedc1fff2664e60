"""Real servers for tests: each on a free port, with its files in a folder of its own, stopped in any case."""

import contextlib
import os
import select
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import redis
from liars import hang_up
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.machine.redis_server import RedisServer

PATIENT = "timeout_ms=60000"  # for a store whose server is sound: a busy machine is no failure


class Server(RedisServer):
    """One that also listens on a unix socket, with a client, and which can be silenced."""

    def __init__(self, folder, *settings, sentinel=False):
        more = () if sentinel else ("enable-debug-command yes", f"unixsocket {folder}/s")
        super().__init__(*settings, *more, folder=folder, sentinel=sentinel)
        self.socket_path = f"{folder}/s"

    def client(self, **options):
        return redis.Redis(port=self.port, socket_timeout=60, retry=Retry(NoBackoff(), 0), **options)

    def paused(self):
        return paused(self.pid)


@contextlib.contextmanager
def paused(pid):
    """The process is silent: connections are taken by the system, nothing is answered."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid), "every thread to stop: one of them takes the signal and tells the others")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_stopped(pid):
    """Whether no thread of the process runs."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@contextlib.contextmanager
def running(*servers):
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


def wait_for(condition, what, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


class Front:
    """Stands before a server and passes bytes on, through TLS if a context is given: the bundled server speaks none.

    `turns` counts how often the client speaks after the server has: round trips.
    """

    def __init__(self, port, context: ssl.SSLContext | None = None):
        self.turns = 0
        self._to = port
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self._listener.getsockname()[1]
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        hang_up(self._listener, self._sockets)

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        try:
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
        except (OSError, ssl.SSLError):
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._to))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets += [client, server]
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed at the end of a test
            self._pass_on(client, server)
        for each in (client, server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, client, server):
        """In one thread: OpenSSL takes no read of a connection while another thread writes to it."""
        last = server
        while True:
            waiting = isinstance(client, ssl.SSLSocket) and client.pending()
            ready = [client] if waiting else select.select([client, server], [], [])[0]
            for source in ready:
                data = source.recv(1 << 16)
                if not data:
                    return
                self.turns += source is client and last is server
                last = source
                (server if source is client else client).sendall(data)
