"""Servers of one's own on free ports; and where those lie that no package of the environment brings."""

import os
import shutil
import socket
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child

DEBIAN, PROMETHEUS, COMPOSE = "debian", "prometheus", "compose"  # folders of packages that are unpacked
FOLDER = "KVLAB_SERVERS"  # in the environment: another place
TRIES = 5  # another process may take the port before the server does
START_S = 120.0
_given: set[int] = set()


def folder_of(name: str) -> Path:
    """The folder of the server `name`, which scripts/get_servers.py makes and which need not be there."""
    return Path(os.environ.get(FOLDER) or Path(sys.prefix) / "servers") / name


def free_port() -> int:
    """A port that is free, and so high that the port of a cluster's bus, 10,000 above, exists."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port > 50_000:
            port -= 20_000
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    continue
        if port not in _given:
            _given.add(port)
            return port


def unpacked_environment() -> dict[str, str]:
    """This one, with the libraries that lie beside servers that were unpacked."""
    libraries = [str(path) for path in sorted(folder_of(DEBIAN).glob("**/lib/*-linux-gnu"))]
    given = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    paths = [*libraries, *(path for path in given if path and path not in libraries)]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)} if paths else dict(os.environ)


def unpacked(binary: str) -> str | None:
    """Path of a program on PATH, or among Debian's that scripts/get_servers.py has unpacked."""
    folders = [folder_of(name) / "usr" / "bin" for name in (DEBIAN, PROMETHEUS)]
    folders.append(folder_of(COMPOSE) / "usr" / "libexec" / "docker" / "cli-plugins")
    return shutil.which(binary) or shutil.which(binary, path=os.pathsep.join(map(str, folders)))


def make_importable(name: str, package: str) -> None:
    """Let this process import the package of the server `name` where the environment does not have it."""
    folder = folder_of(name)
    if find_spec(package) is None:
        if not (folder / package).is_dir():
            raise ConfigError(f"no {package} found; python scripts/get_servers.py")
        sys.path.append(str(folder))


class OwnServer(ABC):
    """One process that listens on `port`. Use as a context manager; `url` opens it as a store.

    Its files lie in `folder`, or in one of their own that goes with it.
    """

    name = ""  # for messages

    def __init__(self, folder: Path | None = None) -> None:
        self._own = None if folder else Path(tempfile.mkdtemp(prefix="kvlab-server-"))
        self._folder = folder or self._own or Path()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log = open(self._folder / "log", "a+b")  # noqa: SIM115 - as long as the server
        self._process: Child | None = None
        for _ in range(TRIES):
            self.port = free_port()
            self.prepare()
            if self._starts():
                return
        raise self._failed()

    def prepare(self) -> None:  # noqa: B027 - most servers have nothing to prepare
        """`port` is new."""

    @abstractmethod
    def command(self) -> list[str]: ...

    @property
    @abstractmethod
    def url(self) -> str: ...

    def environment(self) -> Mapping[str, str]:
        return unpacked_environment()

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
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

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
