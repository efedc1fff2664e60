"""Which slots fill which pages: the copies of a hit, and the leases that keep its objects where they are."""

from collections.abc import Sequence
from typing import Any

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.messages import LoadOp, RequestLoad
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState
from kvlab.connectors.vllm.scheduler.slots import Entry, SlotIndex


class LoadPlanner:
    """Queues loads for the step that is being planned. Without `at_once` all of them run between steps; `lossy`: what
    the secondary tiers give back is not bit for bit what was computed, nor then what is computed behind it."""

    def __init__(
        self, chunker: Chunker, groups: KVGroups, index: SlotIndex, *, at_once: bool, lossy: bool = False
    ) -> None:
        self._chunker = chunker
        self._groups = groups
        self._index = index
        self._at_once = at_once
        self._lossy = lossy
        self.has_loaded_inexact = False  # pages that the engine's own prefix cache may find
        self._loads: list[RequestLoad] = []
        self._arrived: dict[str, int] = {}  # ranks that finished an async load
        self.in_flight: dict[str, list[Entry]] = {}  # async loads: request id -> objects leased for it
        self.version = ""  # of the namespace

    def are_async(self, plan: Sequence[ObjectRef], request: Any) -> bool:
        """Whether a load runs between steps: if it takes a secondary tier; where none can run at once; and for requests
        with images or the like, as a step cannot compute other tokens than those whose encoder outputs it was given."""
        within = self._at_once and not getattr(request, "mm_features", None)
        return not within or any(not ref.in_memory for ref in plan)

    def num_slots(self, ref: ObjectRef) -> int:
        return self._groups.num_slots(ref.span, ref.end_token)

    def place(
        self, state: RequestState, plan: list[ObjectRef], end: int, block_ids: Sequence[Sequence[int]], num_tokens: int
    ) -> None:
        """Queue the copies that fill the pages of the last `num_tokens` of the request's first `end` tokens."""
        request, block, groups = state.request, self._chunker.block_tokens, self._groups
        first, usable = (end - num_tokens) // block, -(-end // block)
        used = [ref for ref in plan if ref.span.end_block > first and ref.span.first_block < usable]
        is_async = self.are_async(plan, request)
        load = RequestLoad(
            request.request_id, [], request.num_tokens, is_async, version=self.version, adapter=state.adapter
        )
        leased: list[Entry] = []
        if is_async:  # copies within a step run before anything else is given their slots; others may not
            self.in_flight[request.request_id] = leased
            for ref in used:
                if (entry := self._index.get(ref.hash)) is not None:
                    self._index.lease(entry)
                    leased.append(entry)
        self._loads.append(load)
        state.secondary_tokens = 0
        at = first
        for ref in used:
            stop = min(ref.span.end_block, usable)
            blocks, served = range(at, stop), min(stop * block, ref.end_token, end) - at * block
            tokens = (ref.span.first_block * block, ref.end_token, served)
            at = stop
            num_slots = self.num_slots(ref)
            picked, pages = groups.pick(ref.span, ref.end_token, range(num_slots), block_ids, blocks, end)
            if not pages:
                load.ops.append(
                    LoadOp(ref.hash, 0, (), (), (), *tokens)
                )  # every window has slid past it: nothing moves
                continue
            entry = self._index.get(ref.hash)
            fetch = entry is None
            if entry is None:
                self._index.make_room_of(state.salt, num_slots)  # a load in flight may exceed the salt's share
                entry = self._index.reserve(ref.hash, num_slots, ready=False, owner=state.salt)
                if entry is None:
                    at = blocks.start
                    break
                entry.exact = not self._lossy
                self._index.lease(entry)
                leased.append(entry)
            if not entry.exact:
                state.is_exact, self.has_loaded_inexact = False, True
            state.secondary_tokens += served if fetch else 0
            slots = tuple(entry.slots[index] for index in picked)
            load.ops.append(LoadOp(ref.hash, entry.generation, entry.slots, slots, pages, *tokens, fetch))
        load.lost_blocks = groups.needed(block_ids, range(at, usable), end)
        state.given_up = bool(load.lost_blocks)

    def fail_load(self, request_id: str, block_ids: Sequence[int], *, is_async: bool) -> None:
        """Drop the request's load and report these pages to the engine as not filled."""
        self._loads = [load for load in self._loads if load.request_id != request_id]
        self._loads.append(RequestLoad(request_id, [], 0, is_async, list(block_ids)))

    def take(self) -> list[RequestLoad]:
        """The loads that were queued since the last step."""
        loads, self._loads = self._loads, []
        return loads

    def arrived(self, request_id: str, num_ranks: int, of_ranks: int) -> list[Entry]:
        """So many more ranks have ended an async load: the objects whose leases end, once all have."""
        self._arrived[request_id] = self._arrived.get(request_id, 0) + num_ranks
        if self._arrived[request_id] < of_ranks:
            return []
        del self._arrived[request_id]
        return self.in_flight.pop(request_id, [])
