"""The file that is a folder's lock and journal, opened so that nothing else in its place is ever locked or written."""

import errno
import os
import stat

from kvlab.stores.disk.names import BROKEN, PRIVATE, WRITING
from kvlab.stores.disk.root import RefusedError, Root

JOURNAL = f"{PRIVATE}/journal"


def open_journal(root: Root) -> tuple[int, bool]:
    """Its descriptor, and whether the folder lies on a file system that is mounted read-only. One without a journal has
    an empty one in memory then, which locks no other process out: none can change the folder there."""
    root.open()
    try:
        for folder in (PRIVATE, WRITING, BROKEN):
            try:
                root.make_folder(folder)
            except NotADirectoryError:
                raise RefusedError(f"{root.path / folder} is in the place of a folder; remove it") from None
        return _opened(root, os.O_RDWR | os.O_CREAT | os.O_APPEND), False
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    try:
        return _opened(root, os.O_RDONLY), True
    except FileNotFoundError:
        return os.memfd_create("kvlab-journal"), True


def _opened(root: Root, flags: int) -> int:
    journal = root.path / JOURNAL
    try:
        fd = root.open_file(JOURNAL, flags)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise RefusedError(f"{journal} is in the place of a plain file; remove it") from None
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise RefusedError(f"{journal} is no file of its own, but a pipe, a device or a hard link; remove it")
        root.check(state, journal)
    except BaseException:
        os.close(fd)
        raise
    return fd
