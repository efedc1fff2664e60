"""A share of the hits is computed instead, and what host memory holds of them is compared with what was computed.

Nothing is loaded for such a request: to the engine it is one without a hit. One block of it is compared, chosen at
random, so a check costs as much for a long prompt as for a short one.
"""

import random
from collections.abc import Sequence

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.messages import CheckOp
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState, SkipReason
from kvlab.connectors.vllm.scheduler.slots import SlotIndex


class CheckPlanner:
    """Chooses requests, a `share` of those with a hit in host memory, and the block of each that is compared."""

    def __init__(self, share: float, chunker: Chunker, groups: KVGroups, index: SlotIndex) -> None:
        self._share = share
        self._block = chunker.block_tokens
        self._groups = groups
        self._index = index
        self._due: list[CheckOp] = []

    def takes(self, state: RequestState, plan: Sequence[ObjectRef], num_computed: int) -> bool:
        """Whether the request's hit is not to be served, now or when it is asked for again. `num_computed`: tokens that
        the engine holds already, which may have been loaded: objects among them are not compared."""
        if not self._share:
            return False
        if state.is_checked:
            state.skip = SkipReason.QUALITY_CHECK
            return True
        if not state.is_exact or not state.hints.save:
            return False
        whole = [
            ref
            for ref in plan
            if ref.in_memory and ref.span.first_block * self._block >= num_computed and not ref.end_token % self._block
        ]
        if not whole or state.is_drawn:
            return False
        state.is_drawn = True  # the engine asks again of a request that waits for pages
        if random.random() >= self._share:
            return False
        state.is_checked, state.check, state.skip = True, random.choice(whole), SkipReason.QUALITY_CHECK
        return True

    def collect(self, state: RequestState, before: int, num_computed: int) -> None:
        """The step takes the request from `before` to `num_computed` computed tokens."""
        ref = state.check
        if ref is None or num_computed < ref.end_token:
            return
        state.check = None
        entry = self._index.get(ref.hash)
        pages = self._groups.pages(ref.span, ref.end_token, state.block_ids, before)
        if entry is None or not entry.ready or len(pages) != len(entry.slots) or not pages:
            return  # it was evicted meanwhile, or windows have left its pages behind
        at = random.randrange(len(pages))
        self._due.append(
            CheckOp(state.request.request_id, entry.generation, entry.slots[at], pages[at], adapter=state.adapter)
        )

    def take(self) -> list[CheckOp]:
        """Those that are due at the end of the step that is being planned."""
        due, self._due = self._due, []
        return due
