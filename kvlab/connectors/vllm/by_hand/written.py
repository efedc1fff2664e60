"""KV that was written by hand, served to the requests that name it and to no other.

Each writing has a ``cache_salt`` of its own, and each request that names it another one made of it. vLLM makes the
salt part of every block's hash: its prefix cache finds neither that KV nor what is computed behind it for any other
request, not even for one of the same writing, which may have computed what was written (prompt logprobs, a shorter
prompt). What was written lies in this process's memory and is copied straight into the pages of a request; the tiers
never see it.

KV of tokens is copied within the step that begins the request. Recurrent states are copied a step earlier: an engine
may move a state to the page where a step ends before it gives its connector a chance to write it.
"""

import logging
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvlab.connectors.captured import KV
from kvlab.connectors.vllm.by_hand.history import History
from kvlab.connectors.vllm.by_hand.pages import EnginePages
from kvlab.connectors.vllm.kv_groups import Tables
from kvlab.connectors.vllm.scheduler.requests import wants_recompute

logger = logging.getLogger("vllm.kvlab")
SALT = "kvlab-by-hand-"
OF_REQUEST = "/"  # between a writing's salt and what tells its requests apart


class _Fill(NamedTuple):
    request_id: str
    kv: KV
    block_ids: Tables
    first_token: int
    end_token: int


class ByHand:
    """What the connector's hooks ask where a cache is attached. Both of its sides live in one process and share it."""

    def __init__(self, pages: EnginePages) -> None:
        self.pages = pages
        self.has_ended = False  # the engine
        self._written: dict[str, KV] = {}  # by salt
        self._fills: list[_Fill] = []  # of the step that is being planned
        self._filled: set[str] = set()  # requests whose pages were filled before their first step
        self._wanted: tuple[int, ...] | None = None
        self._caught: KV | Exception | None = None
        self.history = History()

    def add(self, kv: KV) -> str:
        """Serve `kv` from now on; its salt."""
        salt = SALT + secrets.token_hex(8)
        self._written[salt] = kv
        return salt

    def kv_of(self, salt: str) -> KV | None:
        """What was written under the salt of a writing or of a request that names it."""
        return self._written.get(salt.partition(OF_REQUEST)[0])

    @staticmethod
    def salt_alone(request: Any) -> None:
        """Give a request that names a writing a salt that no other has; before the engine hashes its tokens."""
        if ByHand.owns(request):
            request.cache_salt += OF_REQUEST + secrets.token_hex(8)

    def drop(self, salt: str) -> None:
        self._written.pop(salt, None)

    def clear(self) -> int:
        """Forget everything; how many writings there were."""
        count = len(self._written)
        self._written.clear()
        return count

    def reset(self) -> None:
        """The same where the cache begins anew."""
        self.clear()
        self.history.resets += 1

    # ---- hooks of the scheduler side

    @staticmethod
    def owns(request: Any) -> bool:
        """Whether this request is no business of the tiers: it is not looked up there and not stored."""
        return str(getattr(request, "cache_salt", None) or "").startswith(SALT)

    @property
    def fills_early(self) -> bool:
        """Whether pages are filled before the request's first step, and not within it."""
        return bool(self.pages.states)

    def match(self, request: Any, num_computed_tokens: int) -> int:
        """How many tokens beyond those computed are served. A state is right for one number of tokens alone."""
        kv = self.kv_of(request.cache_salt)
        if kv is None or wants_recompute(request):
            return 0
        if tuple(request.prompt_token_ids[: kv.num_positions]) != kv.token_ids:
            return 0
        last = int(request.num_prompt_tokens) - 1  # which is computed, also after a preemption
        ends = [end for end in kv.states or [min(kv.num_positions, last)] if end <= last]
        return max(max(ends, default=0) - num_computed_tokens, 0)

    def allocated(self, request: Any, block_ids: Tables, num_computed: int, num_tokens: int) -> None:
        """Pages for the tokens of the latest match; they are filled once the engine has cleared what it clears."""
        if num_tokens:
            kv = self.kv_of(request.cache_salt)
            assert kv is not None  # it matched
            end = num_computed + num_tokens
            self._fills.append(_Fill(request.request_id, kv, block_ids, num_computed, end))

    def finished(self, request: Any, block_ids: Tables, scheduler: Any) -> None:
        """A request is done and its pages are still its own."""
        if not self.owns(request):
            try:
                self.history.add(request, scheduler)
            except Exception:  # goes to the log, not into the engine
                logger.exception("kvlab: a request is left out of the history of the attached cache")
        if self._wanted is not None and tuple(request.prompt_token_ids or ()) == self._wanted:
            try:
                self._caught = self.pages.read(block_ids, self._wanted, "")
            except Exception as error:  # goes to the caller of `read`, not into the engine
                self._caught = error
            self._wanted = None

    # ---- of the worker side

    def fill(self) -> None:
        """Before the step's forward pass."""
        fills, self._fills = self._fills, []
        for each in fills:
            self.pages.write(each.kv, each.block_ids, each.first_token, each.end_token)
            if self.fills_early:
                self._filled.add(each.request_id)

    def take_filled(self) -> set[str]:
        """Requests whose pages were filled since the last call, where that is done before their first step."""
        filled, self._filled = self._filled, set()
        return filled

    # ---- reading

    def want(self, token_ids: Sequence[int]) -> None:
        """Catch the KV of the next request with this prompt."""
        self._wanted, self._caught = tuple(token_ids), None

    def take(self) -> KV | None:
        """What was caught; raises what reading it raised."""
        caught, self._wanted, self._caught = self._caught, None, None
        if isinstance(caught, Exception):
            raise caught
        return caught
