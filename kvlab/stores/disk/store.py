"""A tier in a folder: one file per object, readable by people and by the safetensors library."""

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import PAGE, aligned
from kvlab.stores.base import Buffer, Store, StoreCounters, Value, buffers, check_fits, fits_key
from kvlab.stores.disk.direct import read_file, write_file
from kvlab.stores.disk.folder import ABSENT, Folder
from kvlab.stores.disk.index import FolderLockedError
from kvlab.stores.disk.locks import require_locks
from kvlab.stores.disk.mount import MountStore
from kvlab.stores.disk.names import WRITING, key_of, path_of
from kvlab.stores.disk.root import RefusedError, Root
from kvlab.stores.eviction import get_policy
from kvlab.stores.forks import Lock
from kvlab.stores.shown import call_of
from kvlab.stores.url import StoreURL
from kvlab.system import O_DIRECT

log = logging.getLogger(__name__)


class DiskStore(Store):
    """Values as files under `root`, at most `max_bytes` of them, files from before and in the making included.

    Safe for several processes on one folder (`folder` and `index` beside this file). Publishing is a rename: a reader
    sees a whole value or none. Files are readable by their owner only.

    Parameters
    ----------
    direct
        bypass the page cache, so that the tier does not take the memory it was meant to save. Where the file
        system cannot, that is logged once and shown as `stats()["io"]`.
    fsync
        each value survives a power cut, at the price benchmarks/stores.py shows. Without it a power cut may
        leave files that a reader finds broken; a killed process leaves none either way.
    check
        read each header at the start and drop files that are shorter or longer than it says.
    shared
        other users may own the folder or write to it: they can then serve any value and lose any. Files are made
        readable and writable by the folder's group.
    deadline_s
        each call ends within these seconds, as a network's mount may hang; 0 for no deadline. What is made then is a
        `MountStore` around a `DiskStore`.

    A folder that belongs to another user or that others may write to is refused without `shared` (ConfigError).
    """

    def __new__(cls, root: str | Path, max_bytes: int, *, deadline_s: float = 0.0, **options: Any) -> Any:
        if not deadline_s:
            return super().__new__(cls)
        return MountStore(lambda: cls(root, max_bytes, **options), str(root), deadline_s)

    def __init__(
        self,
        root: str | Path,
        max_bytes: int,
        *,
        deadline_s: float = 0.0,
        policy: str = "lru",
        direct: bool = True,
        fsync: bool = False,
        check: bool = True,
        shared: bool = False,
        name: str = "disk",
    ) -> None:
        self.name = name
        self._options = {"policy": policy, "direct": direct, "fsync": fsync, "check": check, "shared": shared}
        self.root = Path(root)
        if not self.root.is_absolute():
            raise ConfigError(f"a disk store needs an absolute folder, like file:///data/kv, got {str(root)!r}")
        self.max_bytes = max_bytes
        self.counters = StoreCounters()
        self._fsync = fsync
        self._count_lock = Lock()
        get_policy(policy)  # an unknown one is no failure of the folder's
        self._root = Root(self.root, shared=shared)
        try:
            self._folder = Folder(self._root, max_bytes, partial(get_policy, policy), self._count, check=check)
            with self._folder.index.locked():  # or another process takes the probe for a dead writer's file
                self._direct = direct and O_DIRECT != 0 and self._can_bypass_page_cache()
        except RefusedError as error:
            raise ConfigError(f"cannot use {self.root} as a store: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot use {self.root} as a store: {error}") from error
        if shared and not self._folder.index.read_only:
            with self._medium("lock a file"):
                require_locks(self.root)

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        if url.netloc not in ("", "localhost"):
            raise ConfigError(f"a folder needs three slashes, like file:///data/kv?size=10GiB, got {url.shown!r}")
        if not url.path.strip("/"):
            raise ConfigError(f"a disk store needs a folder, like file:///data/kv?size=10GiB, got {url.shown!r}")
        policy = url.take("policy", "lru")
        get_policy(policy)
        return {
            "root": url.path,
            "max_bytes": url.take_bytes("size", default="10GiB"),
            "policy": policy,
            "direct": url.take_bool("direct", True),
            "fsync": url.take_bool("fsync", False),
            "check": url.take_bool("check", True),
            "shared": url.take_bool("shared", False),
            "deadline_s": url.take_ms("deadline_ms", "0"),
        }

    def _as_call(self) -> str:
        return call_of(self, str(self.root), self.max_bytes, **self._options)

    def put(self, key: str, value: Value) -> bool:
        start = time.perf_counter()
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        with self._medium(f"write {size} bytes"):
            stored = size <= self.max_bytes and fits_key(key) and self._write(path_of(key), pieces, size)
        if stored:
            self._count(puts=1, put_bytes=size, put_s=time.perf_counter() - start)
        else:
            self._count(refused=1)
        return stored

    def get(self, key: str) -> Buffer | None:
        value: list[memoryview] = []

        def room(size: int) -> list[memoryview]:
            value.append(aligned(size))
            return value

        size = self._read(key, room)
        return None if size is None else value[0][:size]

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        def room(size: int) -> list[memoryview]:
            check_fits(key, size, out)
            return [piece.cast("B") for piece in out]

        return self._read(key, room)

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        with self._medium("read"):
            opened = self._open(path_of(key), direct=False) if fits_key(key) else None
            if opened is None:
                return None
            fd, size, *_ = opened
            try:
                head = aligned(min(size, num_bytes))
                return head[: read_file(fd, [head], min(size, num_bytes), direct=False)]
            finally:
                os.close(fd)

    def size_of(self, key: str) -> int | None:
        if not fits_key(key):
            return None
        with self._medium("look"):
            try:
                state = self._root.state(path_of(key))
            except OSError as error:
                if error.errno in ABSENT:
                    return None
                raise
        return state.st_size if stat.S_ISREG(state.st_mode) and state.st_size <= self.max_bytes else None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """From the index, which knows of every process's files; only while another process is at work on it, from the
        folder. A file that a person removed is believed to be there until it is read.
        """
        with self._medium("look"):
            if self._folder.index.catch_up():
                holds = self._folder.index.holds
                return [fits_key(key) and holds(path_of(key)) for key in keys]
        return [self.contains(key) for key in keys]

    def delete(self, key: str) -> bool:
        with self._medium("remove a file"):
            return fits_key(key) and self._folder.unlink(path_of(key), "deleted")

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        """Move the broken file to ``.kvlab/broken``, where the last few are kept for a look."""
        why, is_it = f"set_aside:{'_'.join(reason.split())}", lambda: found is None or self.still_holds(key, found)
        with self._medium("set a file aside"):
            there = fits_key(key) and self._folder.quarantine(path_of(key), why, is_it)
        self._count(dropped=there)
        return there

    def num_in_quarantine(self) -> int:
        with self._medium("list"):
            return len(self._folder.broken())

    def clear_quarantine(self) -> int:
        with self._medium("remove a file"):
            return sum(self._folder.unlink(path, "deleted") for path in self._folder.broken())

    def keys(self) -> Iterator[str]:
        with self._medium("list"):
            paths = self._folder.paths()
        return (key for path in paths if (key := key_of(path)) is not None)

    @property
    def used_bytes(self) -> int:
        with self._medium("count"):
            return self._folder.used_bytes()

    def touch(self, keys: Iterable[str]) -> None:
        self._folder.touched.extend(path_of(key) for key in keys if fits_key(key))

    def why_missing(self, key: str) -> str:
        return self._folder.gone.get(path_of(key), "never_stored") if fits_key(key) else "never_stored"

    def stats(self) -> dict[str, int | float | str]:
        return {**super().stats(), "io": "direct" if self._direct else "buffered"}

    def close(self) -> None:
        self._folder.close()

    def _read(self, key: str, room: Callable[[int], list[memoryview]]) -> int | None:
        start = time.perf_counter()
        path = path_of(key) if fits_key(key) else ""
        with self._medium("read"):
            opened = self._open(path, direct=self._direct) if path else None
            if opened is None:
                self._count(misses=1)
                if self._folder.index.holds(path):
                    self._folder.forget(path)
                return None
            fd, size, direct, owned = opened
            try:
                got = self._read_file(fd, room(size), size, direct=direct)
                if owned:
                    with suppress(OSError):  # another user's file, or a folder that cannot be written any more
                        os.utime(fd)  # so that the next process knows what was used last
            finally:
                os.close(fd)
        if got != size:  # cut short under our hands
            self._count(misses=1)
            return None
        self._folder.touched.append(path)
        self._count(hits=1, get_bytes=size, get_s=time.perf_counter() - start)
        return size

    def _open(self, path: str, *, direct: bool) -> tuple[int, int, bool, bool] | None:
        """Descriptor, size, whether it bypasses the page cache and whether it has this one name only; None unless a
        plain file of fitting size."""
        try:
            fd = self._root.open_file(path, os.O_RDONLY | (O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno in ABSENT:
                return None
            if not direct or error.errno != errno.EINVAL:
                raise
            direct = False
            fd = self._root.open_file(path, os.O_RDONLY)
        try:
            state = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        if not stat.S_ISREG(state.st_mode) or state.st_size > self.max_bytes:
            os.close(fd)
            return None
        return fd, state.st_size, direct, state.st_nlink == 1

    def _write(self, path: str, pieces: Sequence[memoryview], size: int) -> bool:
        begun = self._folder.begin(path, size, O_DIRECT if self._direct else 0)
        if begun is None:
            return False
        temp, fd = begun
        try:
            self._write_file(fd, pieces)
            if self._fsync:
                os.fsync(fd)
            self._folder.publish(temp, path, size)
        except BaseException:
            self._folder.abandon(temp)
            raise
        if self._fsync:
            self._root.sync_folder_of(path)
        return True

    def _write_file(self, fd: int, pieces: Sequence[memoryview]) -> None:
        write_file(fd, pieces, direct=self._direct)

    def _read_file(self, fd: int, out: Sequence[memoryview], size: int, *, direct: bool) -> int:
        """How many of the file's first `size` bytes are read."""
        return read_file(fd, out, size, direct=direct)

    def _can_bypass_page_cache(self) -> bool:
        if self._folder.index.read_only:
            return True  # nothing can be tried; a read that the file system refuses goes without
        probe = f"{WRITING}/{secrets.token_hex(8)}"
        try:
            fd = self._root.open_file(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_DIRECT)
            try:
                self._root.unlink(probe)  # before it has a size: it is not counted
                write_file(fd, [memoryview(bytes(PAGE))], direct=True)
            finally:
                os.close(fd)
        except OSError as error:
            with suppress(OSError):
                self._root.unlink(probe)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk can be read, and freed
                log.warning("no room under %s to try direct I/O: this process reads and writes without it", self.root)
                return False
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            log.warning("no direct I/O under %s: the page cache will hold a second copy of what is read", self.root)
            return False
        return True

    @contextmanager
    def _medium(self, doing: str) -> Iterator[None]:
        """What the system refuses is a StoreError, counted."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            self._count(errors=1)
            reason = errno.errorcode.get(error.errno or 0, "failed").lower()  # enospc, eacces, erofs, ...
            if isinstance(error, FolderLockedError):
                reason = "locked"
            raise StoreError(f"could not {doing} under {self.root}: {error}", reason=reason) from error

    def _count(self, **amounts: float) -> None:
        with self._count_lock:
            for counter, amount in amounts.items():
                setattr(self.counters, counter, getattr(self.counters, counter) + amount)
