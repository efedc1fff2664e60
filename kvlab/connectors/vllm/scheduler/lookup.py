"""Asks the secondary tiers what they hold: a slow tier never delays the scheduler."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.requests import RequestState, SkipReason
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.link import Message
from kvlab.tierworker.messages import Ask

logger = logging.getLogger("vllm.kvlab")
INLINE_WAIT_S = 0.001  # an answer this fast saves the request one trip through the scheduler
MISSING, HELD = 1, 2  # in an answer; 0 was not asked for


@dataclass
class Question:
    """What the secondary tiers say of a prompt's objects, once `is_answered`: which they hold, and why they lack the
    first that is missing everywhere. None for `held`: they could not say."""

    is_answered: bool = False
    held: dict[bytes, bool] | None = None
    missing: dict[bytes, str] = field(default_factory=dict)


class Lookup:
    """Existence of objects under every rank's namespace, with a deadline per request."""

    def __init__(
        self,
        tiers: TierClient | None,
        chunker: Chunker,
        timeout_s: float,
        admission: LoadAdmission,
        residency: Residency,
        counters: Counter[str],
    ) -> None:
        self._tiers = tiers
        self._chunker = chunker
        self._timeout_s = timeout_s
        self._admission = admission
        self._residency = residency
        self._counters = counters
        self._version = ""  # of the namespaces

    def ask(self, state: RequestState, partial_block: bytes | None, num_tokens: int) -> dict[bytes, bool] | None:
        """Which of a request's objects are there; None while there is no answer; {} if it is late, has failed or is not
        worth waiting for. `partial_block` names a last block that the prompt fills in part, `num_tokens`
        could be loaded."""
        if self._tiers is None:
            return {}
        wait_s = 0.0
        if state.lookup is None:
            state.lookup = self._send(self._tiers, list(state.hit_hashes(self._chunker)), partial_block)
            state.lookup_started_s = time.monotonic()
            if self._admission.is_worth_waiting(num_tokens, INLINE_WAIT_S):
                wait_s = INLINE_WAIT_S  # the first time only: requests that run wait as well
        question: Question = state.lookup
        until = time.monotonic() + wait_s
        self._tiers.poll()
        while not question.is_answered and (left := until - time.monotonic()) > 0:
            self._tiers.wait(left)
        if not question.is_answered:
            if not self._admission.is_worth_a_step(num_tokens):
                state.skip = SkipReason.NOT_WORTH_WAITING
            late = self.is_overdue(state)
            if not (late or state.skip):
                return None
            self._counters["lookup_late"] += late
            state.unanswered = True
            return {}
        state.unanswered = question.held is None
        if question.held is None:
            self._counters["lookup_failed"] += 1
            return {}
        state.missing = question.missing
        return question.held

    def _send(self, tiers: TierClient, hashes: list[bytes], partial_block: bytes | None) -> Question:
        """Ask. The answer teaches what the tiers hold, also if it comes too late for its request."""
        question, version = Question(), self._version
        asked = hashes if partial_block is None else [*hashes, partial_block]

        def answered(message: Message | None, flags: bytes) -> None:
            question.is_answered = True
            if message is None:  # the worker is lost, which was logged
                return
            if len(flags) != len(asked):
                logger.warning("kvlab: lookup failed: %s", message.get("error", "an answer of another length"))
                return
            held = {key: flag == HELD for key, flag in zip(asked, flags, strict=True) if flag}
            question.held = held
            if message["missing"]:
                question.missing = {asked[message["at"]]: str(message["missing"])}
            if version == self._version:  # else their names are others by now
                self._residency.learn(asked, held)
                self._admission.answered(held=any(held.values()))

        in_memory = bytes(self._residency.is_in_memory(key) for key in hashes)
        ask = Ask(tiers.next_id(), version, self._chunker.chunk_blocks, len(hashes), partial_block is not None)
        tiers.ask(ask, b"".join(asked) + in_memory, answered)
        return question

    def is_overdue(self, state: RequestState) -> bool:
        """Whether the request has waited long enough; the clock starts with the first question."""
        if not state.lookup_started_s:
            state.lookup_started_s = time.monotonic()
        return time.monotonic() - state.lookup_started_s > self._timeout_s

    def restart(self, version: str) -> None:
        """Ask under another version of the namespaces from now on."""
        self._version = version
