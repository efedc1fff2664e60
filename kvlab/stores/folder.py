"""A folder of objects within a byte budget, shared by any number of processes.

Layout::

    <root>/3f/<percent-encoded key>.safetensors    objects, spread over 256 folders
    <root>/.kvlab/journal                          lock and journal (kvlab.stores.ledger)
    <root>/.kvlab/writing/                         files in the making; each locked by its living writer
    <root>/.kvlab/broken/                          files set aside; the first to go when room is needed

Everything below is counted; other files are neither counted nor touched.
"""

import errno
import fcntl
import logging
import os
import secrets
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path

from kvlab.stores.eviction import EvictionPolicy
from kvlab.stores.ledger import Ledger
from kvlab.stores.names import FANOUT, is_cut_short, key_of

log = logging.getLogger(__name__)

PRIVATE = ".kvlab"
WRITING = f"{PRIVATE}/writing"
BROKEN = f"{PRIVATE}/broken"
KEPT_BROKEN = 8
KEPT_REASONS = 1 << 16  # keys whose reason of leaving is remembered
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EISDIR, errno.ENXIO}


class Folder:
    """Who may write when, what leaves when room is needed, and why something is not there any more.

    `count` is told of events by counter name: ``evictions``, ``evicted_bytes``, ``dropped``. Methods raise OSError.
    """

    def __init__(
        self, root: Path, max_bytes: int, policy: EvictionPolicy, count: Callable[..., None], *, check: bool
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.gone: dict[str, str] = {}  # path -> why it left
        self.touched: deque[str] = deque(maxlen=KEPT_REASONS)  # readers only append here: no lock on their way
        self._policy = policy
        self._count = count
        self._check = check
        self.book = Ledger(root / PRIVATE / "journal", self._scan, self._added, self._removed)
        with self.book.locked():
            for folder in (WRITING, BROKEN):
                (root / folder).mkdir(mode=0o700, exist_ok=True)
            self._make_room(0)

    def paths(self) -> list[str]:
        """Objects held now."""
        with self.book.locked():
            return [path for path in self.book.sizes if not path.startswith(PRIVATE)]

    def used_bytes(self) -> int:
        with self.book.locked():
            return self.book.used

    def begin(self, path: str, size: int, flags: int) -> tuple[str, int] | None:
        """Make room for `path` and open a file in the making, counted from now on: its name and descriptor.

        None if no room can be made; then nothing has left either.
        """
        temp = f"{WRITING}/{secrets.token_hex(8)}"
        with self.book.locked():
            if not self._make_room(size, replacing=path):
                return None
            flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.book.add(temp, size)  # before it is there: who dies in between has counted too much, not too little
            fd = -1
            try:
                try:
                    fd = os.open(self.root / temp, flags, 0o600)
                except FileNotFoundError:  # somebody removed our folder
                    (self.root / WRITING).mkdir(mode=0o700, parents=True, exist_ok=True)
                    fd = os.open(self.root / temp, flags, 0o600)
                self._flock(fd, fcntl.LOCK_EX)  # as long as it is locked, its writer lives
                os.ftruncate(fd, size)  # whoever counts the folder sees its full size
            except BaseException:
                if fd >= 0:
                    os.close(fd)
                self.unlink(temp, "failed")
                raise
        return temp, fd

    def publish(self, temp: str, path: str, size: int) -> None:
        target = self.root / path
        with self.book.locked():
            try:
                os.rename(self.root / temp, target)
            except FileNotFoundError:
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.rename(self.root / temp, target)
            except (IsADirectoryError, NotADirectoryError):  # something foreign in the file's place
                os.rename(target, self.root / BROKEN / f"{secrets.token_hex(4)}-folder")
                os.rename(self.root / temp, target)
            self.book.rename(temp, path, size, "published")

    def abandon(self, temp: str) -> None:
        """A write failed; its file goes. Does not raise."""
        try:
            self.unlink(temp, "failed")
        except OSError as error:
            log.warning("could not remove %s under %s: %s", temp, self.root, error)

    def unlink(self, path: str, why: str) -> bool:
        """Remove a file; True if it was there."""
        with self.book.locked():
            try:
                os.unlink(self.root / path)
                there = True
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                there = False
            self.book.remove(path, why)
            return there

    def forget(self, path: str) -> None:
        """A reader did not find it: take it out of the book, unless it has come back by now."""
        with self.book.locked():
            if not os.path.isfile(self.root / path):
                self.book.remove(path, "vanished")

    def set_aside(self, path: str, why: str) -> bool:
        """Move a broken file out of the readers' sight, keeping the last few; True if it was there."""
        aside = f"{BROKEN}/{secrets.token_hex(4)}-{Path(path).name}"
        with self.book.locked():
            try:
                state = os.lstat(self.root / path)
                os.rename(self.root / path, self.root / aside)
            except OSError as error:
                if error.errno in ABSENT:
                    self.book.remove(path, why)
                    return False
                return self.unlink(path, why)
            if path in self.book.sizes:
                self.book.rename(path, aside, state.st_size if stat.S_ISREG(state.st_mode) else 0, why)
            for other in [other for other in self.book.sizes if other.startswith(BROKEN)][:-KEPT_BROKEN]:
                self.unlink(other, "evicted")
        return True

    def _make_room(self, size: int, replacing: str = "") -> bool:
        """Let files go until `size` more bytes fit: broken ones, the one that is replaced, then by policy."""
        book = self.book
        while self.touched:  # even where there is room: they came before what is about to enter
            self._policy.touch(self.touched.popleft())
        if book.used + size <= self.max_bytes:
            return True
        self._drop_dead_writers()
        in_making = sum(held for path, held in book.sizes.items() if path.startswith(WRITING))
        if in_making + size > self.max_bytes:
            return False
        for path in [*[path for path in book.sizes if path.startswith(BROKEN)], replacing]:
            if path in book.sizes and book.used + size > self.max_bytes:
                self.unlink(path, "replaced")
        while book.used + size > self.max_bytes:
            victim = self._policy.victim()
            if victim is None:
                return False
            held = book.sizes[str(victim)]
            self.unlink(str(victim), "evicted")
            self._count(evictions=1, evicted_bytes=held)
        return True

    def _drop_dead_writers(self) -> None:
        for path in [path for path in self.book.sizes if path.startswith(WRITING)]:
            try:
                if self._writer_is_dead(path):
                    self.unlink(path, "failed")
            except FileNotFoundError:  # it died right after the rename
                self.book.recount()

    def _writer_is_dead(self, temp: str) -> bool:
        """Whether nobody holds the lock of a file in the making."""
        fd = os.open(self.root / temp, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _flock(self, fd: int, how: int) -> None:
        try:
            fcntl.flock(fd, how)
        except OSError as error:
            log.debug("no file locks under %s: %s", self.root, error)

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
            for where, _, names in os.walk(self.root / top):
                for name in names:
                    path = os.path.relpath(os.path.join(where, name), self.root)
                    try:
                        state = os.lstat(self.root / path)
                        if not stat.S_ISREG(state.st_mode):
                            continue
                        if self._is_left_over(path, state.st_size):
                            os.unlink(self.root / path)
                            self._count(dropped=1)
                        elif path.startswith(PRIVATE) or key_of(path) is not None:
                            found.append((state.st_mtime_ns, path, state.st_size))
                    except FileNotFoundError:
                        continue
        return {path: size for _, path, size in sorted(found)}

    def _is_left_over(self, path: str, size: int) -> bool:
        if path.startswith(WRITING):
            return self._writer_is_dead(path)
        if path.startswith(BROKEN) or key_of(path) is None or path in self.book.sizes:
            return False
        return size > self.max_bytes or (self._check and is_cut_short(self.root / path, size))
