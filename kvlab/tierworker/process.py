"""Starts a tier worker's process."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from kvlab.errors import StoreError
from kvlab.tierworker.link import Link


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
    ours, theirs = socket.socketpair()
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvlab.tierworker", str(theirs.fileno()), str(os.getpid()), str(level)],
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
