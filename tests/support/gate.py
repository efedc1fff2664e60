"""A tier that answers when it is let to, in place of one that sleeps: no test waits for a time to pass."""

import threading

from kvlab.stores import Store
from kvlab.stores.wrappers import WrapperStore


class Gate(WrapperStore):
    """Every call waits until `is_open` is set."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.is_open = threading.Event()

    def _around(self, method: str, num_bytes: int) -> None:
        assert self.is_open.wait(200)
