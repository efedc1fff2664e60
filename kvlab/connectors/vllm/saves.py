"""Which of a step's computed pages become objects: the scheduler's other half, which decides on saves."""

from collections import Counter
from typing import Any

from kvlab.chunking import Chunker, Span
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm.admission import SaveAdmission
from kvlab.connectors.vllm.groups import Groups
from kvlab.connectors.vllm.lookup import HeldBelow, LatestKeys
from kvlab.connectors.vllm.metadata import SaveOp
from kvlab.connectors.vllm.requests import Piece, RequestState
from kvlab.connectors.vllm.slots import SlotIndex


def given_blocks(output: Any, block_tokens: int) -> list[int]:
    """The pages that requests have been given for a step: those it may write to that others may have had before."""
    tables: list[list[int]] = []
    for new in output.scheduled_new_reqs:
        tables += [table[new.num_computed_tokens // block_tokens :] for table in new.block_ids]
    for more in filter(None, output.scheduled_cached_reqs.new_block_ids):  # most that decode were given none
        tables += more
    return [block for table in tables for block in table]


class SavePlanner:
    """Follows each request's pages until its prompt is computed. Where there are lower tiers, `ranks` hand each object
    on to them that is not held `below`, or of which they hold a `bad` copy."""

    def __init__(
        self,
        config: ConnectorConfig,
        chunker: Chunker,
        groups: Groups,
        index: SlotIndex,
        *,
        has_lower: bool,
        ranks: int,
        below: HeldBelow,
        bad: LatestKeys,
        counters: Counter[str],
    ) -> None:
        self._config = config
        self._chunker = chunker
        self._groups = groups
        self._index = index
        self._has_lower = has_lower
        self._ranks = ranks
        self._below = below
        self._bad = bad
        self._counters = counters
        self._admission = SaveAdmission(config.after_sights)
        self._states: dict[str, RequestState] = {}  # requests that may still have something to save
        self.unsettled: dict[bytes, int] = {}  # hashes being handed to lower tiers -> ranks still to answer
        self._refused: set[bytes] = set()  # of these, those that lower tiers did not take from some rank

    def follow(self, request_id: str, state: RequestState) -> None:
        self._states[request_id] = state

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def lose(self, key: bytes) -> None:
        """No tier holds this object after all: who was to load it computes it, and saves it."""
        for state in self._states.values():
            if key in state.hashes:
                at = state.hashes.index(key)
                state.num_saved_blocks = min(state.num_saved_blocks, at - at % self._chunker.chunk_blocks)

    def settle(self, key: bytes, ranks: int, *, kept: bool) -> bool:
        """So many more ranks have answered for `key`, which lower tiers took if `kept`; whether all have."""
        if not kept:
            self._refused.add(key)
        left = self.unsettled.get(key, ranks) - ranks
        if left > 0:
            self.unsettled[key] = left
            return False
        self.unsettled.pop(key, None)
        if key in self._refused:
            self._refused.remove(key)
        else:
            self._bad.discard(key)  # the lower tiers hold a fresh copy
            self._below.add(key)
        return True

    def collect(self, output: Any, saves: list[SaveOp], *, enabled: bool) -> None:
        """Add the step's saves to `saves`. Only requests with something left to save are looked at: most of those that
        decode have nothing."""
        if not self._states:
            return
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            if (state := self._states.get(new.req_id)) is not None:
                computed[new.req_id] = new.num_computed_tokens
                state.block_ids = [list(table) for table in new.block_ids]
        cached = output.scheduled_cached_reqs
        for req_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if (state := self._states.get(req_id)) is None:
                continue
            computed[req_id] = num_computed
            if req_id in cached.resumed_req_ids:
                state.block_ids = [[] for _ in self._groups.windows]
            for table, more in zip(state.block_ids, blocks or (), strict=False):
                table += more
        if not enabled:
            return
        for req_id, before in computed.items():
            state = self._states[req_id]
            num_computed = before + output.num_scheduled_tokens[req_id]
            self._save_request(state, before, num_computed, saves)
            if num_computed >= state.request.num_prompt_tokens and not self._config.save_generated:
                del self._states[req_id]

    def _save_request(self, state: RequestState, before: int, num_computed: int, saves: list[SaveOp]) -> None:
        """Save the objects whose last block is computed by the end of this step, which began with `before` tokens."""
        request, block = state.request, self._chunker.block_tokens
        num_pages = len(state.block_ids[0]) if state.block_ids else 0
        if num_computed >= request.num_prompt_tokens and not state.rest_saved:
            state.rest_saved = True
            rest, at = state.rest_hash(self._chunker), request.num_prompt_tokens // block
            if rest is not None and at < num_pages:
                piece = Piece(Span(at, at + 1), rest, request.num_prompt_tokens, in_memory=False)
                self._save_object(piece, state, before, saves)
                self._index.touch([rest])
        # The engine may still take back generated tokens; it never takes back the prompt's.
        limit = request.num_tokens - 1 if self._config.save_generated else request.num_prompt_tokens
        end = min(num_computed, limit) // block
        if end <= state.num_saved_blocks:
            return
        hashes = state.extend_hashes(self._chunker)
        prompt_end = request.num_prompt_tokens // block
        for span in self._chunker.spans(min(end, len(hashes), num_pages) * block):
            full = span.num_blocks == self._chunker.chunk_blocks
            if span.end_block <= state.num_saved_blocks or not (full or span.end_block == prompt_end):
                continue
            state.num_saved_blocks = span.end_block
            piece = Piece(span, hashes[span.end_block - 1], span.end_block * block, in_memory=False)
            self._save_object(piece, state, before, saves)
        self._index.touch(hashes[s.end_block - 1] for s in reversed(self._chunker.spans(end * block)))

    def _save_object(self, piece: Piece, state: RequestState, before: int, saves: list[SaveOp]) -> None:
        """Save an object of this request from its pages, unless it is there already."""
        key = piece.hash
        held = key in self._below and key not in self._bad
        if self._index.get(key) is not None or (held and not self._config.keeps_memory):
            return
        if not self._admission.is_due(key):
            return
        pages = self._groups.pages(piece.span, piece.end_token, state.block_ids, before)
        entry = self._index.reserve(key, len(pages)) if pages else None
        if entry is None:
            self._counters["saves_dropped"] += 1
            return
        write = self._has_lower and not held
        if write:
            self._index.pin(key)
            self.unsettled[key] = self._ranks
        saves.append(SaveOp(key, entry.slots, pages, piece.end_token, write))
        self._counters["saved_tokens"] += piece.end_token - piece.span.first_block * self._chunker.block_tokens
