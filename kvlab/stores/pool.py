"""Connections to one server that wait for their next use."""

from collections.abc import Callable
from typing import Generic, TypeVar

from kvlab.stores.forks import ForkAware, Lock
from kvlab.stores.wire import Wire

C = TypeVar("C", bound=Wire)
IDLE_CONNECTIONS = 16


class Pool(ForkAware, Generic[C]):
    """`connect(deadline)` makes a connection where none is idle."""

    def __init__(self, connect: Callable[[float], C]) -> None:
        self._connect = connect
        self._idle: list[C] = []
        self._open: set[C] = set()
        self._lock = Lock()
        self.watch_forks()

    def take(self, deadline: float, *, new: bool = False) -> tuple[C, bool]:
        """A connection, and whether it was idle: it may have died meanwhile."""
        with self._lock:
            if self._idle and not new:
                return self._idle.pop(), True
        connection = self._connect(deadline)
        self._open.add(connection)
        return connection, False

    def give_back(self, connection: C) -> None:
        """To be used again: nothing of what was asked is on its way."""
        with self._lock:
            if len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        self.drop(connection)

    def drop(self, connection: C) -> None:
        self._open.discard(connection)
        connection.close()

    def close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            self.drop(connection)

    def after_fork_in_child(self) -> None:
        """Two processes on one connection would read each other's replies."""
        for connection in self._open:
            connection.drop()
        self._open, self._idle = set(), []
