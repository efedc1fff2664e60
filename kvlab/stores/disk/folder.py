"""A folder of objects within a byte budget, shared by any number of processes.

Layout::

    <root>/3f/<percent-encoded key>.safetensors    objects, spread over 256 folders
    <root>/.kvlab/journal                          lock and journal (kvlab.stores.disk.index)
    <root>/.kvlab/writing/                         files in the making; each locked by its living writer
    <root>/.kvlab/broken/                          files set aside; the first to go when room is needed

Files with such names are counted; others are neither counted nor touched. No link is followed
(`kvlab.stores.disk.root`).
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from kvlab.container import SEAL_BYTES, is_cut_short
from kvlab.stores.disk.index import FolderIndex, FolderLockedError
from kvlab.stores.disk.names import BROKEN, FANOUT, PRIVATE, WRITING, is_own
from kvlab.stores.disk.root import Root
from kvlab.stores.eviction import EvictionPolicy
from kvlab.stores.forks import ForkAware

log = logging.getLogger(__name__)

KEPT_BROKEN = 8
KEPT_REASONS = 1 << 16  # keys whose reason of leaving is remembered
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EISDIR, errno.ENXIO}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}  # no file of ours is there


class Folder(ForkAware):
    """Which process may write when, what leaves when room is needed, and why something is not there any more.

    `count` is told of events by counter name: ``evictions``, ``evicted_bytes``, ``dropped``. Methods raise OSError.
    A file counts until it is really gone: one that cannot be removed stays in the index, and the next is tried.
    """

    def __init__(
        self,
        root: Root,
        max_bytes: int,
        make_policy: Callable[[], EvictionPolicy],
        count: Callable[..., None],
        *,
        check: bool,
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.gone: dict[str, str] = {}  # path -> why it left
        self.touched: deque[str] = deque(maxlen=KEPT_REASONS)  # readers only append here: no lock on their way
        self._make_policy = make_policy
        self._policy = make_policy()
        self._count = count
        self._check = check
        self._in_making: dict[str, int] = {}  # files this process writes, and their descriptors
        self.index = FolderIndex(root, self._scan, self._added, self._removed)
        self.watch_forks()
        try:
            with self.index.locked():
                self._make_room(0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.index.close()
        self.root.close()

    def after_fork_in_child(self) -> None:
        """The index is read again; files that the parent is writing are locked as long as a descriptor is open."""
        self._policy = self._make_policy()
        for fd in self._in_making.values():
            os.close(fd)
        self._in_making.clear()

    def paths(self) -> list[str]:
        """Objects held now; as last heard where another process does not give the lock up."""
        with suppress(FolderLockedError), self.index.locked():
            pass
        return [path for path in list(self.index.sizes) if not path.startswith(PRIVATE)]

    def broken(self) -> list[str]:
        """Files set aside."""
        with self.index.locked():
            return [path for path in self.index.sizes if path.startswith(BROKEN)]

    def used_bytes(self) -> int:
        """As `paths`."""
        with suppress(FolderLockedError), self.index.locked():
            pass
        return self.index.used

    def begin(self, path: str, size: int, flags: int) -> tuple[str, int] | None:
        """Make room for `path` and open a file in the making, counted from now on: its name and descriptor, for
        `publish` or `abandon`.

        None if no room can be made.
        """
        temp = f"{WRITING}/{secrets.token_hex(8)}"
        with self.index.locked():
            if self.index.read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            if not self._make_room(size, replacing=path):
                return None
            self.index.add(temp, size)  # before it is there: a death in between has counted too much, not too little
            fd = -1
            try:
                try:
                    fd = self.root.open_file(temp, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL)
                except FileNotFoundError:  # the folder was removed
                    self.root.make_folder(WRITING)
                    fd = self.root.open_file(temp, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._in_making[temp] = fd
                self._flock(fd)  # as long as it is locked, its writer lives
                os.ftruncate(fd, size)  # a process that counts the folder sees its full size
            except BaseException:
                self.abandon(temp)
                raise
        return temp, fd

    def publish(self, temp: str, path: str, size: int) -> None:
        """`temp` is complete: let readers see it as `path`."""
        with self.index.locked():
            try:
                self.root.rename(temp, path)
            except IsADirectoryError:  # another program's folder in the file's place
                self.root.rename(path, f"{BROKEN}/{secrets.token_hex(4)}-folder")
                self.root.rename(temp, path)
            self.index.publish(temp, path, size)
        os.close(self._in_making.pop(temp))

    def abandon(self, temp: str) -> None:
        """A write failed; its file goes, or counts until it can. Does not raise."""
        try:
            self.unlink(temp, "failed")
        except OSError as error:
            log.warning("could not remove %s under %s: %s", temp, self.root.path, error)
        if temp in self._in_making:
            os.close(self._in_making.pop(temp))

    def unlink(self, path: str, why: str) -> bool:
        """Remove a file; True if it was there."""
        with self.index.locked():
            try:
                self.root.unlink(path)
                there = True
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                there = False
            self.index.remove(path, why)
            if not path.startswith(PRIVATE):
                self.root.remove_empty_folders(path)
            return there

    def forget(self, path: str) -> None:
        """A reader did not find it: take it out of the index, unless it has come back by now. Readers wait for no lock;
        if another has it, the next reader does this."""
        with self.index.locked_at_once() as alone:
            if alone and not self._is_file(path):
                self.index.remove(path, "vanished")

    def quarantine(self, path: str, why: str, is_it: Callable[[], bool]) -> bool:
        """Move a broken file out of the readers' sight, keeping the last few; True if it was there. `is_it` is asked
        while no other process can replace the file."""
        why = re.sub(r"[^\w:.-]", "_", why, flags=re.A)[:64]
        aside = f"{BROKEN}/{secrets.token_hex(4)}-{path.rpartition('/')[2]}"
        with self.index.locked():
            try:
                state = self.root.state(path)
                if not is_it():
                    return False
                if not stat.S_ISREG(state.st_mode):
                    return self.unlink(path, why)
                self.index.add(aside, state.st_size)  # as in `begin`
                self.root.rename(path, aside)
            except OSError as error:
                self.index.remove(aside, "failed")
                if error.errno in _GONE:
                    self.index.remove(path, why)
                    return False
                return self.unlink(path, why)
            self.index.remove(path, why)
            for other in [other for other in self.index.sizes if other.startswith(BROKEN)][:-KEPT_BROKEN]:
                self._try_unlink(other, "evicted")
            self._make_room(0)  # where the index did not know the file
        return True

    def _is_file(self, path: str) -> bool:
        try:
            return stat.S_ISREG(self.root.state(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _try_unlink(self, path: str, why: str) -> bool:
        """Whether it is gone. A file that cannot be removed stays in the index."""
        try:
            self.unlink(path, why)
        except OSError as error:
            log.warning("could not remove %s under %s: %s", path, self.root.path, error)
            return False
        return True

    def _make_room(self, size: int, replacing: str = "") -> bool:
        """Let files go until `size` more bytes fit: broken ones, the one that is replaced, then by policy."""
        index = self.index
        if index.read_only:
            return False
        while self.touched:  # even where there is room: they came before what is about to enter
            self._policy.touch(self.touched.popleft())
        if index.used + size <= self.max_bytes:
            return True
        self._drop_dead_writers()
        in_making = sum(held for path, held in index.sizes.items() if path.startswith(WRITING))
        if in_making + size > self.max_bytes:
            return False
        for path in [*[path for path in index.sizes if path.startswith(BROKEN)], replacing]:
            if path in index.sizes and index.used + size > self.max_bytes:
                self._try_unlink(path, "replaced")
        stuck: set[str] = set()
        while index.used + size > self.max_bytes:
            victim = self._policy.victim(stuck)
            if victim is None:
                return False
            held = index.sizes[str(victim)]
            if self._try_unlink(str(victim), "evicted"):
                self._count(evictions=1, evicted_bytes=held)
            else:
                stuck.add(str(victim))
        return True

    def _drop_dead_writers(self) -> None:
        for path in [path for path in self.index.sizes if path.startswith(WRITING)]:
            if path in self.index.sizes and self._writer_is_dead(path):
                if self._is_file(path):
                    self._try_unlink(path, "failed")
                else:  # it died right after the rename
                    self.index.recount()

    def _writer_is_dead(self, temp: str) -> bool:
        """Whether no process holds the lock of a file in the making."""
        try:
            fd = self.root.open_file(temp, os.O_RDWR)
        except OSError as error:
            return error.errno in _GONE
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # in a shared folder others can lock any file, and keep it locked
            raise
        except OSError as error:
            log.debug("no file locks under %s: %s", self.root.path, error)

    def _added(self, path: str, size: int) -> None:
        if not path.startswith(PRIVATE):
            self._policy.admit(path, size)
            self.gone.pop(path, None)

    def _removed(self, path: str, why: str) -> None:
        if path.startswith(PRIVATE):
            return
        self._policy.discard(path)
        self.gone[path] = why
        if len(self.gone) > KEPT_REASONS:
            self.gone.pop(next(iter(self.gone)))

    def _scan(self) -> dict[str, int]:
        """Sizes by path, least recently used first. Leftovers of dead writers and broken files are removed."""
        found: list[tuple[int, str, int]] = []
        for top in (*FANOUT, WRITING, BROKEN):
            for path, state in self.root.files(top):
                if not is_own(path):
                    continue
                if not self.index.read_only and self._is_left_over(path, state.st_size):
                    try:
                        self.root.unlink(path)
                        self._count(dropped=1)
                        continue
                    except FileNotFoundError:
                        continue
                    except OSError as error:
                        log.warning("could not remove %s under %s: %s", path, self.root.path, error)
                found.append((state.st_mtime_ns, path, state.st_size))
        return {path: size for _, path, size in sorted(found)}

    def _is_left_over(self, path: str, size: int) -> bool:
        if path.startswith(WRITING):
            return self._writer_is_dead(path)
        if path.startswith(BROKEN) or path in self.index.sizes:
            return False
        if size > self.max_bytes or not self._check:
            return size > self.max_bytes
        try:
            return size == 0 or is_cut_short(self._head(path), size)
        except OSError:  # what cannot be read takes room all the same
            return False

    def _head(self, path: str) -> bytes:
        fd = self.root.open_file(path, os.O_RDONLY)
        try:
            return os.pread(fd, SEAL_BYTES, 0)
        finally:
            os.close(fd)
