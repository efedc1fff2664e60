"""memcached, for measurements and tests: on a free port, stopped at the end."""

import os
from collections.abc import Sequence

from kvlab.errors import ConfigError
from kvlab.machine.servers import OwnServer, unpacked


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


def server_binary() -> str:
    """Path of memcached: on PATH, or where scripts/get_servers.py has unpacked it."""
    found = unpacked("memcached")
    if found is None:
        raise ConfigError("no memcached found; install it, or on Debian python scripts/get_servers.py")
    return found
