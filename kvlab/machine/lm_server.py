"""LMCache's cache server, for measurements and tests: on a free port, stopped at the end."""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from kvlab.errors import ConfigError
from kvlab.machine.servers import OwnServer, folder_of

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


class LMServer(OwnServer):
    """It has nothing when it is started again."""

    name = "LMCache's server"

    @property
    def url(self) -> str:
        return f"lm://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [sys.executable, "-c", _PROGRAM, "127.0.0.1", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        path = os.pathsep.join(filter(None, [package_folder(), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"}


def package_folder() -> str:
    """Where lmcache lies if this Python does not have it."""
    if find_spec("lmcache"):
        return ""
    folder: Path = folder_of("lmcache")
    if not (folder / "lmcache").is_dir():
        raise ConfigError("no LMCache server found; python scripts/get_servers.py, or pip install lmcache")
    return str(folder)
