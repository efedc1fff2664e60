"""Starts a tier worker's process."""

import os
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kvlab.errors import StoreError
from kvlab.tierworker.link import Link, LinkError
from kvlab.tierworker.lockfile import ServersLock, beside

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
ASK_INTERVAL_S = 0.5  # between questions whether a lost session is over


@dataclass
class Started:
    """A tier worker's process and the link to it."""

    link: Link
    process: "subprocess.Popen[bytes]"

    @property
    def is_dead(self) -> bool:
        """Whether it is known to touch no memory any more."""
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def start(level: int) -> Started:
    """A new process, which knows this one's packages, sees no GPU and logs from `level` on. Raises StoreError where the
    system starts none."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise StoreError(f"cannot start the tier worker: {error}", reason="not_started") from error
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvlab.tierworker", str(theirs.fileno()), str(os.getpid()), str(level)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # what a terminal sends to the engine is the engine's
        )
    except OSError as error:
        ours.close()
        raise StoreError(f"cannot start the tier worker: {error}", reason="not_started") from error
    finally:
        theirs.close()
    return Started(Link(ours), process)


class Attached:
    """A session at the cache server that listens at `path`: another process, which lives on without this one.
    StoreError where none listens, or one of another user: who serves KV decides what a model says."""

    def __init__(self, path: str) -> None:
        self.link = _connected(path)
        self.token = ""  # of the session, once it is open
        self._path = path
        self._probe: Link | None = None  # on which it was asked whether the session is over
        self._asked_at = 0.0
        try:
            _check_owners(path, self.link.socket)
            self._lock = ServersLock(path)
        except StoreError:
            self.link.close()
            raise
        except OSError as error:
            self.link.close()
            raise StoreError(f"no cache server has its lock beside {path!r}", reason="refused") from error

    @property
    def is_dead(self) -> bool:
        """Whether the session is known to touch no memory any more: its server has ended, or says so. That no server
        can be reached says nothing: its socket may have been removed. Asks without waiting: look again."""
        if not self.token or self._lock.is_free():  # without a token it was never given memory
            return True
        try:
            if self._probe is not None:
                messages = self._probe.receive()
                if not messages and time.monotonic() - self._asked_at < ASK_INTERVAL_S:
                    return False
                self._drop_probe()
                return self._lock.is_in_place() and any(message.get("is_over") is True for message, _ in messages)
            if time.monotonic() - self._asked_at >= ASK_INTERVAL_S:
                self._asked_at = time.monotonic()
                self._probe = _connected(self._path)
                self._probe.send({"op": "over", "token": self.token})
        except (LinkError, StoreError):
            self._drop_probe()
        return False

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self._lock.close()

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def kill(self) -> None:
        self.link.close()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.is_dead:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def _check_owners(path: str, sock: socket.socket) -> None:
    """StoreError unless the socket, the folder it lies in, its lock and the process that listens belong to this user or
    to root."""
    place = Path(path)
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    owners = {
        f"the process that listens at {path!r}": _CREDENTIALS.unpack(peer)[1],
        f"the socket {path!r}": place.lstat().st_uid,
        f"the folder of the socket {path!r}": place.parent.stat().st_uid,
        f"the lock beside {path!r}": beside(place).lstat().st_uid,
    }
    for what, owner in owners.items():
        if owner not in (0, os.geteuid()):
            raise StoreError(
                f"{what} belongs to user {owner}, this process runs as {os.geteuid()}: its KV is not to be trusted; "
                "start kvlab serve as the engine's user, in a folder of that user",
                reason="foreign",
            )


def _connected(path: str) -> Link:
    try:
        sock = socket.socket(socket.AF_UNIX)
    except OSError as error:
        raise StoreError(f"cannot ask the cache server at {path!r}: {error}", reason="no_descriptor") from error
    sock.setblocking(False)
    try:
        sock.connect(path)
    except BlockingIOError as error:  # more than it accepts are waiting
        sock.close()
        raise StoreError(f"the cache server at {path!r} is busy", reason="busy") from error
    except OSError as error:
        sock.close()
        hint = f"start one with: kvlab serve --listen {path}"
        raise StoreError(f"no cache server listens at {path!r} ({error.strerror}); {hint}", reason="refused") from error
    return Link(sock)
