"""What do the secondary tiers hold? Asked in the background, so that a slow tier never holds up the scheduler."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.hashing import Namespace
from kvlab.stores import Store

logger = logging.getLogger("vllm.kvlab")
INLINE_WAIT_S = 0.001  # an answer this fast saves the request one trip through the scheduler
KEPT_KEYS = 1 << 16


class LatestKeys:
    """A set of object hashes that forgets the oldest beyond `KEPT_KEYS`."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}  # the oldest first

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, key: bytes) -> None:
        self.discard(key)
        self._keys[key] = None
        if len(self._keys) > KEPT_KEYS:
            del self._keys[next(iter(self._keys))]

    def discard(self, key: bytes) -> None:
        self._keys.pop(key, None)

    def clear(self) -> None:
        self._keys.clear()


class KnownSecondary(LatestKeys):
    """The objects that the secondary tiers were last known to hold: a lookup found them, or a write succeeded. They are
    not written again. What a tier has lost since is learned at the next lookup, which comes before any load."""

    def learn(self, keys: Iterable[bytes], answer: Mapping[bytes, bool]) -> None:
        """From what they said of a prompt's objects. Of those behind a hole they were not asked: these may be lost."""
        for key in keys:
            if answer.get(key):
                self.add(key)
            else:
                self.discard(key)


class Lookup:
    """Existence of objects in `store` under every rank's namespace, one thread, a deadline per request."""

    def __init__(
        self,
        store: Store | None,
        chunker: Chunker,
        namespaces: Sequence[Namespace],
        timeout_s: float,
        admission: LoadAdmission,
        known_secondary: KnownSecondary,
        counters: Counter[str],
    ) -> None:
        self._store = store
        self._chunker = chunker
        self._namespaces = namespaces
        self._timeout_s = timeout_s
        self._admission = admission
        self._known_secondary = known_secondary
        self._counters = counters
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvlab-lookup")
        self._asked: deque[tuple[list[bytes], Future[dict[bytes, bool]]]] = deque()  # in the order of their answers

    def ask(
        self, state: RequestState, rest: bytes | None, in_memory: Callable[[bytes], bool], num_tokens: int
    ) -> dict[bytes, bool] | None:
        """Which of a request's objects are there; None while there is no answer; {} once it is late, failed or not
        worth waiting for. `rest` names a last block that the prompt fills in part, `num_tokens` could be loaded."""
        self._learn()
        state.not_awaited = False
        wait_s = 0.0
        if state.lookup is None:
            hashes = list(state.hashes)
            state.lookup = self._pool.submit(self._query, self._namespaces, hashes, rest, in_memory)
            state.lookup_started_s = time.monotonic()
            self._asked.append((hashes if rest is None else [*hashes, rest], state.lookup))
            if self._admission.is_worth_waiting(num_tokens, INLINE_WAIT_S):
                wait_s = INLINE_WAIT_S  # once: those that run would wait with it at every step
        try:
            known: dict[bytes, bool] = state.lookup.result(timeout=wait_s)
        except TimeoutError:
            state.not_awaited = not self._admission.is_worth_a_step(num_tokens)
            late = self.is_overdue(state)
            if not (late or state.not_awaited):
                return None
            self._counters["lookup_late"] += late
            return {}
        except Exception as error:
            self._counters["lookup_failed"] += 1
            logger.warning("kvlab: lookup in secondary tiers failed: %s", error)
            return {}
        self._learn()
        return known

    def _learn(self) -> None:
        """From answers that have come, also those that nobody waited for."""
        while self._asked and self._asked[0][1].done():
            keys, answer = self._asked.popleft()
            if answer.exception() is None:
                self._known_secondary.learn(keys, answer.result())
                self._admission.answered(held=any(answer.result().values()))

    def is_overdue(self, state: RequestState) -> bool:
        """Whether the request has waited long enough; the clock starts with the first question."""
        if not state.lookup_started_s:
            state.lookup_started_s = time.monotonic()
        return time.monotonic() - state.lookup_started_s > self._timeout_s

    def restart(self, namespaces: Sequence[Namespace]) -> None:
        """Ask under other namespaces from now on; answers to earlier questions are not learned from."""
        self._namespaces = namespaces
        self._asked.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _query(
        self,
        namespaces: Sequence[Namespace],
        hashes: list[bytes],
        rest: bytes | None,
        in_memory: Callable[[bytes], bool],
    ) -> dict[bytes, bool]:
        """In the thread: chunks first, then the tails that could follow the run."""
        step = self._chunker.chunk_blocks
        chunks = hashes[step - 1 :: step]
        known = self._held(namespaces, chunks)
        run = next((i for i, key in enumerate(chunks) if not known[key] and not in_memory(key)), len(chunks))
        tails = hashes[run * step : (run + 1) * step]
        if rest is not None and run == len(chunks):
            tails.append(rest)
        return known | self._held(namespaces, tails)

    def _held(self, namespaces: Sequence[Namespace], hashes: Sequence[bytes]) -> dict[bytes, bool]:
        if self._store is None or not hashes:
            return {}
        held = [True] * len(hashes)
        for namespace in namespaces:
            found = self._store.contains_many([namespace.key(key) for key in hashes])
            held = [a and b for a, b in zip(held, found, strict=True)]
        return dict(zip(hashes, held, strict=True))
