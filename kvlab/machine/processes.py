"""Processes of one's own that are always ended, with all they started; and what they used, from /proc."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GUARD = """
import sys
sys.path.insert(0, sys.argv[1])
from kvlab.machine.processes import end_session
sys.stdin.buffer.read()
end_session(int(sys.argv[2]))
"""


class Child:
    """`command`, started as the leader of a session of its own, so that it can be ended with its children.

    A guard watches: should this process be killed outright, as a notebook's kernel is, it ends the session.
    """

    def __init__(
        self, command: Sequence[str], log: IO[bytes], env: Mapping[str, str] | None = None, *, told: bool = False
    ) -> None:
        """`told`: its input is a pipe that `tell` writes to; otherwise it has none."""
        quiet = subprocess.DEVNULL
        source = subprocess.PIPE if told else quiet
        self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=source, start_new_session=True)
        self.pid: int = self._process.pid
        package = str(Path(__file__).resolve().parents[2])
        guard = [sys.executable, "-c", _GUARD, package, str(self.pid)]
        try:  # its stdin closes when we end, however we end
            self._guard = subprocess.Popen(
                guard, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
            )
        except BaseException:
            end_session(self.pid, reap=self._process)
            raise

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def tell(self, line: str) -> None:
        """Write one line to its input. Raises BrokenPipeError if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        _signal(self.pid, signal.SIGKILL)
        self.end()

    def end(self, patience_s: float = 15.0) -> None:
        """End it and all of its session: asked first, killed after `patience_s`. Returns when nothing of it runs."""
        try:
            end_session(self.pid, patience_s, reap=self._process)
        finally:
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._process.wait()
            self._guard.wait()


def end_session(session: int, patience_s: float = 15.0, reap: subprocess.Popen[bytes] | None = None) -> None:
    """End every process of `session`; `reap` is its leader where that is our own child."""
    deadline = time.monotonic() + patience_s
    try:
        _signal(session, signal.SIGTERM)
        while time.monotonic() < deadline and members(session):
            if reap is not None:
                reap.poll()
            time.sleep(0.05)
    finally:  # also when a second interrupt comes while we wait
        while members(session):
            _signal(session, signal.SIGKILL)
            if reap is not None:
                reap.poll()
            time.sleep(0.02)


def members(session: int) -> list[int]:
    """Process ids that run in `session`; those that have ended and wait to be reaped are not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        stat = _stat(int(entry.name)) if entry.name.isdigit() else None
        if stat is not None and int(stat[3]) == session and stat[0] not in "ZX":
            found.append(int(entry.name))
    return found


def usage(session: int) -> tuple[float, int]:
    """CPU seconds used so far and bytes resident now, over all of a session's processes."""
    stats = [stat for pid in members(session) if (stat := _stat(pid))]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / _TICK, sum(int(stat[21]) for stat in stats) * _PAGE


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (field 3 in proc(5)); None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _signal(session: int, number: int) -> None:
    for pid in members(session):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
