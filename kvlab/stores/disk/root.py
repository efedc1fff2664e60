"""Files beneath a folder, reached by descriptors of their folders: no link is followed.

The folder must belong to the process's user and be writable by no other, or its owner is not the one who decides
what lies there. With `shared`, that is allowed, and what is made is open to the folder's group.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlab.system import O_PATH

_FOLDER = O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a pipe or device in a file's place must not block
_ADVICE = "use a folder of this user's own with mode 0700, or ?shared=true if all who may write there are trusted"
MOST_FOLDERS = 32  # deep


class RefusedError(OSError):
    """What lies here was not made by a store, or others may change it."""


class Root:
    """The folder `path`, made by `open` where it is absent. Paths are relative to it, like ``3f/name``.

    Methods raise OSError. A path that passes through a link or a file raises NotADirectoryError, a link in a file's
    place OSError with ELOOP.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self.shared = shared
        self._fd = -1

    def open(self) -> None:
        """(Re)open the folder. RefusedError if others own it or may write to it."""
        try:
            os.makedirs(self.path, 0o700)
            self._open_to_group(self.path)
        except FileExistsError:
            link = os.lstat(self.path)
            if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
                raise RefusedError(f"{self.path} is a symbolic link that user {link.st_uid} made") from None
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.check(os.fstat(fd), self.path)
            if self._fd < 0:
                self._fd = os.dup(fd)
            else:
                os.dup2(fd, self._fd, inheritable=False)  # in place: other threads are using the number
        finally:
            os.close(fd)

    def is_in_place(self) -> bool:
        """Whether `path` still leads to the open folder: it was not moved or replaced."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def check(self, state: os.stat_result, shown: object) -> None:
        """RefusedError unless only this process's user (and root) may change what has this state."""
        if self.shared:
            return
        if state.st_uid != os.geteuid():
            raise RefusedError(
                f"{shown} belongs to user {state.st_uid}, this process runs as {os.geteuid()}; {_ADVICE}"
            )
        if state.st_mode & 0o022:
            raise RefusedError(f"{shown} is writable by others (mode {stat.S_IMODE(state.st_mode):04o}); {_ADVICE}")

    def open_file(self, path: str, flags: int) -> int:
        """A descriptor; files are made with mode 0600. It may be of anything that is no link: see `fstat`."""
        with self._folder_of(path) as (folder, name):
            fd = os.open(name, flags | _FILE, 0o600, dir_fd=folder)
        if self.shared and flags & os.O_CREAT:
            try:
                state = os.fstat(fd)
                if state.st_uid == os.geteuid() and state.st_nlink == 1 and stat.S_ISREG(state.st_mode):
                    os.fchmod(fd, 0o660)  # no hard link: it may be to a file outside
            except BaseException:
                os.close(fd)
                raise
        return fd

    def state(self, path: str) -> os.stat_result:
        with self._folder_of(path) as (folder, name):
            return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        with self._folder_of(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_empty_folders(self, path: str) -> None:
        """Remove the folders that `path` lay in, from the inmost on, as long as they are empty; not the outmost."""
        folder = path.rpartition("/")[0]
        while "/" in folder:
            try:
                with self._folder_of(folder) as (outer, name):
                    os.rmdir(name, dir_fd=outer)
            except OSError:  # not empty, or gone
                return
            folder = folder.rpartition("/")[0]

    def rename(self, old: str, new: str) -> None:
        """Move, and replace what is there; folders on the way to `new` are made."""
        with self._folder_of(old) as (source, name), self._folder_of(new, make=True) as (target, other):
            os.rename(name, other, src_dir_fd=source, dst_dir_fd=target)

    def make_folder(self, path: str) -> None:
        """Make it where it is absent, and check that it is a folder of ours."""
        with self._folder_of(f"{path}/", make=True) as (folder, _):
            self.check(os.fstat(folder), self.path / path)

    def sync_folder_of(self, path: str) -> None:
        """Have the names in the folder of `path` survive a power cut."""
        with self._folder_of(path) as (folder, _):
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def files(self, path: str, depth: int = MOST_FOLDERS) -> Iterator[tuple[str, os.stat_result]]:
        """Plain files beneath a folder, with their states; nothing where it is absent. What cannot be listed raises: a
        file that is not counted would be room that is not there."""
        try:
            with self._folder_of(f"{path}/") as (folder, _):
                fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise RefusedError(f"{self.path / path} is in the place of a folder; remove it") from None
        found: list[tuple[str, os.stat_result]] = []
        try:
            self.check(os.fstat(fd), self.path / path)
            with os.scandir(fd) as entries:
                for entry in entries:
                    try:
                        found.append((f"{path}/{entry.name}", entry.stat(follow_symlinks=False)))
                    except FileNotFoundError:
                        continue
        finally:
            os.close(fd)
        for inner, state in found:
            if stat.S_ISREG(state.st_mode):
                yield inner, state
            elif stat.S_ISDIR(state.st_mode) and depth > 1:
                yield from self.files(inner, depth - 1)

    @contextmanager
    def _folder_of(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that `path` lies in, and its name there."""
        *folders, name = path.split("/")
        at = self._fd
        try:
            for folder in folders:
                try:
                    inner = os.open(folder, _FOLDER, dir_fd=at)
                except FileNotFoundError:
                    if not make:
                        raise
                    self._make(folder, at)
                    inner = os.open(folder, _FOLDER, dir_fd=at)
                at, outer = inner, at
                if outer != self._fd:
                    os.close(outer)
            yield at, name
        finally:
            if at != self._fd:
                os.close(at)

    def _make(self, folder: str, at: int) -> None:
        try:
            os.mkdir(folder, 0o700, dir_fd=at)
            self._open_to_group(folder, at)
        except FileExistsError:  # another process was faster
            pass

    def _open_to_group(self, folder: str | Path, at: int | None = None) -> None:
        """Of a folder just made. By descriptor: by its name another may be found by now."""
        if not self.shared:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        try:
            state = os.fstat(fd)
            if state.st_uid == os.geteuid() and stat.S_IMODE(state.st_mode) & 0o777 == 0o700 and not os.listdir(fd):
                os.fchmod(fd, state.st_mode & 0o7000 | 0o770)
        finally:
            os.close(fd)
