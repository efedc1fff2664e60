"""Which of a step's computed pages become objects: the half of the scheduler side that decides on saves.

Only the tokens that an object names may leave the engine. A block that a prompt fills in part is an object too, and its
page may still hold another request's bytes. So the page is cleared in the step that allocates it, before any of its
tokens are computed, and the object is saved in the step that computes the prompt's last token, before the first
generated token is written behind it. Where that order was not kept, the block is not saved.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.chunking import Chunker, Span
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm import states
from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.kv_groups import NO_PAGE, KVGroups
from kvlab.connectors.vllm.messages import SaveOp
from kvlab.connectors.vllm.scheduler.admission import SaveAdmission
from kvlab.connectors.vllm.scheduler.checks import CheckPlanner
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.connectors.vllm.scheduler.slots import Entry


def allocated_blocks(output: Any, block_tokens: int) -> list[int]:
    """The pages that a step allocates: the step may write to them, and other requests may have had them before."""
    tables: list[list[int]] = []
    for new in output.scheduled_new_reqs:
        tables += [table[new.num_computed_tokens // block_tokens :] for table in new.block_ids]
    for more in filter(None, output.scheduled_cached_reqs.new_block_ids):  # most requests that decode have none
        tables += more
    return [block for table in tables for block in table]


def empty_blocks(output: Any, block_tokens: int, groups: Sequence[int]) -> list[int]:
    """The pages of `groups` that a step allocates and that hold none of the request's tokens yet."""
    found: list[int] = []
    cached = output.scheduled_cached_reqs
    for new in output.scheduled_new_reqs:
        first = -(-new.num_computed_tokens // block_tokens)
        found += [page for group in groups for page in new.block_ids[group][first:]]
    for req_id, more, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if more:  # all pages of a resumed request, or those behind the ones it has
            first = -(-num_computed // block_tokens) if req_id in cached.resumed_req_ids else 0
            found += [page for group in groups for page in more[group][first:]]
    return [page for page in found if page != NO_PAGE]


@dataclass
class Write:
    """An object that is written to the secondary tiers; its slots are leased until all ranks have reported."""

    entry: Entry
    version: str
    ranks_left: int
    failed: bool = False  # at some rank


class SavePlanner:
    """Follows each request's pages until its prompt is computed. Where there are secondary tiers, all `ranks` write
    each object of which these hold no sound copy, as far as is known."""

    def __init__(
        self,
        config: ConnectorConfig,
        chunker: Chunker,
        groups: KVGroups,
        residency: Residency,
        counters: Counter[str],
        *,
        has_secondary: bool,
        ranks: int,
        in_company: bool = False,
    ) -> None:
        self._config = config
        self._chunker = chunker
        self._groups = groups
        self._residency = residency
        self._index = residency.index
        self._has_secondary = has_secondary
        self._ranks = ranks
        self._counters = counters
        self._admission = SaveAdmission(config.store_threshold, config.store_rule)
        self.checks = CheckPlanner(config.quality_check, chunker, groups, self._index)
        self._states: dict[str, RequestState] = {}  # requests that may still have something to save
        self._in_company = in_company
        self._may_find_old_pages = False  # in vLLM's prefix cache, of an earlier version
        self.version = ""  # of the namespace
        self.in_flight: dict[int, Write] = {}  # by generation

    def follow(self, request_id: str, state: RequestState) -> None:
        self._states[request_id] = state

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def restart(self, version: str, *, may_find_old_pages: bool) -> None:
        """The namespace has another `version` from now on: what was computed before is not saved any more.
        `may_find_old_pages`: while requests hold pages, vLLM does not empty its prefix cache."""
        self.version = version
        self._may_find_old_pages = may_find_old_pages
        self._states.clear()

    def forget_saved(self, key: bytes) -> None:
        """No tier holds this object after all: requests that were to load it compute it, and save it."""
        for state in self._states.values():
            if key in state.hashes:
                at = state.hashes.index(key)
                state.num_saved_blocks = min(state.num_saved_blocks, at - at % self._chunker.chunk_blocks)

    def complete_write(self, generation: int, ranks: int, *, success: bool) -> Entry | None:
        """`ranks` more ranks have written the object of this generation to the secondary tiers, or, unless `success`,
        failed to. Returns the object once all have."""
        write = self.in_flight[generation]
        write.failed |= not success
        write.ranks_left -= ranks
        if write.ranks_left > 0:
            return None
        del self.in_flight[generation]
        if not write.failed and write.version == self.version:
            self._residency.written(write.entry.key)
        return write.entry

    def collect(self, output: Any, saves: list[SaveOp], unclean: list[int], *, enabled: bool) -> None:
        """Add the step's saves to `saves`, and to `unclean` the pages to clear before it. Only requests with something
        left to save are visited: most requests that decode have nothing."""
        if not self._states:
            return
        left = states.left_by(output) if self._groups.recurrent else {}
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            if (state := self._states.get(new.req_id)) is not None:
                state.block_ids = [[] for _ in self._groups.windows]
                if self._follow(state, new.block_ids, new.num_computed_tokens, unclean, begins=True):
                    computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for req_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if (state := self._states.get(req_id)) is None:
                continue
            begins = req_id in cached.resumed_req_ids
            if begins:
                state.block_ids = [[] for _ in self._groups.windows]
            if self._follow(state, blocks, num_computed, unclean, begins=begins):
                computed[req_id] = num_computed
        if not enabled:
            return
        for req_id, before in computed.items():
            state = self._states[req_id]
            if self._groups.have_windows and self._groups.shows_gap(state.block_ids, before):
                del self._states[req_id]  # it reads pages that hold nothing: what it computes is not saved
                continue
            num_computed = before + output.num_scheduled_tokens[req_id]
            self._save_request(state, before, num_computed, saves, left.get(req_id, {}))
            self.checks.collect(state, before, num_computed)
            self.stop_at_object(req_id, num_computed)
            if num_computed >= state.request.num_prompt_tokens and not self._config.save_generated:
                del self._states[req_id]

    def _follow(
        self,
        state: RequestState,
        new_blocks: Sequence[Sequence[int]] | None,
        num_computed: int,
        unclean: list[int],
        *,
        begins: bool,
    ) -> bool:
        """Note the pages that a request has got for a step that starts at `num_computed` tokens. False if other sources
        than this engine and this connector may have filled pages it reads."""
        block = self._chunker.block_tokens
        if begins and (num_computed >= state.expected_tokens + block or self._may_be_foreign(state)):
            self.forget(state.request.request_id)  # another connector, or another adapter's requests, filled pages
            return False
        partial = state.request.num_prompt_tokens // block  # the block that the prompt fills in part
        first_empty = -(-num_computed // block)
        for table, more in zip(state.block_ids, new_blocks or (), strict=False):
            num_before = len(table)
            table += more
            if state.keeps_partial_block and num_before <= partial < len(table):
                state.partial_block_is_clean = partial >= first_empty
                unclean += [table[partial]] if state.partial_block_is_clean else []
        return True

    def _may_be_foreign(self, state: RequestState) -> bool:
        """Whether pages that vLLM's own prefix cache found may hold KV of other weights than the request's, or such as
        another connector loaded."""
        lora = getattr(state.request, "lora_request", None)
        others = lora is not None and not ADAPTERS.is_only_one_called(lora.lora_name)
        return state.local_tokens > 0 and (others or self._in_company or self._may_find_old_pages)

    def stop_at_object(self, request_id: str, num_computed: int, *, begins: bool = False) -> None:
        """Where states are to be saved, have a step end with the next chunk, and where the prompt parts from others: it
        leaves a state there. (Behind the prompt's last block that may end an object, vLLM leaves one by itself.)"""
        state, chunk = self._states.get(request_id), self._chunker.chunk_tokens
        if not self._groups.recurrent or state is None:
            return
        if begins:
            state.shared_tokens = states.shared_tokens(state.request)
        end = num_computed - num_computed % chunk + chunk
        is_wanted = end < state.request.num_prompt_tokens or self._config.save_generated
        states.stop_at(state.request, num_computed, state.shared_tokens, end if is_wanted else 0)

    def _save_request(
        self,
        state: RequestState,
        before: int,
        num_computed: int,
        saves: list[SaveOp],
        left: states.StatePages,
    ) -> None:
        """Save the objects whose last block is computed by the end of this step, which began with `before` tokens.
        `left`: the states that it leaves."""
        request, block = state.request, self._chunker.block_tokens
        num_pages = len(state.block_ids[0]) if state.block_ids else 0
        if num_computed == request.num_prompt_tokens and state.partial_block_is_clean:
            key, last = state.partial_block_hash(self._chunker), request.num_prompt_tokens // block
            if key is not None and last < num_pages:
                ref = ObjectRef(Span(last, last + 1), key, request.num_prompt_tokens, in_memory=False)
                self._save_object(ref, state, before, saves)
                self._index.touch([key])
        # The engine may still discard generated tokens (drafts that are refused), never those of the prompt. With
        # states there are no drafts, and the step that computes the last token of a block is the one that leaves it.
        prompt_end = self._groups.num_blocks(request.num_prompt_tokens)
        known = request.num_tokens - (not self._groups.recurrent)
        last = known // block if self._config.save_generated else prompt_end
        end = min(num_computed // block, last)
        if end <= state.num_saved_blocks:
            return
        hashes = state.extend_hashes(self._chunker)
        for span in self._chunker.spans(min(end, len(hashes), num_pages) * block):
            full = span.num_blocks == self._chunker.chunk_blocks
            end_token = span.end_block * block
            is_wanted = full or span.end_block == prompt_end or end_token == state.shared_tokens
            if span.end_block <= state.num_saved_blocks or not is_wanted:
                continue
            state.num_saved_blocks = span.end_block
            if self._groups.recurrent and end_token not in left:
                continue  # no step has ended there
            ref = ObjectRef(span, hashes[span.end_block - 1], end_token, in_memory=False)
            self._save_object(ref, state, before, saves, left.get(end_token))
        self._index.touch(hashes[s.end_block - 1] for s in reversed(self._chunker.spans(end * block)))

    def _save_object(
        self,
        ref: ObjectRef,
        state: RequestState,
        before: int,
        saves: list[SaveOp],
        state_pages: Mapping[int, int] | None = None,
    ) -> None:
        """Save an object of this request from its pages, unless it is there already. `state_pages`: by group, of the
        states behind it."""
        key = ref.hash
        is_written = self._residency.is_written(key)
        if self._index.get(key) is not None or (is_written and not self._config.keeps_memory):
            return
        if not self._admission.is_due(key, ref.end_token):
            return
        pages = self._groups.pages(ref.span, ref.end_token, state.block_ids, before, state_pages)
        if not self._index.make_room_of(state.salt, len(pages)):
            self._counters["saves_over_quota"] += 1
            return
        entry = self._index.reserve(key, len(pages), owner=state.salt) if pages else None
        if entry is None:
            self._counters["saves_dropped"] += 1
            return
        entry.exact = state.is_exact
        write = self._has_secondary and not is_written
        if write:
            self._index.lease(entry)
            self.in_flight[entry.generation] = Write(entry, self.version, self._ranks)
        first = ref.span.first_block * self._chunker.block_tokens
        saves.append(
            SaveOp(
                key,
                entry.generation,
                entry.slots,
                pages,
                first,
                ref.end_token,
                write,
                version=self.version,
                adapter=state.adapter,
            )
        )
        self._counters["saved_tokens"] += ref.end_token - first
