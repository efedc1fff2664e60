"""The book of a folder: what lies in it and how many bytes that is, agreed upon by every process that uses it.

Each process keeps the book in memory. Changes are made under one file lock and appended to a journal, of which
everybody reads the new end before acting; whoever finds the journal odd counts the folder anew. A process that
dies can leave the book counting too much for a while, never too little.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

JOURNAL_BYTES = 1 << 20  # beyond this it starts afresh
_EPOCH_BYTES = 18
_EPOCH = re.compile(rb"# [0-9a-f]{15}\n")  # the journal's first line
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Ledger:
    """Sizes by path. What changes it is called within `locked`.

    Parameters
    ----------
    journal : the file that is lock and journal; its folder and that one's are made, for their owner alone.
    scan : counts the folder: sizes by path, least recently used first.
    added, removed : told of every change, also those other processes made: (path, size), (path, why).
    """

    def __init__(
        self,
        journal: Path,
        scan: Callable[[], dict[str, int]],
        added: Callable[[str, int], None],
        removed: Callable[[str, str], None],
    ) -> None:
        self.journal = journal
        self.sizes: dict[str, int] = {}
        self.used = 0
        self._scan, self._added, self._removed = scan, added, removed
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._fd = -1
        self._pid = 0
        self._offset = 0
        self._epoch = b""
        self._shared = True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone on this folder, among threads and processes, with the book up to date. Re-entrant."""
        with self._thread_lock:
            if self._depth == 0:
                self._lock()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._unlock()

    def catch_up(self) -> bool:
        """Bring the book up to date without the folder's lock, from what others have appended; whether it is.

        For readers that must not wait, with few calls to the system: while an engine computes, a thread that comes
        back from one waits up to 5 ms for the interpreter.
        """
        if not self._thread_lock.acquire(blocking=False):
            return False
        try:
            if self._depth == 0 and not self._read_on():
                if not self._lock(wait=False):
                    return False
                self._unlock()
            return self._shared
        finally:
            self._thread_lock.release()

    def _read_on(self) -> bool:
        """Replay whole lines that came since; False if that takes the lock: the journal is not the one we know."""
        if self._fd < 0 or self._pid != os.getpid():
            return False
        state = os.fstat(self._fd)
        if not state.st_nlink or not self._offset <= state.st_size <= JOURNAL_BYTES:
            return False
        text = os.pread(self._fd, state.st_size - self._offset, self._offset) if state.st_size > self._offset else b""
        if os.pread(self._fd, _EPOCH_BYTES, 0) != self._epoch:  # after the text: it has not been begun anew before
            return False
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        try:
            self._replay(text)
        except ValueError:
            self._epoch = b""  # whoever takes the lock next counts anew
            return False
        return True

    def add(self, path: str, size: int) -> None:
        self._append(f"+ {size} {path}\n")
        self._add(path, size)

    def remove(self, path: str, why: str) -> None:
        if path in self.sizes:
            self._append(f"- {why} {path}\n")
            self._remove(path, why)

    def rename(self, old: str, new: str, size: int, why: str) -> None:
        """`old` has become `new`; one record, so that a death in between cannot count it twice."""
        self._append(f"- {why} {old}\n+ {size} {new}\n")
        self._remove(old, why)
        self._add(new, size)

    def recount(self) -> None:
        """Take the folder's word over the book's, and start the journal afresh."""
        self._count()
        os.ftruncate(self._fd, 0)
        self._epoch = f"# {secrets.token_hex(8)[:15]}\n".encode()
        os.write(self._fd, self._epoch)
        self._offset = len(self._epoch)

    def close(self) -> None:
        with self._thread_lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _add(self, path: str, size: int) -> None:
        self.used += size - self.sizes.get(path, 0)
        self.sizes[path] = size
        self._added(path, size)

    def _remove(self, path: str, why: str) -> None:
        if path in self.sizes:
            self.used -= self.sizes.pop(path)
            self._removed(path, why)

    def _open(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # of a deleted folder, or inherited by a forked child that needs its own
            self._fd = -1
        for folder in (self.journal.parent.parent, self.journal.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._pid, self._offset, self._epoch = os.getpid(), 0, b""

    def _lock(self, wait: bool = True) -> bool:
        if self._fd < 0 or self._pid != os.getpid():
            self._open()
        try:
            self._flock(fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        while os.fstat(self._fd).st_nlink == 0:  # somebody removed the folder
            self._open()
            self._flock(fcntl.LOCK_EX)
        try:
            self._catch_up(os.fstat(self._fd).st_size)
        except BaseException:
            self._unlock()
            raise
        return True

    def _flock(self, how: int) -> None:
        try:
            if self._shared:
                fcntl.flock(self._fd, how)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._shared = False
            log.warning("no file locks at %s: the budget is kept by each process for itself", self.journal)

    def _unlock(self) -> None:
        if self._shared and self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _catch_up(self, size: int) -> None:
        """Read what others appended since. A journal that somebody else began is carried on and not begun anew: or each
        would make the others count the folder at every call."""
        epoch = os.pread(self._fd, _EPOCH_BYTES, 0)
        if size > JOURNAL_BYTES or not _EPOCH.fullmatch(epoch):
            self.recount()
        elif epoch == self._epoch:
            text = os.pread(self._fd, size - self._offset, self._offset) if size > self._offset else b""
            self._offset = size
            try:
                self._replay(text)
            except ValueError:
                self.recount()
        elif os.pread(self._fd, 1, size - 1) != b"\n":  # whoever wrote last died over it
            self.recount()
        else:
            self._count()
            self._epoch, self._offset = epoch, size

    def _count(self) -> None:
        found = self._scan()
        for path in [path for path in self.sizes if path not in found]:
            self._remove(path, "vanished")
        for path, size in found.items():
            if self.sizes.get(path) != size:
                self._add(path, size)

    def _replay(self, text: bytes) -> None:
        if text and not text.endswith(b"\n"):
            raise ValueError("cut off")
        for line in text.decode().splitlines():
            sign, what, path = line.split(" ", 2)
            if sign == "+":
                self._add(path, int(what))
            elif sign == "-":
                self._remove(path, what)
            else:
                raise ValueError(line)

    def _append(self, text: str) -> None:
        raw = text.encode()
        if os.write(self._fd, raw) != len(raw):
            raise OSError(errno.ENOSPC, "the journal could not be written", str(self.journal))
        self._offset += len(raw)
