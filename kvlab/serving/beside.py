"""Caches that run beside the engine, in a server of their own, which outlives it."""

import sys
from collections.abc import Mapping
from pathlib import Path

from kvlab.machine.servers import OwnServer
from kvlab.serving.server import environment


class CacheBeside(OwnServer):
    """`address` is what the engine's connector is told."""

    def __init__(self, cache_bytes: int, folder: Path | None = None) -> None:
        self.cache_bytes = cache_bytes
        super().__init__(folder)

    @property
    def address(self) -> str:
        return str(self.port)

    @property
    def url(self) -> str:
        return self.address

    def environment(self) -> Mapping[str, str]:
        return environment()


class KVLabServe(CacheBeside):
    name = "kvlab serve"

    @property
    def address(self) -> str:
        return str(self._folder / "kvlab.sock")

    def command(self) -> list[str]:
        return [sys.executable, "-m", "kvlab", "serve", "--memory", str(self.cache_bytes), "--listen", self.address]

    def answers(self) -> bool:
        return Path(self.address).exists()


class LMCacheServer(CacheBeside):
    """As LMCache documents its multi-process mode."""

    name = "lmcache server"

    def command(self) -> list[str]:
        size = f"{self.cache_bytes / 2**30:.2f}"
        flags = ["--l1-size-gb", size, "--eviction-policy", "LRU", "--host", "localhost", "--port", str(self.port)]
        return [sys.executable, "-m", "lmcache.cli.main", "server", *flags]


BESIDE: Mapping[str, type[CacheBeside]] = {"kvlab-serve": KVLabServe, "lmcache-mp": LMCacheServer}
