"""The prompts of an engine that has a cache attached, as traffic, and why one of them was not in memory.

A replay knows tokens. What else an engine goes by is written down with each request: what names its blocks besides
tokens (a salt, an adapter, media), whether it might be served and kept (hints), and how often the cache was reset
before.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.by_hand.left_out import Ended, Seen, left_out, rules_of
from kvlab.connectors.vllm.namespace import rank_namespace
from kvlab.connectors.vllm.scheduler.requests import SkipReason, wants_recompute
from kvlab.errors import ConfigError, StoreError
from kvlab.hashing import Extra, block_hashes
from kvlab.page_objects import PageObjects
from kvlab.simulation.replay_connector import ConnectorRules
from kvlab.simulation.traffic import Request, Traffic, traffic_of_prompts
from kvlab.simulation.why import MissPage, why_of

MOST_REMEMBERED = 10_000  # prompts
SKIPPED = {  # where the engine did not load what it could have: its reason -> in words
    SkipReason.NOT_WORTH_ASKING.value: "a load from the secondary tiers would take longer than computing",
    SkipReason.NOT_WORTH_WAITING.value: "the secondary tiers did not answer at once, and there was little to win",
    SkipReason.NOT_WORTH_LOADING.value: "computing was measured to be faster",
    SkipReason.NOT_READY.value: "another request's load of it had not ended in time",
    SkipReason.NO_ROOM.value: "loads and writes under way had all the room in memory",
    SkipReason.TOO_SHORT.value: "what was held is shorter than min_hit_tokens",
    SkipReason.QUALITY_CHECK.value: "it was computed, to be compared with what was held",
}
TAGS = {  # of what names a block besides its tokens -> (a page's reason, in words)
    "cache_salt": ("other_salt", "another cache_salt"),
    "lora": ("other_adapter", "another LoRA adapter"),
    "mm": ("other_media", "other images, videos or sounds"),
}


class History:
    """What ended since the cache was attached, the latest last. `began_empty`: nothing was in memory then."""

    def __init__(self) -> None:
        self.ended: deque[Ended] = deque(maxlen=MOST_REMEMBERED)
        self.began_empty = True
        self.resets = 0

    def add(self, request: Any, scheduler: Any) -> None:
        """A request is done, and its state still known to `scheduler`."""
        state = scheduler.state_of(request.request_id) if scheduler is not None else None
        loads, saves = _refusals(request, state, scheduler)
        tokens, extras = tuple(request.prompt_token_ids or ()), {} if state is None else state.extras
        arrival_s, output_tokens = float(request.arrival_time), int(request.num_output_tokens)
        miss, loaded, pins = "", None, False
        if state is not None:
            miss, loaded, pins = state.row.get("miss", ""), state.row.get("hit_tokens", 0), state.hints.pin
        self.ended.append(
            Ended(
                arrival_s, tokens, output_tokens, extras, loads, saves, self.resets, miss, loaded, pins, time.time()
            )
        )  # fmt: skip

    def traffic(self, block_tokens: int) -> Traffic:
        """By time of arrival. ConfigError where no prompt had a full block."""
        ended = sorted(self.ended, key=lambda each: each.arrival_s)
        return _traffic(ended, block_tokens, resets=True)

    def why(self, request: int, connector: Any, prefix_cache: bool) -> MissPage:
        """The page of one of them, by its place, over those that ended since the reset before it."""
        ended, block = list(self.ended), connector.chunker.block_tokens
        if isinstance(request, bool) or not isinstance(request, int) or not -len(ended) <= request < len(ended):
            raise ConfigError(f"request must be a place in a history of {len(ended):,}, got {request!r}")
        at = request % len(ended)
        asked = ended[at]
        if len(asked.token_ids) < block:
            raise ConfigError(
                f"request {at} has no full block of {block} tokens. The engine may have kept it as a partial block, "
                "which serves the very same prompt and is not in the replay"
            )
        first = next(number for number, each in enumerate(ended) if each.resets == asked.resets)
        part = ended[first : at + 1]
        rules = rules_of(connector)
        page = why_of(
            _traffic(part, block),
            [each.token_ids if each.extras == asked.extras else () for each in part],
            -1,
            f"{connector.num_slots} blocks",
            policy=connector.config.policy,
            chunk_tokens=connector.chunker.chunk_tokens,
            connector=rules,
        ).behind(first)
        cause, said = _cause(ended[: at + 1], page, connector.chunker, rules)
        if page.reason in ("first", "differs") and not cause:
            cause, said = _of_others(asked, connector)
        is_cut = first == 0 and len(ended) == MOST_REMEMBERED
        unknown = left_out(Seen(part, connector, prefix_cache, self.began_empty or asked.resets > 0, is_cut))
        notes = [*page.notes, *([said] if said else [])]
        if unknown:
            notes.append(f"Not in the replay: {', '.join(unknown)}.")
        replayed = min(page.hit_tokens, page.tokens - 1) // block
        if not prefix_cache and asked.loaded_tokens is not None and asked.loaded_tokens // block != replayed:
            notes.append(f"The engine itself loaded {asked.loaded_tokens:,} tokens.")
        return replace(page, cause=cause, notes=tuple(notes))


def _refusals(request: Any, state: Any, scheduler: Any) -> tuple[str, str]:
    """Why nothing was loaded for a request, and why nothing of it was saved; empty where it may have been."""
    status = getattr(getattr(request, "status", None), "name", "")
    if status == "FINISHED_ABORTED" and not request.num_output_tokens:  # else its prompt was computed
        return "" if state else "it was aborted before it began", "it was aborted, and what was kept is not known"
    if wants_recompute(request):
        return ("it wanted every position computed, as for prompt logprobs",) * 2
    if state is None:
        return ("the cache was off, or its KV is not named by tokens alone",) * 2
    if state.hints.wrong:
        return (f"wrong hint: {state.hints.wrong}",) * 2
    if state.given_up:
        return ("a load failed, or a reset came, while it ran",) * 2
    refusal = state.hints.refusal(lossy=scheduler.config.is_lossy and not scheduler.config.slots_are_exact)
    loads = {"": "", "not_wanted": "hint load=false", "not_exact": "hint exact=true, and memory is lossy"}[refusal]
    saves = "" if state.hints.save else "hint save=false"
    return loads if scheduler.may_load else "kv_producer", saves if scheduler.may_save else "kv_consumer"


def _traffic(ended: Sequence[Ended], block_tokens: int, *, resets: bool = False) -> Traffic:
    """`resets`: prompts before and behind one share nothing."""
    named: list[dict[int, list[Extra]]] = []
    for each in ended:
        extras = {at: list(pairs) for at, pairs in each.extras.items()}
        if resets and each.resets:
            extras[0] = [*extras.get(0, []), ("resets", str(each.resets))]
        named.append(extras)
    made = traffic_of_prompts(
        [each.token_ids for each in ended], block_tokens=block_tokens, name="recorded", extras=named
    )
    start = ended[0].arrival_s
    requests = [
        Request(
            each.arrival_s - start, request.num_tokens, each.output_tokens, request.block_ids, not each.not_loaded,
            not each.not_saved,
        )
        for each, request in zip(ended, made.requests, strict=True)
    ]  # fmt: skip
    return Traffic("recorded", block_tokens, requests)


def _cause(ended: Sequence[Ended], page: MissPage, chunker: Chunker, rules: ConnectorRules) -> tuple[str, str]:
    """What the replay does not know of the first block that the latest request misses: a reason and a line; empty where
    there is none. Of earlier prompts that would serve more of it than was seen, were it not for one thing, that which
    would serve most is told of, then one of the same salt, adapter and media, then the latest."""
    *earlier, asked = ended
    if asked.not_loaded:
        return page.cause, f"Nothing was loaded for it: {asked.not_loaded}."
    if asked.miss in SKIPPED:
        return asked.miss, f"The engine did not load what it could have: {SKIPPED[asked.miss]}."
    if page.eviction is not None or page.too_short_tokens:
        return "", ""  # what was lost first was there: other prompts decide of later blocks at most
    best, found = (page.seen_tokens, True), ("", "")
    for number, other in enumerate(earlier):
        rank = _could_serve(asked, other, chunker, rules), other.extras == asked.extras
        if rank < best or rank[0] <= page.seen_tokens:
            continue
        told = _apart(asked, other)
        if told is not None:
            best = rank
            found = told[0], f"Request {number:,} begins with the same {rank[0]:,} tokens, {told[1]}."
    return found


def _of_others(asked: Ended, connector: Any) -> tuple[str, str]:
    """Whether a secondary tier holds blocks of it under another namespace: what another engine stored."""
    hashes = block_hashes(asked.token_ids, connector.chunker.block_tokens, extras=asked.extras)
    for url in connector.config.secondary_tiers:
        try:
            tier = PageObjects(url, namespace=rank_namespace(connector.namespace, 0), auth=connector.config.auth)
        except (ConfigError, StoreError):  # one that cannot be opened a second time, or is down
            continue
        try:
            fields = tier.differing_from(hashes)
        finally:
            tier.close()
        if fields:
            told = f"{tier.store.name} holds KV of its tokens that another engine stored: {', '.join(fields)} differ."
            return "other_namespace", told
    return "", ""


def _could_serve(asked: Ended, other: Ended, chunker: Chunker, rules: ConnectorRules) -> int:
    """Tokens that the objects of `other` would serve, had they the names of those of `asked`: whole chunks, and the
    tail where `asked` has all of it."""
    block, step = chunker.block_tokens, chunker.chunk_blocks
    shared, whole = _shared(asked.token_ids, other.token_ids) // block, len(other.token_ids) // block
    hit = whole if whole <= shared else shared - shared % step
    tokens = len(asked.token_ids)
    return rules.served(hit, tokens, tokens // block, block) * block


def _apart(asked: Ended, other: Ended) -> tuple[str, str] | None:
    """Why `other` cannot serve `asked`."""
    if other.extras != asked.extras:
        pairs = [{pair for pairs in each.extras.values() for pair in pairs} for each in (asked, other)]
        tags = {tag for tag, _ in pairs[0] ^ pairs[1]}
        reason = TAGS[min(tags)][0] if len(tags) == 1 else "other_namespace"
        return reason, f"with {' and '.join(TAGS[tag][1] for tag in sorted(tags)) or 'other inputs'}"
    if other.not_saved:
        return "not_saved", f"and was not saved: {other.not_saved}"
    if other.resets != asked.resets:
        return "reset", "and the cache was reset since"
    return None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
