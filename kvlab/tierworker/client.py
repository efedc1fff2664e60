"""`TierClient`: the engine's side. It sends small messages, takes answers where it is polled, and never waits."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from kvlab.errors import ConfigError, StoreError
from kvlab.sharedmemory import LentMemory, SharedSlots
from kvlab.tierworker import process
from kvlab.tierworker.link import LinkError, Message
from kvlab.tierworker.messages import Ask, Fill, Memory, Opening, Write, message_of, raised_by

logger = logging.getLogger("vllm.kvlab")
Answered: TypeAlias = Callable[[Message | None, bytes], None]  # the answer; None if none will come

START_S = 120.0  # for the tiers to open at the engine's start
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # before a worker that died is started again
SOUND_S = 60.0  # a worker that lives so long is no sign of trouble any more
STUCK_S = 300.0  # for the answer to one request: then it hangs
MAX_QUEUED_BYTES = 4 << 20  # of messages that the worker has not taken
MAX_WRITES = 4096  # under way
END_S = 5.0  # for a worker that has said it is done, or is killed
GRACE_S = 35.0  # for one that drains: longer than it waits for a write by itself
LOAD_GRACE_S = 10.0  # where it has nothing to write: longer than it waits for a load


class TierClient:
    """Starts a tier worker for `opening` and talks to it, or with `path` attaches to the cache server that listens
    there; raises what the worker raised when it opened the tiers.

    An answer is handed to the function that was given with the request, within `poll`. A worker that dies, or hangs,
    is killed; what was under way is answered with None once it is known to be dead, so that no slot is used again while
    it may still be written to. Then another one is started, after a growing wait. Requests meanwhile are answered with
    None at once.
    """

    def __init__(self, opening: Opening, *, path: str = "") -> None:
        self.counters: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] | None = None  # of the tiers, the latest that have not been taken
        self.opening = opening
        self._path = path
        self.lent: LentMemory | None = None  # of the cache server, as it was when this began
        self.session = 0  # grows whenever the worker or the server is another one
        self._lends = False  # this session's memory is `lent`
        self._memory: tuple[Memory, SharedSlots] | None = None
        self._waiting: dict[int, tuple[Answered, float]] = {}  # with the time of the request, the oldest first
        self._num_writes = 0
        self._next_id = 1
        self._is_open = False  # requests may be sent
        self._opening_since: float | None = None
        self._is_dying = False
        self._is_closed = False
        self._wait_s = FIRST_WAIT_S
        self._restart_at = 0.0
        self._started_at = time.monotonic()
        self._worker = self._start()
        self._finish_opening()

    # ---- requests

    def share(self, memory: Memory, slots: SharedSlots) -> None:
        """Let the worker map these slots."""
        self._memory = (memory, slots)
        if self._is_open:
            self._send(message_of(memory), fd=slots.fd)

    def next_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def fill(self, fill: Fill, answered: Answered) -> None:
        """The answer's ``tier`` is the name of the tier that had the object; empty for a miss."""
        self._request(fill, answered)

    @property
    def lends(self) -> bool:
        """Whether a `Fill` may be answered with a place in `lent`."""
        return self._is_open and self._lends

    def has_kept(self, session: int) -> bool:
        """Whether what was lent in this session is still where it was: as the server keeps it there until it has closed
        the socket."""
        return self._is_open and session == self.session and self._worker.link.is_up

    def give_back(self, session: int, numbers: list[int]) -> None:
        """The objects that were lent in answer to these requests are not used any more."""
        if numbers and self._is_open and session == self.session:
            self._send({"op": "give_back", "ids": numbers})

    def write(self, write: Write, answered: Answered) -> None:
        """The answer's ``ok`` says whether a tier holds the object. Dropped (None, counted) where too many wait."""
        is_full = self._num_writes >= MAX_WRITES or self._worker.link.queued_bytes > MAX_QUEUED_BYTES
        if is_full and self._is_open:
            self.counters["writes_dropped"] += 1
            answered(None, b"")
            return
        self._num_writes += 1

        def ended(message: Message | None, data: bytes) -> None:
            self._num_writes -= 1
            answered(message, data)

        self._request(write, ended)

    def ask(self, ask: Ask, data: bytes, answered: Answered) -> None:
        """`data`: the hashes and flags that `Ask` names. The answer has a byte for each hash: 0 was not asked for, 1 is
        missing, 2 is there; and why the object of hash number ``at`` is ``missing``."""
        self._request(ask, answered, data)

    def _request(self, request: Fill | Write | Ask, answered: Answered, data: bytes = b"") -> None:
        if not self._is_open:
            answered(None, b"")
            return
        self._waiting[request.id] = (answered, time.monotonic())
        self._send(message_of(request), data)

    def _send(self, message: Message, data: bytes = b"", *, fd: int = -1) -> None:
        try:
            self._worker.link.send(message, data, fd=fd)
        except LinkError as error:
            self._lost(error)

    # ---- answers

    @property
    def has_waiting(self) -> bool:
        """Whether requests have no answer yet."""
        return bool(self._waiting)

    def poll(self) -> None:
        """Hand out the answers that have come. Takes microseconds, and raises nothing: a worker that cannot be
        understood is lost."""
        try:
            self._poll()
        except Exception as error:
            if self.counters["tier_worker_deaths"] == 0:
                logger.exception("kvlab: the tier worker is not understood")
            self._lost(error)

    def _poll(self) -> None:
        if self._is_open or (self._opening_since is not None):
            self._receive()
        if self._opening_since is not None and time.monotonic() - self._opening_since > START_S:
            self._lost(LinkError(f"its tiers are not open after {START_S:g} s"))
        if self._is_dying:
            self._bury()
        elif not self._is_open and self._opening_since is None and not self._is_closed:
            self._restart()

    def name_of(self, tier: str) -> str:
        """What an engine calls a tier; one of a cache server, whose memory is not the engine's, is ``serve:...``."""
        return f"serve:{tier}" if tier and self._path else tier

    def wait(self, timeout_s: float) -> None:
        """`poll`, as soon as something comes, and after `timeout_s` at the latest."""
        if self._is_open and self._worker.link.wait(timeout_s):
            self.poll()

    def _receive(self) -> None:
        link = self._worker.link
        try:
            if link.queued_bytes:
                link.flush()
            messages = link.receive()
        except LinkError as error:
            self._lost(error)
            return
        oldest = next(iter(self._waiting.values()), None)
        if not messages and oldest is not None and time.monotonic() - oldest[1] > STUCK_S:
            self._lost(LinkError(f"no answer for {STUCK_S:g} s"))
            return
        for message, data in messages:
            self._take(message, data)

    def _take(self, message: Message, data: bytes) -> None:
        op = message.get("op")
        if op == "tiers":
            self.rows = [{**row, "tier": self.name_of(row["tier"])} for row in message["rows"]]
        elif op == "ready":
            self._opened(message)
        elif op == "failed":
            logger.warning("kvlab: the tiers could not be opened again: %s", raised_by(message))
            self._lost(LinkError("the tiers could not be opened"))
        elif (waiting := self._waiting.pop(message.get("id", 0), None)) is not None:
            waiting[0](message, data)

    # ---- life and death

    def _start(self) -> process.Started | process.Attached:
        self._opening_since = self._started_at = time.monotonic()
        self.session += 1
        worker = process.Attached(self._path) if self._path else process.start(logger.getEffectiveLevel())
        try:
            worker.link.send(message_of(self.opening))
        except LinkError as error:
            worker.kill()
            raise StoreError(f"the tier worker ended at its start: {error}", reason="not_started") from None
        return worker

    def _finish_opening(self) -> None:
        """At the engine's start: wait until the tiers are open."""
        deadline = time.monotonic() + START_S
        while not self._is_open:
            try:
                self._worker.link.wait(deadline - time.monotonic())
                messages = self._worker.link.receive()
            except LinkError as error:
                self._worker.kill()
                raise StoreError(f"the tier worker ended at its start: {error}", reason="not_started") from None
            for message, data in messages:
                if message.get("op") == "failed":
                    self._worker.kill()
                    raise raised_by(message)
                self._take(message, data)
            if not self._is_open and time.monotonic() > deadline:
                self._worker.kill()
                raise StoreError(f"the tiers could not be opened within {START_S:g} s", reason="timeout")

    def _opened(self, message: Message) -> None:
        if isinstance(self._worker, process.Attached):
            self._worker.token = str(message.get("token", ""))
            self._map(message.get("lends"))
        self._opening_since, self._is_open = None, True
        if self._memory is not None:
            self._send(message_of(self._memory[0]), fd=self._memory[1].fd)

    def _map(self, num_bytes: object) -> None:
        """Map what the server lends. Another server's memory is left alone: to map it for the GPU takes seconds."""
        self._lends = False
        if type(num_bytes) is not int or num_bytes <= 0:
            return
        try:
            lent = LentMemory(self._worker.link.take_fd(), num_bytes)
        except ConfigError as error:
            logger.warning("kvlab: the cache server's memory is not used in place: %s", error)
            return
        if self.session == 1:
            self.lent = lent
        self._lends = self.lent is not None and self.lent.inode == lent.inode

    def _lost(self, error: Exception) -> None:
        """The worker is gone, or is to be."""
        if self._is_dying or self._is_closed:
            return
        self._is_open, self._is_dying, self._opening_since = False, True, None
        self.counters["tier_worker_deaths"] += 1
        logger.warning("kvlab: the tier worker is lost (%s); its tiers are missed until another is up", error)
        self._worker.kill()
        self._bury()

    def _bury(self) -> None:
        """Once the worker is dead, nothing writes to slots any more: what was under way has ended without an answer."""
        if not self._worker.is_dead:
            return
        self._is_dying = False
        self._worker.link.close()
        if time.monotonic() - self._started_at > SOUND_S:
            self._wait_s = FIRST_WAIT_S
        self._restart_at = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self._miss_all()

    def _miss_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for answered, _ in waiting.values():
            answered(None, b"")

    def _restart(self) -> None:
        if time.monotonic() < self._restart_at:
            return
        try:
            self._worker = self._start()
        except (StoreError, LinkError) as error:
            logger.warning("kvlab: %s", error)
            self._opening_since, self._restart_at = None, time.monotonic() + self._wait_s
            return
        self.counters["tier_worker_restarts"] += 1

    def close(self) -> bool:
        """Have the worker write what is queued and end. Whether it is known to be dead now."""
        if self._is_closed:
            return self._worker.is_dead
        was_open = self._is_open
        self._is_closed, self._is_open = True, False
        if not (was_open and self._drain() and self._worker.wait(END_S)):
            self._worker.kill()
        is_dead = self._worker.wait(END_S)
        self._worker.link.close()
        self._miss_all()
        return is_dead

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True) and hasattr(self, "_worker"):
            self._worker.link.close()  # then it ends by itself

    def _drain(self) -> bool:
        """Wait while the worker writes; no longer than `GRACE_S` without a sign of it. Whether it says that it is
        done, or is gone."""
        link = self._worker.link
        try:
            link.send({"op": "close"})
            since = time.monotonic()
            while time.monotonic() - since < (GRACE_S if self._num_writes else LOAD_GRACE_S):
                link.flush()
                if not link.wait(0.05):
                    continue
                since = time.monotonic()
                for message, data in link.receive():
                    if message.get("op") == "closed":
                        return True
                    self._take(message, data)
        except LinkError as error:
            logger.info("kvlab: the tier worker ended before it said so: %s", error)
            return True
        return False
