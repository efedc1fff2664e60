"""``python -m kvlab.tierworker FD PID LEVEL``: serve the engine of process PID at the socket FD, log from LEVEL on."""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress

from kvlab.tierworker.link import Link
from kvlab.tierworker.server import TierServer


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    for each in (signal.SIGINT, signal.SIGTERM):  # meant for the engine, which then asks to close
        signal.signal(each, signal.SIG_IGN)
    with suppress(AttributeError, OSError):  # an engine may have bound itself to cores, on which it spins
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    form = f"%(levelname)s %(asctime)s [kvlab tier worker {os.getpid()}] %(message)s"
    logging.basicConfig(level=int(sys.argv[3]), format=form, datefmt="%m-%d %H:%M:%S")
    TierServer(Link(socket.socket(fileno=fd)), parent=parent).run()
    logging.shutdown()
    os._exit(0)  # a thread may be stuck in a store


main()
