"""The lock file beside a cache server's socket: held as long as the server's process lives, however it ends.

The system gives the lock up only when the process is gone, and with it all its threads. So who finds it free knows that
nothing of that server touches shared memory any more, in another container too.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from kvlab.errors import ConfigError

READERS_S = 2.0  # that a start waits for those who look at the lock


def beside(path: Path) -> Path:
    """The lock file of the socket at `path`."""
    return path.with_name(f"{path.name}.lock")


def hold(path: Path) -> int:
    """Take the lock of the socket at `path`; its descriptor, to be kept open. ConfigError where another server has
    it, or another process keeps it from being taken: engines that look at it do so for moments."""
    try:
        fd = os.open(beside(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot listen at {str(path)!r}: {error.strerror}") from error
    end = time.monotonic() + READERS_S
    while not _took(fd, fcntl.LOCK_EX):
        is_shared = _took(fd, fcntl.LOCK_SH)
        fcntl.flock(fd, fcntl.LOCK_UN)
        if not is_shared:
            os.close(fd)
            raise ConfigError(f"a server listens at {str(path)!r} already; give another --listen")
        if time.monotonic() > end:
            os.close(fd)
            raise ConfigError(
                f"another process holds a shared lock on {str(beside(path))!r}; end it (lslocks names it)"
            )
        time.sleep(READERS_S / 40)
    return fd


def _took(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class ServersLock:
    """The lock as an engine sees it: of the server that was there when this was made."""

    def __init__(self, path: str) -> None:
        self._path = beside(Path(path))
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def is_free(self) -> bool:
        """Whether that server's process has ended, and no other has come in its place."""
        is_free = _took(self._fd, fcntl.LOCK_SH)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return is_free

    def is_in_place(self) -> bool:
        """Whether the file at the path is still this one: then the server that holds it now knows that all servers
        before it have ended."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
