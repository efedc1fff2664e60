"""A tier in a folder, as `DiskStore`, whose values NIXL moves."""

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import PAGE
from kvlab.stores.disk import DiskStore
from kvlab.stores.nixl.transfer import PLUGINS, Transfers
from kvlab.stores.url import StoreURL
from kvlab.system import O_DIRECT


class NixlStore(DiskStore):
    """Values as files under `root`, written and read by a plugin of NIXL. Budget, names, journal and quarantine are
    those of `DiskStore`, so `file://` of the same folder finds the same objects.

    NIXL moves whole pages between files and memory of the store; what is left of a value behind them, and the copy to
    the caller, are the store's own. A transfer ends within `timeout_s`.
    """

    def __init__(
        self, root: str | Path, max_bytes: int, *, plugin: str = "POSIX", timeout_s: float = 10.0, **options: Any
    ) -> None:
        self.errors: Counter[str] = Counter()
        self._transfers = Transfers(plugin, timeout_s)
        super().__init__(root, max_bytes, **{"name": "nixl", **options})
        self._plugin = plugin

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        plugin = url.take("plugin", "POSIX")
        if plugin not in PLUGINS:
            why = (
                "; for objects in a bucket use s3://, as OBJ tells neither lengths nor failures"
                if plugin == "OBJ"
                else ""
            )
            raise ConfigError(f"plugin must be one of {', '.join(PLUGINS)} in {url.shown!r}, got {plugin!r}{why}")
        if "deadline_ms" in url.options:
            raise ConfigError(f"deadline_ms is no option of {url.shown!r}: timeout_ms bounds NIXL's transfers")
        return {**super().arguments(url), "plugin": plugin, "timeout_s": url.take_ms("timeout_ms", "10000")}

    def stats(self) -> dict[str, int | float | str]:
        errors = {f"error_{reason}": count for reason, count in sorted(self.errors.items())}
        return {**super().stats(), "plugin": self._plugin, **errors}

    def _write_file(self, fd: int, pieces: Sequence[memoryview]) -> None:
        size = sum(piece.nbytes for piece in pieces)
        whole = size // PAGE * PAGE
        with self._counting(fd, size):
            room = self._transfers.room(size)
            _copy(pieces, [room[:size]])
            if whole:
                self._transfers.run("WRITE", room[:whole], fd)
            if size > whole:  # as a whole page it would make the file longer than what is counted for it
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)
                os.pwrite(fd, room[whole:size], whole)
            self._transfers.give_back(room)

    def _read_file(self, fd: int, out: Sequence[memoryview], size: int, *, direct: bool) -> int:
        if os.fstat(fd).st_size < size:  # NIXL would tell of a failure, and not of which
            return 0
        whole = size // PAGE * PAGE
        with self._counting(fd, 0):
            room = self._transfers.room(size)
            if whole:
                self._transfers.run("READ", room[:whole], fd)
            if size > whole and os.preadv(fd, [room[whole : whole + PAGE]], whole) < size - whole:
                return 0
            _copy([room[:size]], out)
            self._transfers.give_back(room)
        return size

    @contextmanager
    def _counting(self, fd: int, size: int) -> Iterator[None]:
        """NIXL has one error for all failures: whether the disk is full is to be seen."""
        try:
            yield
        except StoreError as error:
            state = os.fstatvfs(fd)
            if error.reason == "backend" and size > state.f_bavail * state.f_frsize:
                error.reason = errno.errorcode[errno.ENOSPC].lower()
            with self._count_lock:
                self.errors[error.reason] += 1
            self._count(errors=1)
            raise


def _copy(pieces: Sequence[memoryview], out: Sequence[memoryview]) -> None:
    """The bytes of `pieces` into `out`, one after the other, through numpy: other threads run meanwhile."""
    sources, at_source = [piece.cast("B") for piece in pieces if piece.nbytes], 0
    for into in out:
        at = 0
        while at < into.nbytes and sources:
            step = min(into.nbytes - at, sources[0].nbytes - at_source)
            np.frombuffer(into, np.uint8, step, at)[:] = np.frombuffer(sources[0], np.uint8, step, at_source)
            at, at_source = at + step, at_source + step
            if at_source == sources[0].nbytes:
                sources, at_source = sources[1:], 0
