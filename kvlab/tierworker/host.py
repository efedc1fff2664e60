"""`CacheServer`: one process whose tiers the engines of a host share. `kvlab serve` runs it."""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path

from kvlab.errors import ConfigError
from kvlab.stores import Store
from kvlab.stores.closing import close_store
from kvlab.threads import Threads
from kvlab.tierworker.budget import Budget, Limits
from kvlab.tierworker.link import Link
from kvlab.tierworker.loans import Lender
from kvlab.tierworker.lockfile import hold
from kvlab.tierworker.rows import held
from kvlab.tierworker.server import DRAIN_S, TierServer

logger = logging.getLogger("kvlab.serve")
MAX_ENGINES = 256
LOOK_S = 0.2
LINE_INTERVAL_S = 60.0
FIRST_LINE_S = 1.0  # that the tiers are waited for at the start
LEAVE_S = 5.0  # for sessions to end, when the server stops, besides the time for their writes
MOST_PATH_BYTES = 106  # of a socket's address, less one for the mark of its making


class CacheServer:
    """Engines attach at the socket `path`, which this user alone can open; each is served by threads of its own and
    shares its slots of memory with this process. `store` is what all of them read and write; the server closes it."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        self.path = path
        if not path.is_absolute():
            raise ConfigError(f"--listen must be an absolute path, got {str(path)!r}")
        if (length := len(os.fsencode(path))) > MOST_PATH_BYTES:
            raise ConfigError(f"--listen must have at most {MOST_PATH_BYTES} bytes, as sockets' paths; got {length}")
        self.limits = Limits(Budget(store))
        self._lender = Lender(store)
        self._lock = hold(path)  # until the process ends
        self._socket = _listen(path)
        self._inode = path.lstat().st_ino
        self._sessions: dict[str, tuple[TierServer, threading.Thread]] = {}  # by token
        self._is_stopped = threading.Event()
        self._lines = Threads(1, "kvlab-line")
        self._line: Future[None] = Future()
        self._next_line_s = 0.0
        self._refused_at = -LINE_INTERVAL_S
        self.num_attached = 0  # engines since the start

    @property
    def num_engines(self) -> int:
        return sum(thread.is_alive() for _, thread in list(self._sessions.values()))

    def run(self) -> None:
        """Serve until `stop`; then write what is queued, end the sessions and close the store. Asks no tier itself, as
        one may hang."""
        self._ask_for_line()
        wait([self._line], FIRST_LINE_S)  # so that it comes before what engines do
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while not self._is_stopped.is_set():
            if poller.poll(LOOK_S * 1e3):
                self._accept()
            self._forget_ended()
            if time.monotonic() >= self._next_line_s and self._line.done():
                self._ask_for_line()
        self._end()

    def _ask_for_line(self) -> None:
        self._next_line_s = time.monotonic() + LINE_INTERVAL_S
        self._line = self._lines.submit(self.log)

    def stop(self) -> None:
        """May be called from a signal handler."""
        self._is_stopped.set()

    def log(self) -> None:
        """A line of what is held and who is there, from the tiers, whose size may have changed."""
        self.limits.on_the_way.ask()
        tiers = ", ".join(f"{row['tier']} {held(row)}" for row in self.store.rows())
        logger.info("kvlab serve: %d engines; %s", self.num_engines, tiers)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError as error:  # as without a free file descriptor
            self._refuse(f"an engine could not attach: {error}")
            self._is_stopped.wait(LOOK_S)
            return
        if len(self._sessions) >= MAX_ENGINES and not self._makes_room():
            self._refuse(f"{MAX_ENGINES} engines are attached; another is turned away")
            sock.close()
            return
        token = os.urandom(16).hex()
        session = TierServer(
            Link(sock), store=self.store, token=token, is_over=self._is_over, limits=self.limits, lender=self._lender
        )
        thread = threading.Thread(target=session.run, name="kvlab-session", daemon=True)
        self._sessions[token] = (session, thread)  # before it can say its token: an unknown one counts as over
        try:
            thread.start()
        except RuntimeError as error:
            del self._sessions[token]
            self._refuse(f"an engine could not attach: {error}")
            sock.close()
            return
        self.num_attached += 1

    def _makes_room(self) -> bool:
        """End the oldest session that has not said what it wants, if there is one. Those that are ending have threads
        too, so there is room for as many again."""
        sessions = [session for session, _ in self._sessions.values() if session.is_silent]
        if not sessions or len(self._sessions) >= 2 * MAX_ENGINES:
            return False
        sessions[0].leave()
        return True

    def _refuse(self, why: str) -> None:
        """Logged once a minute: a client may ask without end."""
        if time.monotonic() - self._refused_at > LINE_INTERVAL_S:
            self._refused_at = time.monotonic()
            logger.warning("kvlab serve: %s", why)

    def _is_over(self, token: str) -> bool:
        """Whether nothing of this session touches its engine's memory any more. One that is unknown was of a server
        that had the lock before."""
        session = self._sessions.get(token)
        return session is None or (not session[1].is_alive() and not session[0].touches_memory)

    def _forget_ended(self) -> None:
        for token in [token for token in self._sessions if self._is_over(token)]:
            session, _ = self._sessions.pop(token)
            session.give_back()

    def _end(self) -> None:
        sessions = list(self._sessions.values())
        for session, _ in sessions:
            session.leave()
        start = time.monotonic()
        for session, thread in sessions:
            while thread.is_alive() and time.monotonic() < start + LEAVE_S + DRAIN_S * (session.num_queued > 0):
                thread.join(0.05)
        if dropped := sum(session.num_dropped for session, _ in sessions):
            logger.warning("kvlab serve: %d writes of engines were not done in time and are dropped", dropped)
        close_store(self.store)
        self.leave_place()

    def leave_place(self) -> None:
        """Remove the socket, if it is there and not another server's."""
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        self._socket.close()


def _listen(path: Path) -> socket.socket:
    """A socket that this user alone can open, and that takes connections once it lies at `path`; the lock is held.
    ConfigError where the place cannot be used."""
    made = Path(f"{path}~")
    for place in (path, made):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(place.lstat().st_mode):
                place.unlink()  # of a server that was killed
    listening = socket.socket(socket.AF_UNIX)
    mask, is_bound = os.umask(0o177), False
    try:
        listening.bind(str(made))
        is_bound = True
        listening.listen(64)
        if os.path.lexists(path):
            raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        made.rename(path)
    except OSError as error:
        listening.close()
        if is_bound:
            made.unlink(missing_ok=True)
        raise ConfigError(f"cannot listen at {str(path)!r}: {error.strerror or error}") from error
    finally:
        os.umask(mask)
    return listening
