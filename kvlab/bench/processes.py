"""Processes of one's own that are always ended, with all they started; and what they used, from /proc."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def start(command: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `command` as the leader of a session of its own, so that it can be ended with its children."""
    return subprocess.Popen(
        command, env=dict(env), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )


def end(process: subprocess.Popen[bytes], patience_s: float = 15.0) -> None:
    """End `process` and its session: asked first, killed after `patience_s`. Returns when nothing of it runs."""
    deadline = time.monotonic() + patience_s
    try:
        _signal_session(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and members(process.pid):
            process.poll()  # reaps it
            time.sleep(0.05)
    finally:  # also when a second interrupt comes while we wait
        while members(process.pid):
            _signal_session(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.02)
        process.wait()


def members(session: int) -> list[int]:
    """Process ids that run in `session`; those that have ended and wait to be reaped are not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and (stat := _stat(int(entry.name)))
            and int(stat[3]) == session
            and stat[0] not in "ZX"
        ):
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


def _signal_session(session: int, number: int) -> None:
    for pid in members(session):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
