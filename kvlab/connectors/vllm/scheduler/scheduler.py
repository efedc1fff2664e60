"""The scheduler side: decides. It owns the memory tier's index, asks the secondary tiers, and plans each step's copies.

Nothing here touches a byte of KV and nothing waits longer than `lookup_timeout_ms` over the life of a request.
"""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvlab.chunking import Chunker
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.messages import Adapter, RequestLoad, StepMetadata, TierRow, WorkerReport
from kvlab.connectors.vllm.metrics import Counters, KVLabStats
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.connectors.vllm.scheduler.hits import end_block, find_hit, ready_run, served_part
from kvlab.connectors.vllm.scheduler.loads import LoadPlanner
from kvlab.connectors.vllm.scheduler.lookup import Lookup
from kvlab.connectors.vllm.scheduler.media import MediaNames
from kvlab.connectors.vllm.scheduler.misses import count_miss, miss_reason
from kvlab.connectors.vllm.scheduler.pins import Pins
from kvlab.connectors.vllm.scheduler.requests import (
    ObjectRef,
    RequestState,
    SkipReason,
    request_adapter,
    request_extras,
    wants_recompute,
)
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.connectors.vllm.scheduler.rollback import StepRollback
from kvlab.connectors.vllm.scheduler.saves import SavePlanner, allocated_blocks, empty_blocks
from kvlab.connectors.vllm.scheduler.slots import Entry, SlotIndex
from kvlab.tierworker.client import TierClient

logger = logging.getLogger("vllm.kvlab")
IDLE_WAIT_S = 0.0005
MOST_DECODED = 8  # tokens of a request in a step; more are a prompt's, fewer may be drafts


class Scheduler:
    """One per engine, of `num_ranks` workers. `tiers` leads to the secondary tiers, if there are any. `load_now`
    carries out loads at once and answers the pages it could not fill; without `at_once` all loads run between steps.
    Pages of `unfilled_groups` have bytes that no token writes; with `whole_blocks`, a block that a prompt fills in part
    holds more than its tokens. `role` is vLLM's ``kv_role``: a consumer stores nothing,
    a producer loads nothing. `in_company`: other connectors may have filled pages that the prefix cache finds.
    `slot_bytes`: of all ranks."""

    def __init__(
        self,
        config: ConnectorConfig,
        chunker: Chunker,
        groups: KVGroups,
        index: SlotIndex,
        tiers: TierClient | None,
        num_ranks: int,
        load_now: Callable[[list[RequestLoad]], set[int]],
        *,
        at_once: bool,
        unfilled_groups: Sequence[int] = (),
        whole_blocks: bool = False,
        role: str = "kv_both",
        in_company: bool = False,
        slot_bytes: int = 0,
    ) -> None:
        self.config = config
        self.chunker = chunker
        self.groups = groups
        self.index = index
        self.tiers = tiers
        self._num_ranks, self._ahead = num_ranks, groups.ahead
        self.may_load, self.may_save = role != "kv_producer", role != "kv_consumer"
        self._unfilled_groups = unfilled_groups
        self.keeps_partial_block = config.save_partial_block and not whole_blocks
        self.enabled = config.enabled
        self._load_now = load_now
        self.counters = Counters()
        self._slot_bytes = slot_bytes
        self._told_evictions = 0
        self._states: dict[str, RequestState] = {}
        self._media = MediaNames()
        self._holders: set[str] = set()  # requests that may hold pages
        self.unbegun: set[str] = set()  # requests with a load between steps that no step has computed since
        self._waiting = False  # since the last step, a request was told to ask again
        self.admission = LoadAdmission(enabled=config.admission)
        self.residency = Residency(index, keeps_memory=config.keeps_memory)
        self._rollback = StepRollback(chunker.block_tokens, self.counters)
        self.pins = Pins(index, int(index.num_slots * config.max_pinned_share) if config.keeps_memory else 0)
        self.loads = LoadPlanner(chunker, groups, index, at_once=at_once, lossy=config.is_lossy)
        has_secondary = tiers is not None
        self.saves = SavePlanner(
            config, chunker, groups, self.residency, self.counters, has_secondary=has_secondary, ranks=num_ranks,
            in_company=in_company,
        )  # fmt: skip
        wait_s = config.lookup_timeout_ms / 1e3
        self._lookup = Lookup(tiers, chunker, wait_s, self.admission, self.residency, self.counters)

    # ---- a hit?

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond `num_computed_tokens`, and whether between steps; None: ask again."""
        tokens, is_async = self._match(request, num_computed_tokens)
        if self.groups.recurrent and tokens is not None and self.enabled and self.may_save:
            self.saves.stop_at_object(request.request_id, num_computed_tokens + tokens, begins=True)
        return tokens, is_async

    def _match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not self.enabled or wants_recompute(request):
            self._media_of(request)
            return 0, False
        is_known = request.request_id in self._states
        state = self._state(request)
        if state is None:
            return 0, False
        state.local_tokens = state.expected_tokens = num_computed_tokens
        state.is_exact &= not (num_computed_tokens and self.loads.has_loaded_inexact)
        state.skip = None if self.may_load else SkipReason.KV_PRODUCER
        if not is_known:
            self.pins.expire()
        if state.given_up or not self.may_load:
            return 0, False
        if is_known and state.adapter is not None:
            loaded = request_adapter(request)
            if loaded is None or loaded.num_loads != state.adapter.num_loads:
                return 0, False  # other weights came under its adapter while it waited, or would at its next load
        state.extend_hashes(self.chunker)
        exact = state.hints.exact and self.config.is_lossy
        if not state.hints.load or (exact and not self.config.slots_are_exact):
            return 0, False
        block = self.chunker.block_tokens
        usable = request.num_tokens - 1  # the last token must be computed
        if not self.keeps_partial_block:
            usable -= usable % block
        if usable <= num_computed_tokens:
            return 0, False
        plan = find_hit(state, self.chunker, self.residency, {}, exact=exact)
        if self.tiers is not None and not exact and end_block(plan) < usable // block:
            wanted = usable - num_computed_tokens
            if not plan and not self.admission.is_worth({"secondary": wanted}):  # the question would cost a step
                state.skip = SkipReason.NOT_WORTH_ASKING
                return 0, False
            answer = self._lookup.ask(state, state.partial_block_hash(self.chunker), wanted)
            if answer is None:
                self._waiting = True
                return None, False
            plan = find_hit(state, self.chunker, self.residency, answer)
        if any(not entry.ready for ref in plan if (entry := self.index.get(ref.hash))):
            if not self._lookup.is_overdue(state):
                self._waiting = True
                return None, False  # another request is fetching it right now
            plan, state.skip = ready_run(plan, self.residency), SkipReason.NOT_READY
        plan, end = served_part(plan, usable, have_windows=self.groups.have_windows)
        fetched = sum(self.loads.num_slots(ref) for ref in plan if not ref.in_memory)
        is_worth = self._is_worth(plan, end, num_computed_tokens)
        if not is_worth:
            state.skip = state.skip or SkipReason.NOT_WORTH_LOADING
        if fetched and not (is_worth and self._has_room(plan, fetched)):
            state.skip = state.skip or SkipReason.NO_ROOM
            plan, end = served_part(ready_run(plan, self.residency), usable, have_windows=self.groups.have_windows)
        if not is_worth and not self._is_worth(plan, end, num_computed_tokens):
            return 0, False
        tokens = end - num_computed_tokens
        if tokens < self.config.min_hit_tokens:
            state.skip = state.skip or (SkipReason.TOO_SHORT if tokens > 0 else None)
            return 0, False
        if self.saves.checks.takes(state, plan, num_computed_tokens):
            return 0, False
        state.plan, state.plan_tokens = plan, end
        return tokens, self.loads.are_async(plan, request)

    def _is_worth(self, plan: list[ObjectRef], end: int, num_computed_tokens: int) -> bool:
        """Whether loading what the engine lacks of the first `end` tokens is faster than computing it."""
        wanted = {"memory": 0, "secondary": 0}
        at = num_computed_tokens
        for ref in plan:
            wanted["memory" if ref.in_memory else "secondary"] += max(min(ref.end_token, end) - at, 0)
            at = max(at, ref.end_token)
        return self.admission.is_worth(wanted)

    def _has_room(self, plan: list[ObjectRef], fetched: int) -> bool:
        held = sum(len(e.slots) for p in plan if (e := self.index.get(p.hash)) and not e.leases)
        return self.index.can_reserve(fetched + held)

    # ---- take it

    def on_allocated(self, request: Any) -> None:
        """The engine has allocated pages to `request`, with or without a hit."""
        self._rollback.on_allocated(request)
        self._holders.add(request.request_id)

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], num_external_tokens: int) -> None:
        """Each group has pages for the tokens of the hit that `match` returned (0: none). Notes which objects fill
        them."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        plan, end = state.plan, state.plan_tokens
        state.plan, state.plan_tokens, state.lookup, state.lookup_started_s = [], 0, None, 0.0
        if not state.counted:  # called a second time once an async load has ended
            state.counted = True
            if reason := miss_reason(
                state, plan, self.chunker, self.residency, lossy=self.config.is_lossy, asks=self.tiers is not None
            ):
                count_miss(state, reason, self.counters)
        if num_external_tokens == 0:
            return
        state.promised_tokens = num_external_tokens
        state.expected_tokens += num_external_tokens
        self.loads.place(state, plan, end, block_ids, num_external_tokens)
        # Some tier holds these already. (The rest of a prompt is an object beside the block that it may grow into.)
        state.num_saved_blocks = max(state.num_saved_blocks, min(end_block(plan), len(state.hashes)))
        self.index.touch(ref.hash for ref in reversed(plan))
        if self.loads.are_async(plan, request):
            self.unbegun.add(request.request_id)
        self.counters["hit_requests"] += 1
        self.counters["hit_tokens"] += num_external_tokens

    def fail_load(self, request_id: str, block_ids: Sequence[int], *, is_async: bool) -> None:
        """A hit cannot be served: these pages must be computed, and an async wait must end. The request goes without
        the cache from now on, as a second hit might fail like the first."""
        if (state := self._states.get(request_id)) is not None:
            state.given_up = True
        self.loads.fail_load(request_id, block_ids, is_async=is_async)

    # ---- each step

    def build(self, output: Any) -> StepMetadata:
        """This step's loads between steps, and its saves. Loads within the step begin here, before the engine prepares
        its inputs; where they fail, the plan in `output` is rolled back."""
        loads = self.loads.take()
        within = [load for load in loads if not load.is_async]
        lost = self._load_now(within) if within else set()
        for load in within:
            if load.request_id in self._states and lost.isdisjoint(load.pages):
                self._states[load.request_id].row |= load.row  # one of a single token ends before the report comes
        self._rollback.apply(output, lost)
        block = self.chunker.block_tokens
        new_blocks = allocated_blocks(output, block)
        between = [load for load in loads if load.is_async]
        if self.unbegun:
            self.unbegun.difference_update(output.num_scheduled_tokens)
        total, prefills = output.total_num_scheduled_tokens, 0
        if total > len(output.num_scheduled_tokens):  # in most steps each request decodes one
            prefills = sum(count for count in output.num_scheduled_tokens.values() if count > MOST_DECODED)
        unclean = empty_blocks(output, block, self._unfilled_groups) if self._unfilled_groups else []
        recurrent = self.groups.recurrent
        held = {group: pages for group in recurrent if (pages := empty_blocks(output, block, [group]))}
        metadata = StepMetadata(between, [], total, prefills, new_blocks, unclean, held, self.saves.version)
        if (self.loads.in_flight or self._waiting) and not loads and total == 0:
            time.sleep(IDLE_WAIT_S)  # the engine would spin and starve the threads it waits for
        self._waiting = False
        self.admission.is_busy = total > 0
        try:
            enabled = self.enabled and self.may_save
            self.saves.collect(output, metadata.saves, metadata.unclean_blocks, enabled=enabled)
            metadata.checks = self.saves.checks.take()
        except (Exception, SystemExit):  # a save is only a later miss; the loads above must reach the workers
            self.counters["errors"] += 1
            if self.counters["errors"] == 1:
                logger.exception("kvlab: could not plan this step's saves")
        return metadata

    def absorb(self, report: WorkerReport) -> None:
        """Take in what the workers finished."""
        ranks = self._num_ranks
        ADAPTERS.learn(report.adapters)
        if report.stale_version == self.saves.version and self.enabled:
            self.enabled = False
            self.counters["weights_changed"] += 1
            logger.warning("kvlab: the model has other weights: off until reset_prefix_cache(reset_connector=True)")
        for key in report.absent:
            self.residency.corrupt(key)
            self.saves.forget_saved(key)
        if report.absent:
            self.counters["bad_objects"] += len(report.absent)
        for generation in report.broken:
            if (entry := self.index.generation(generation)) is not None:
                self.index.drop(entry)
                self.saves.forget_saved(entry.key)
                self.counters["bad_objects"] += entry.key not in report.absent
        for req_id, count in report.loaded.items():
            for entry in self.loads.arrived(req_id, count, ranks):
                self._release(entry)
        for generation, count in report.written.items():
            written = self.saves.complete_write(generation, count, success=generation not in report.failed_writes)
            if written is not None:
                self._release(written)
        for row in report.rows:
            if (state := self._states.get(row.request_id)) is not None:
                state.row |= row.told
                if row.num_tokens < state.promised_tokens:
                    count_miss(state, "load_failed", self.counters)
            self.counters.loaded(row.tier, row.num_bytes, row.seconds)
            is_secondary = row.tier not in ("memory", "none")
            self.admission.loaded("secondary" if is_secondary else "memory", row.num_tokens, row.delay)
        for check in report.checks:
            self.counters.checked(check.errors)
            if (state := self._states.get(check.request_id)) is not None:
                state.row["quality"] = check.errors
        for request_id, tier, num_tokens, seconds in report.overdue:
            self.counters["loads_overdue"] += 1
            self.admission.loaded(tier, num_tokens, seconds)
            if (state := self._states.get(request_id)) is not None:
                state.given_up = True
                count_miss(state, "load_overdue", self.counters)
        self.counters.see_tiers(report.tiers)
        for name, count in report.events.items():
            self.counters[name] += count
        for prefill_tokens, seconds in report.forwards:
            self.admission.forward(prefill_tokens, seconds)

    def _release(self, entry: Entry) -> None:
        """All ranks have ended an operation on the object's slots."""
        self.index.release(entry)
        entry.ready = True
        # Without a memory tier, host memory is only a way to the secondary tiers: nothing stays.
        if not self.config.keeps_memory and not entry.leases:
            self.index.drop(entry)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """The request is done. Its row, where reports are wanted."""
        state = self._states.pop(request.request_id, None)
        if state is not None and (state.hints.pin or state.hints.release) and not state.given_up:
            self.counters["pins_refused"] += self.pins.apply(state, self.chunker)
        self._media.forget(request.request_id)
        self.unbegun.discard(request.request_id)
        self._holders.discard(request.request_id)
        self.saves.forget(request.request_id)
        if state is None or not self.config.report:
            return None
        return {"kvlab": {"prompt_tokens": request.num_prompt_tokens, "hit_tokens": 0, "tier": "none", **state.row}}

    def take_stats(self) -> KVLabStats | None:
        """What was counted since the last call, with the memory tier's fill; None if nothing was."""
        if not self.counters.are_new:
            return None
        if self.config.keeps_memory:
            evictions, self._told_evictions = self.index.num_evictions - self._told_evictions, self.index.num_evictions
            used = (self.index.num_slots - self.index.num_free) * self._slot_bytes
            self.counters.see_tiers({"memory": TierRow(used, self.index.num_slots * self._slot_bytes, evictions)})
        return self.counters.take_increments()

    def secondary_tokens(self, request_id: str) -> int:
        """Tokens of this request's latest hit that come from secondary tiers."""
        state = self._states.get(request_id)
        return state.secondary_tokens if state is not None else 0

    def reset(self) -> bool:
        """From now on, nothing stored before is loaded and nothing computed before is stored: the model may have other
        weights. What this engine stores next goes to a namespace of its own in every tier, which no other process
        knows. Requests that have begun are not cached any more.

        False if a request has loaded KV, or waits for it, and has not begun to compute: it will use what was stored
        before."""
        version = secrets.token_hex(8)
        self.enabled = False  # where this fails half way
        self.pins.clear()
        self.residency.clear()
        self._lookup.restart(version)
        self.loads.version = version
        self.saves.restart(version, may_find_old_pages=bool(self._holders))
        for state in self._states.values():
            state.given_up = True
        self.enabled = self.config.enabled
        return not self.unbegun

    def state_of(self, request_id: str) -> RequestState | None:
        return self._states.get(request_id)

    def _media_of(self, request: Any) -> list[str]:
        """Names of the request's multimodal inputs; [] if one has none."""
        names = self._media.names(getattr(request, "mm_features", None) or (), request.request_id)
        for request_id in self._media.take_spoilt():
            self.saves.forget(request_id)
            if (state := self._states.get(request_id)) is not None:
                state.given_up = True
        return names or []

    def _state(self, request: Any) -> RequestState | None:
        state = self._states.get(request.request_id)
        if state is None:
            adapter = request_adapter(request)
            extras = request_extras(request, self.chunker.block_tokens, adapter, self._media_of(request), self._ahead)
            if extras is None:
                self.counters["unnameable_requests"] += 1
                return None
            hints = Hints.of(request)
            state = RequestState(request, extras, keeps_partial_block=self.keeps_partial_block, hints=hints)
            state.has_states, state.ahead = bool(self.groups.recurrent), self._ahead
            state.row = {"hint": hints.wrong} if hints.wrong else {}
            if adapter is not None:
                state.adapter = Adapter(request.lora_request.lora_int_id, adapter.num_loads)
            self._states[request.request_id] = state
            if hints.save:
                self.saves.follow(request.request_id, state)
        return state
