"""A load between steps that has not ended, and who may decide on its pages."""

import threading
import time
from typing import Literal

from kvlab.connectors.vllm.messages import RequestLoad

Claimant = Literal["load", "timeout"]


class PendingLoad:
    """The first claimant has the load: the thread that carries it out, or the timeout. The thread claims it before it
    writes to pages. So they are not written once the request was told that its load failed: they may be another's."""

    def __init__(self, load: RequestLoad) -> None:
        self.load = load
        self._asked = time.perf_counter()
        self._lock = threading.Lock()
        self._claimant: Claimant | None = None

    def claim(self, claimant: Claimant) -> bool:
        """Whether the load is this claimant's."""
        with self._lock:
            self._claimant = self._claimant or claimant
            return self._claimant == claimant

    def waited_s(self) -> float:
        """Seconds since the request began to wait."""
        return time.perf_counter() - self._asked
