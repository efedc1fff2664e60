"""The index of a folder: what lies in it and how many bytes that is, agreed upon by every process that uses it.

Each process keeps the index in memory. Changes are made under one file lock and appended to a journal, of which
each process reads the new end before it acts; a process that finds the journal torn or unknown counts the folder
again. The journal says which files came and went, and only the file system how long they are. A process that dies,
or a journal that cannot be written, can leave the index counting too much for a while, never too little.

A line is ``+ <path>`` or ``- <why> <path>``; the first one names the journal, which others then do not replace.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.disk.journal import JOURNAL, open_journal
from kvlab.stores.disk.names import is_own
from kvlab.stores.disk.root import Root
from kvlab.stores.forks import ForkAware

log = logging.getLogger(__name__)

JOURNAL_BYTES = 1 << 20  # beyond this it starts afresh
LOCK_WAIT_S = 10.0  # changes under the lock take milliseconds; counting a large folder takes seconds
RETRY_WAIT_S = 0.1  # once a process has held the lock for LOCK_WAIT_S
_EPOCH_BYTES = 18
_EPOCH = re.compile(rb"# [0-9a-f]{15}\n")  # the journal's first line
_WHY = re.compile(r"[\w:.-]{1,64}", re.A)
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class FolderLockedError(TimeoutError):
    """Another process holds the folder's lock and does not give it up."""


class FolderIndex(ForkAware):
    """Sizes by path. What changes it is called within `locked`. Methods raise OSError.

    Parameters
    ----------
    root : the folder; `JOURNAL` beneath it is lock and journal.
    scan : counts the folder: sizes by path, least recently used first.
    added, removed : told of every change, also those other processes made: (path, size), (path, why).
    """

    def __init__(
        self,
        root: Root,
        scan: Callable[[], dict[str, int]],
        added: Callable[[str, int], None],
        removed: Callable[[str, str], None],
    ) -> None:
        self.sizes: dict[str, int] = {}
        self.used = 0
        self.read_only = False  # the file system is mounted so: nothing is written, and nothing that is there leaves
        self._root = root
        self._scan, self._added, self._removed = scan, added, removed
        # What other processes announced, path -> why it left or "" if it came; the file system is asked under the lock.
        self._announced: dict[str, str] = {}
        self._owed = ""  # lines the journal could not take yet
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._fd = -1
        self._offset = 0
        self._epoch = b""  # of the journal as far as this process has read it; empty if it must count the folder
        self._has_locks = True
        self._lock_health = CircuitBreaker()
        self.watch_forks()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone on this folder, among threads and processes, with the index up to date. Re-entrant.

        Raises FolderLockedError where another process does not give the lock up: after `LOCK_WAIT_S`, and then at once
        until the lock can be had. Each call tries; now and then one waits for a moment.
        """
        with self._thread_lock:
            if self._depth == 0:
                self._lock_patiently()
            with self._held():
                yield

    @contextmanager
    def locked_at_once(self) -> Iterator[bool]:
        """As `locked` where that takes no waiting; whether it is."""
        if not self._thread_lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._depth == 0 and not self._lock(0.0):
                yield False
                return
            with self._held():
                yield True
        finally:
            self._thread_lock.release()

    @contextmanager
    def _held(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._unlock()

    def catch_up(self) -> bool:
        """Bring `holds` up to date without the folder's lock, from what others have appended; whether it is.

        For readers that must not wait, with few calls to the system: while an engine computes, a thread that comes
        back from one waits up to 5 ms for the interpreter.
        """
        if not self._thread_lock.acquire(blocking=False):
            return False
        try:
            if self._depth == 0 and not self._read_on():
                if not self._lock(0.0):
                    return False
                self._unlock()
            return self._has_locks
        finally:
            self._thread_lock.release()

    def holds(self, path: str) -> bool:
        """Whether a file is there, by what is known without the lock."""
        why = self._announced.get(path)
        return path in self.sizes if why is None else not why

    def add(self, path: str, size: int) -> None:
        """Count a file before it is there. If the journal cannot be written this raises, and nothing is counted."""
        self._tell(f"+ {path}\n")
        self._add(path, size)

    def remove(self, path: str, why: str) -> None:
        """A file is gone."""
        if path in self.sizes:
            self._remove(path, why)
            self._tell_or_owe(f"- {why} {path}\n")

    def publish(self, temp: str, path: str, size: int) -> None:
        """`temp` has become `path`; one record, so that a death in between cannot count it twice. While the others have
        not heard of it, they count `temp` for it."""
        self._remove(temp, "published")
        self._add(path, size)
        self._tell_or_owe(f"- published {temp}\n+ {path}\n")

    def recount(self) -> None:
        """Take the folder's word over the index's, and start the journal afresh."""
        self._count()
        with suppress(OSError):  # a full disk: an empty journal says the same, that each process must count
            self._begin()

    def close(self) -> None:
        with self._thread_lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def after_fork_in_child(self) -> None:
        """The descriptor is the parent's: its lock would be both processes'. The index may be half written."""
        self._thread_lock, self._depth = threading.RLock(), 0
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._epoch, self._owed = -1, b"", ""
        self.sizes, self.used, self._announced = {}, 0, {}

    # ---- the index

    def _add(self, path: str, size: int) -> None:
        self.used += size - self.sizes.get(path, 0)
        self.sizes[path] = size
        self._announced.pop(path, None)
        self._added(path, size)

    def _remove(self, path: str, why: str) -> None:
        self._announced.pop(path, None)
        if path in self.sizes:
            self.used -= self.sizes.pop(path)
            self._removed(path, why)

    def _count(self) -> None:
        found = self._scan()
        self._announced.clear()
        self._owed = ""
        for path in [path for path in self.sizes if path not in found]:
            self._remove(path, "vanished")
        for path, size in found.items():
            if self.sizes.get(path) != size:
                self._add(path, size)

    def _settle(self) -> None:
        """Ask the file system for what others announced. What is not there was moved or removed by a process that died
        before it could tell: the folder is counted again."""
        for path, why in list(self._announced.items()):
            try:
                state = self._root.state(path)
                is_file = stat.S_ISREG(state.st_mode)
            except (FileNotFoundError, NotADirectoryError):
                is_file = False
            if is_file:
                self._add(path, state.st_size)
            elif why:
                self._remove(path, why)
            else:
                self.recount()
                break

    # ---- lock

    def _open(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # of a deleted folder
            self._fd = -1
            if not self._root.is_in_place():
                self._root.open()
        fd, self.read_only = open_journal(self._root)
        self._fd, self._offset, self._epoch = fd, 0, b""

    def _lock_patiently(self) -> None:
        health = self._lock_health
        again_s = RETRY_WAIT_S if health.may_ask() else 0.0
        wait_s = LOCK_WAIT_S if health.is_up else again_s
        if self._lock(wait_s):
            if health.succeeded():
                log.warning("the lock of %s can be had again", self._root.path)
            return
        if wait_s:
            health.failed()
        about = "is left alone" if wait_s < LOCK_WAIT_S else f"has held its lock for {LOCK_WAIT_S:g} s"
        raise FolderLockedError(errno.ETIMEDOUT, f"another process {about}; it does not give the lock up", JOURNAL)

    def _lock(self, wait_s: float) -> bool:
        """Whether the lock could be had within `wait_s`; then the index is up to date."""
        if self._fd < 0:
            self._open()
        if not self._flock(wait_s):
            return False
        try:
            while not self._is_in_place():
                self._open()
                if not self._flock(wait_s):
                    return False
            self._catch_up(os.fstat(self._fd).st_size)
            self._settle()
        except BaseException:
            self._epoch = b""
            self._unlock()
            raise
        return True

    def _is_in_place(self) -> bool:
        """Whether the open journal is the one that other processes find: neither removed nor moved away, alone or with
        the whole folder. What lies in a folder that was moved is no longer this store's: a backup, perhaps."""
        if not self._root.is_in_place():
            return False
        try:
            return os.path.samestat(os.fstat(self._fd), self._root.state(JOURNAL))
        except FileNotFoundError:
            return self.read_only
        except OSError:
            return False

    def _flock(self, wait_s: float) -> bool:
        """Whether the lock could be had. Asked again and again: a process that was stopped may hold it for ever."""
        deadline, pause_s = time.monotonic() + wait_s, 0.0002
        while self._has_locks:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.005)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._has_locks = False
                log.warning("no file locks under %s: the budget is kept by each process for itself", self._root.path)
        return True

    def _unlock(self) -> None:
        if self._has_locks and self._fd >= 0:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError:
                self.close()  # which gives the lock up in any case
                raise

    # ---- journal

    def _read_on(self) -> bool:
        """Replay whole lines that came since; False if that takes the lock: the journal is not the one we know."""
        if self._fd < 0 or not self._epoch:
            return False
        state = os.fstat(self._fd)
        if not state.st_nlink or not self._offset <= state.st_size <= JOURNAL_BYTES:
            return False
        text = os.pread(self._fd, state.st_size - self._offset, self._offset) if state.st_size > self._offset else b""
        if os.pread(self._fd, _EPOCH_BYTES, 0) != self._epoch:  # after the text: it has not been replaced before
            return False
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        try:
            self._replay(text)
        except ValueError:
            self._epoch = b""  # at the next lock the folder is counted again
            return False
        return True

    def _catch_up(self, size: int) -> None:
        """Read what others appended since. A journal that another process began is continued and not replaced: or
        each would make the others count the folder at every call."""
        epoch = os.pread(self._fd, _EPOCH_BYTES, 0)
        if size > JOURNAL_BYTES or not _EPOCH.fullmatch(epoch):
            self.recount()
        elif epoch == self._epoch and size >= self._offset:
            text = os.pread(self._fd, size - self._offset, self._offset) if size > self._offset else b""
            self._offset = size
            try:
                self._replay(text)
            except ValueError:
                self.recount()
        elif os.pread(self._fd, 1, size - 1) != b"\n":  # the last writer died over it
            self.recount()
        else:
            self._count()
            self._epoch, self._offset = epoch, size

    def _replay(self, text: bytes) -> None:
        """ValueError if these are not whole lines about files of ours."""
        if text and not text.endswith(b"\n"):
            raise ValueError("cut off")
        for line in text.decode("ascii").split("\n")[:-1]:
            sign, _, rest = line.partition(" ")
            why, _, path = rest.partition(" ") if sign == "-" else ("added", "", rest)
            if sign not in ("+", "-") or not _WHY.fullmatch(why) or not is_own(path):
                raise ValueError(line)
            if sign == "+":
                self._announced[path] = ""
            elif path in self.sizes:
                self._announced[path] = why
            elif self._announced.pop(path, None) is not None:
                self._removed(path, why)

    def _begin(self) -> None:
        """Empty the journal and give it a new name."""
        self._epoch, self._offset, self._owed = b"", 0, ""
        os.ftruncate(self._fd, 0)
        epoch = f"# {secrets.token_hex(8)[:15]}\n".encode()
        if os.write(self._fd, epoch) == len(epoch):
            self._epoch, self._offset = epoch, len(epoch)

    def _tell(self, text: str) -> None:
        """Append for other processes, after pending lines. If that fails, the journal is as before, or every process
        counts the folder again."""
        if not self._epoch:
            self._begin()
        raw = (self._owed + text).encode()
        written = 0
        try:
            written = os.write(self._fd, raw)
        finally:
            if written != len(raw):
                try:
                    os.ftruncate(self._fd, self._offset)
                except OSError:
                    self._epoch = b""
        if written != len(raw):
            raise OSError(errno.ENOSPC, "the journal could not be written", JOURNAL)
        self._offset += len(raw)
        self._owed = ""

    def _tell_or_owe(self, text: str) -> None:
        """For changes that were made already. What others do not hear of yet makes them count too much."""
        try:
            self._tell(text)
        except OSError:
            self._owed += text
            if len(self._owed) > JOURNAL_BYTES // 2:
                self._epoch, self._owed = b"", ""
