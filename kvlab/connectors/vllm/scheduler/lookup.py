"""Asks the secondary tiers what they hold, in the background: a slow tier never delays the scheduler."""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvlab.chunking import Chunker, longest_prefix, query_prefix
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.requests import RequestState, SkipReason
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.errors import StoreError
from kvlab.hashing import Namespace
from kvlab.stores import Store
from kvlab.threads import Threads

logger = logging.getLogger("vllm.kvlab")
INLINE_WAIT_S = 0.001  # an answer this fast saves the request one trip through the scheduler


@dataclass(frozen=True)
class Answer:
    """What the secondary tiers said of a prompt's objects: which they hold, and why they lack the first that is missing
    everywhere."""

    held: dict[bytes, bool]
    missing: dict[bytes, str] = field(default_factory=dict)


class Lookup:
    """Existence of objects in `store` under every rank's namespace, one thread, a deadline per request."""

    def __init__(
        self,
        store: Store | None,
        chunker: Chunker,
        namespaces: Sequence[Namespace],
        timeout_s: float,
        admission: LoadAdmission,
        residency: Residency,
        counters: Counter[str],
    ) -> None:
        self._store = store
        self._chunker = chunker
        self._namespaces = namespaces
        self._timeout_s = timeout_s
        self._admission = admission
        self._residency = residency
        self._counters = counters
        self._thread = Threads(1, "kvlab-lookup")
        self._asked: deque[tuple[list[bytes], Future[Answer]]] = deque()  # in the order of their answers

    def ask(self, state: RequestState, partial_block: bytes | None, num_tokens: int) -> dict[bytes, bool] | None:
        """Which of a request's objects are there; None while there is no answer; {} if it is late, has failed or is not
        worth waiting for. `partial_block` names a last block that the prompt fills in part, `num_tokens`
        could be loaded."""
        self._learn()
        wait_s = 0.0
        if state.lookup is None:
            hashes = list(state.hashes)
            in_memory = frozenset(filter(self._residency.is_in_memory, hashes))
            state.lookup = self._thread.submit(self._query, self._namespaces, hashes, partial_block, in_memory)
            state.lookup_started_s = time.monotonic()
            self._asked.append((hashes if partial_block is None else [*hashes, partial_block], state.lookup))
            if self._admission.is_worth_waiting(num_tokens, INLINE_WAIT_S):
                wait_s = INLINE_WAIT_S  # the first time only: requests that run wait as well
        try:
            answer: Answer = state.lookup.result(timeout=wait_s)
        except TimeoutError:
            if not self._admission.is_worth_a_step(num_tokens):
                state.skip = SkipReason.NOT_WORTH_WAITING
            late = self.is_overdue(state)
            if not (late or state.skip):
                return None
            self._counters["lookup_late"] += late
            return {}
        except Exception as error:
            self._counters["lookup_failed"] += 1
            logger.warning("kvlab: lookup in secondary tiers failed: %s", error)
            return {}
        self._learn()
        state.missing = answer.missing
        return answer.held

    def _learn(self) -> None:
        """From answers that have come, also those that came too late for their request."""
        while self._asked and self._asked[0][1].done():
            keys, answer = self._asked.popleft()
            if not answer.cancelled() and answer.exception() is None:
                held = answer.result().held
                self._residency.learn(keys, held)
                self._admission.answered(held=any(held.values()))

    def is_overdue(self, state: RequestState) -> bool:
        """Whether the request has waited long enough; the clock starts with the first question."""
        if not state.lookup_started_s:
            state.lookup_started_s = time.monotonic()
        return time.monotonic() - state.lookup_started_s > self._timeout_s

    def restart(self, namespaces: Sequence[Namespace]) -> None:
        """Ask under other namespaces from now on; answers to earlier questions are dropped."""
        self._namespaces = namespaces
        self._asked.clear()

    def close(self) -> None:
        self._thread.close(cancel=True, stall_s=0.0)

    def _query(
        self,
        namespaces: Sequence[Namespace],
        hashes: list[bytes],
        partial_block: bytes | None,
        in_memory: frozenset[bytes],
    ) -> Answer:
        """In the thread: under every rank's namespace."""

        def contains_many(hashes: Sequence[bytes]) -> list[bool]:
            held = [self._store is not None] * len(hashes)
            if self._store is not None:
                for namespace in namespaces:
                    found = self._store.contains_many([namespace.key(key) for key in hashes])
                    held = [a and b for a, b in zip(held, found, strict=True)]
            return held

        step = self._chunker.chunk_blocks
        try:
            held = query_prefix(hashes, step, contains_many, elsewhere=in_memory, last=partial_block)
        except Exception:
            raise
        except BaseException as error:  # of a store of another package: it must not reach the scheduler as what it is
            raise StoreError(f"a store raised {type(error).__name__}", reason="raised") from error
        spans = longest_prefix(hashes, step, lambda key: key in in_memory or held.get(key, False))
        end = spans[-1].end_block if spans else 0
        wanted = hashes[end : end - end % step + step]  # the rest of the chunk behind the hit
        return Answer(held, {wanted[-1]: self._why_missing(namespaces[0].key(wanted[-1]))} if wanted else {})

    def _why_missing(self, key: str) -> str:
        try:
            return str(self._store.why_missing(key)) if self._store is not None else "never_stored"
        except BaseException as error:  # as above
            return f"raised_{type(error).__name__}"
