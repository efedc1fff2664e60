"""memcached, for measurements and tests: on a free port, stopped at the end."""

import os
import shutil
from collections.abc import Mapping, Sequence

from kvlab.errors import ConfigError
from kvlab.machine.servers import OwnServer, folder_of

DEBIAN = "debian"  # the folder of unpacked packages


class MemcachedServer(OwnServer):
    """`settings` are more arguments of its command line. It has nothing when it is started again."""

    name = "memcached"

    def __init__(self, *settings: str, memory_mib: int = 256) -> None:
        self._settings: Sequence[str] = settings
        self._memory_mib = memory_mib
        super().__init__()

    @property
    def url(self) -> str:
        return f"memcached://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        user = ["-u", "root"] if os.geteuid() == 0 else []
        sizes = ["-m", str(self._memory_mib), "-I", "32m"]
        return [server_binary(), *user, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", *sizes, *self._settings]

    def environment(self) -> Mapping[str, str]:
        """Beside a server that was unpacked lie its libraries."""
        libraries = [str(path) for path in folder_of(DEBIAN).glob("usr/lib/*-linux-gnu")]
        given = os.environ.get("LD_LIBRARY_PATH")
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([given] if given else [])])}


def server_binary() -> str:
    """Path of memcached: on PATH, or where scripts/get_servers.py has unpacked it."""
    found = shutil.which("memcached") or shutil.which("memcached", path=str(folder_of(DEBIAN) / "usr" / "bin"))
    if found is None:
        raise ConfigError("no memcached found; install it, or on Debian python scripts/get_servers.py")
    return found
