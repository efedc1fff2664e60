"""A tier in a folder."""

from kvlab.errors import ConfigError
from kvlab.system import fcntl

if fcntl is None:
    raise ConfigError("file:// needs Linux or macOS, whose files can be locked; on Windows use WSL")

from kvlab.stores.disk.store import DiskStore

__all__ = ["DiskStore"]
