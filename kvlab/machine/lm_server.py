"""LMCache's cache server, for measurements and tests: on a free port, stopped at the end."""

import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child
from kvlab.machine.redis_server import free_port
from kvlab.machine.servers import folder_of

TRIES = 5  # another process may take the port before the server does
START_S = 120.0
# The server as it is, but for its port: it could not have that again for a minute after it was killed.
_PROGRAM = """
import runpy, socket
class Reused(socket.socket):
    def bind(self, address):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().bind(address)
socket.socket = Reused
runpy.run_module("lmcache.v1.server", run_name="__main__", alter_sys=True)
"""


class LMServer:
    """Use as a context manager; `url` opens it as a store."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="kvlab-lm-")  # noqa: SIM115 - as long as the server
        self._process: Child | None = None
        for _ in range(TRIES):
            self.port = free_port()
            if self._starts():
                return
        raise self._failed()

    @property
    def url(self) -> str:
        return f"lm://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else -1

    def start(self) -> None:
        """Start it again after `kill`, and wait until it answers. It has nothing then."""
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
        self._log.close()

    def _starts(self) -> bool:
        """Whether it answers; not if it has ended before."""
        command = [sys.executable, "-c", _PROGRAM, "127.0.0.1", str(self.port)]
        path = os.pathsep.join(filter(None, [package_folder(), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"}
        self._process = Child(command, self._log, environment)
        end = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                return False
            time.sleep(0.05)
        return True

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), START_S):
            return True
        return False

    def _failed(self) -> ConfigError:
        self._log.seek(0)
        text = self._log.read()[-300:].decode(errors="replace")
        return ConfigError(f"LMCache's server did not come up: {text}")


def package_folder() -> str:
    """Where lmcache lies if this Python does not have it."""
    if find_spec("lmcache"):
        return ""
    folder: Path = folder_of("lmcache")
    if not (folder / "lmcache").is_dir():
        raise ConfigError("no LMCache server found; python scripts/get_servers.py, or pip install lmcache")
    return str(folder)
