"""The addresses of a host, by a deadline.

The system's resolver has no deadline: a name server that is silent costs 30 s and more. A server of a cluster, or a
sentinel, may name any host, so a name is looked up in a thread, which is left to itself when the time is over.
"""

import queue
import socket
import threading
import time
from typing import Any, TypeAlias

from kvlab.stores.forks import ForkAware

Found: TypeAlias = list[tuple[int, Any]]  # families and socket addresses
MOST_LOOKUPS = 32  # at once: servers that name ever other hosts do not make ever more threads


class _Lookups(ForkAware):
    """Room for look-ups; a forked child, where none of the threads is, has all of it."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        self.room = threading.BoundedSemaphore(MOST_LOOKUPS)


_lookups = _Lookups()


def time_left(deadline: float) -> float:
    """Seconds until `deadline`; TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed")
    return left


def addresses_of(host: str, port: int, deadline: float) -> Found:
    """Where `host` is. TimeoutError if no name server says so by `deadline`, socket.gaierror if it has no address."""
    try:
        return _ask(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    room = _lookups.room
    if not room.acquire(timeout=time_left(deadline)):
        raise TimeoutError("too many other host names are being looked up")
    answer: queue.SimpleQueue[Found | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answer.put(_ask(host, port, 0))
        except Exception as error:
            answer.put(error)
        finally:
            room.release()

    try:
        threading.Thread(target=look_up, daemon=True, name="kvlab-lookup").start()
    except RuntimeError as error:
        room.release()
        raise OSError(f"no thread looks up a host name: {error}") from error
    try:
        found = answer.get(timeout=time_left(deadline))
    except queue.Empty:
        raise TimeoutError("no name server gives an address in time") from None
    if isinstance(found, Exception):
        raise found
    return found


def _ask(host: str, port: int, flags: int) -> Found:
    return [(found[0], found[4]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]
