"""Servers of one's own on free ports; and where those lie that no package of the environment brings."""

import os
import socket
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child
from kvlab.machine.redis_server import free_port

FOLDER = "KVLAB_SERVERS"  # in the environment: another place
TRIES = 5  # another process may take the port before the server does
START_S = 120.0


def folder_of(name: str) -> Path:
    """The folder of the server `name`, which scripts/get_servers.py makes and which need not be there."""
    return Path(os.environ.get(FOLDER) or Path(sys.prefix) / "servers") / name


class OwnServer(ABC):
    """One process that listens on `port`. Use as a context manager; `url` opens it as a store."""

    name = ""  # for messages

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="kvlab-server-")  # noqa: SIM115 - as long as the server
        self._process: Child | None = None
        for _ in range(TRIES):
            self.port = free_port()
            if self._starts():
                return
        raise self._failed()

    @abstractmethod
    def command(self) -> list[str]: ...

    @property
    @abstractmethod
    def url(self) -> str: ...

    def environment(self) -> Mapping[str, str]:
        return os.environ

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
        self._log.close()

    def _starts(self) -> bool:
        """Whether it answers; not if it has ended before."""
        self._process = Child(self.command(), self._log, self.environment())
        end = time.monotonic() + START_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                return False
            time.sleep(0.02)
        return True

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), START_S):
            return True
        return False

    def _failed(self) -> ConfigError:
        self._log.seek(0)
        return ConfigError(f"{self.name} did not come up: {self._log.read()[-300:].decode(errors='replace')}")
