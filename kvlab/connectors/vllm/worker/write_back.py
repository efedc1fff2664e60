"""When saved objects are written back to the secondary tiers: while the engine launches no prefill."""

import threading
import time
from collections.abc import Callable

from kvlab.connectors.vllm.messages import SaveOp
from kvlab.threads import Threads

MAX_DELAY_S = 0.5  # upper bound on deferring a write while prefills run
IDLE_S = 0.03  # no step has begun for so long: nothing is being launched
DECODE_STEPS = 2  # steps without a prefill: during the first one, the engine handles the prefill's output


class WriteBackQueue:
    """Calls `write` for one object after another, in a thread of its own.

    A prefill is launched in thousands of calls, each of which releases the GIL; a thread that takes it in between
    delays the prefill (`benchmarks/launch_stalls.py`). So a write waits for a step that only decodes, or for an idle
    engine, and at most `max_delay_s`.
    """

    def __init__(self, write: Callable[[SaveOp], None], *, max_delay_s: float = MAX_DELAY_S) -> None:
        self._write = write
        self._max_delay_s = max_delay_s
        self._num_steps = 0
        self._since_prefill = DECODE_STEPS
        self._only_decodes = threading.Event()
        self._only_decodes.set()
        self._thread = Threads(1, "kvlab-write")

    def begin_step(self, prefill_tokens: int) -> None:
        """A step with so many tokens of prompts begins."""
        self._num_steps += 1
        self._since_prefill = 0 if prefill_tokens else self._since_prefill + 1
        if self._since_prefill == 0:
            self._only_decodes.clear()
        elif self._since_prefill == DECODE_STEPS:
            self._only_decodes.set()

    def put(self, op: SaveOp) -> None:
        self._thread.submit(self._write_later, op, time.monotonic() + self._max_delay_s)

    def flush(self) -> None:
        """Wait until all that is queued is written."""
        self._thread.submit(lambda: None).result()

    def close(self, *, stall_s: float) -> bool:
        """Finish what is queued. False if one write takes longer than `stall_s` seconds; the rest is lost then."""
        self._only_decodes.set()
        return self._thread.close(stall_s=stall_s)

    def _write_later(self, op: SaveOp, deadline: float) -> None:
        while (left := deadline - time.monotonic()) > 0:
            begun = self._num_steps
            if self._only_decodes.wait(min(left, IDLE_S)) or self._num_steps == begun:
                break
        self._write(op)
