"""Lists of keys that clients are reading: each holds as many names as there are objects, so there are few."""

import threading
from collections import OrderedDict
from collections.abc import Iterator


class Scans:
    """Up to `most` of all clients, and `most_of_one` of each; the oldest makes room."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._open: OrderedDict[tuple[object, int], Iterator[str]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: object, cursor: int) -> Iterator[str] | None:
        """The rest of a scan, which is the caller's now; None if it has made room for another."""
        with self._lock:
            return self._open.pop((client, cursor), None)

    def put(self, client: object, cursor: int, keys: Iterator[str]) -> None:
        with self._lock:
            self._open[client, cursor] = keys
            own = [scan for scan in self._open if scan[0] is client]
            for scan in own[: -self._most_of_one]:
                del self._open[scan]
            while len(self._open) > self._most:
                self._open.popitem(last=False)

    def end(self, client: object) -> None:
        """Those of a client that is gone."""
        with self._lock:
            for scan in [scan for scan in self._open if scan[0] is client]:
                del self._open[scan]
