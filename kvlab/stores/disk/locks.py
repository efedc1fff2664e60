"""Do file locks hold between the processes and hosts that share a folder? That one is granted does not tell.

python -m kvlab.stores.disk.locks /mnt/kv --hold 60     on one host
python -m kvlab.stores.disk.locks /mnt/kv               on another, meanwhile: exits with 0 if the lock is held
"""

import argparse
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

from kvlab.errors import StoreError
from kvlab.system import fcntl

PROBE = "kvlab-lock-probe"
SIGHT_S = 60.0


def exclude(one: Path, other: Path) -> bool:
    """Whether a lock on a file of the folder `one` is seen in `other`: the same folder, or another mount of it."""
    name = f".{PROBE}-{secrets.token_hex(8)}"
    os.close(os.open(one / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # an open file may be unseen elsewhere
    held = asks = -1
    try:
        held, asks = os.open(one / name, os.O_RDWR), _seen(other / name)
        if not _locks(held):
            raise StoreError(f"no file can be locked under {one}", reason="locked")
        return not _locks(asks)
    finally:
        for fd in (held, asks):
            if fd >= 0:
                os.close(fd)
        with suppress(OSError):
            os.unlink(one / name)


def _seen(path: Path) -> int:
    """Open a file that may come into sight only after a while."""
    end = time.monotonic() + SIGHT_S
    while True:
        try:
            return os.open(path, os.O_RDWR)
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def require_locks(folder: Path) -> None:
    """Raise StoreError where two openings of one file get the same lock at once: the budget could not be kept."""
    if not exclude(folder, folder):
        raise StoreError(f"file locks under {folder} exclude no one: give each process its own folder", reason="locks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS")
    options = parser.parse_args()
    fd = os.open(options.folder / f".{PROBE}", os.O_RDWR | os.O_CREAT, 0o660)
    granted = _locks(fd)
    print("granted" if granted else "held by another process: locks are shared", flush=True)
    if options.hold and granted:
        time.sleep(options.hold)
        os.unlink(options.folder / f".{PROBE}")
    sys.exit(0 if granted is bool(options.hold) else 1)


def _locks(fd: int) -> bool:
    assert fcntl is not None  # the package is not imported without it
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
