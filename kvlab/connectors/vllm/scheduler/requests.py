"""What the scheduler side remembers of a request: its chain of block hashes and its pages."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlab.chunking import Chunker, Span
from kvlab.connectors.vllm.adapters import ADAPTERS, LoadedAdapter
from kvlab.connectors.vllm.messages import Adapter
from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.hashing import Extra, block_hashes


@dataclass(frozen=True)
class ObjectRef:
    """One object of a hit: blocks [span.first_block, span.end_block) of the prompt under `hash`, which end with its
    token `end_token` (exclusive)."""

    span: Span
    hash: bytes
    end_token: int
    in_memory: bool


class SkipReason(enum.Enum):
    """Why a request goes without what the tiers may hold: the reason of its miss."""

    NOT_WORTH_ASKING = "not_worth_asking"  # no load from the secondary tiers would pay for the question
    NOT_WORTH_WAITING = "not_worth_waiting"  # they did not answer at once
    NOT_WORTH_LOADING = "not_worth_loading"  # computing is faster
    KV_PRODUCER = "kv_producer"  # the engine's role loads nothing
    QUALITY_CHECK = "quality_check"  # it is computed, to be compared with what is held
    NOT_READY = "not_ready"  # another request's load of it has not ended in time
    NO_ROOM = "no_room"  # operations under way have all the room in memory
    TOO_SHORT = "too_short"  # for `min_hit_tokens`


@dataclass
class RequestState:
    """Per request; dropped when the request is finished."""

    request: Any
    extras: Mapping[int, Sequence[Extra]]
    adapter: Adapter | None = None
    hints: Hints = field(default_factory=Hints)
    hashes: list[bytes] = field(default_factory=list)
    block_ids: list[list[int]] = field(default_factory=list)  # of each KV cache group
    num_saved_blocks: int = 0
    keeps_partial_block: bool = True  # whether a last block that the prompt fills in part is an object too
    shared_tokens: int = 0  # of its prompt, where it has states; see `states.shared_tokens`
    has_states: bool = False  # recurrent ones: a hit ends where an object ends, before the last token
    ahead: int = 0  # tokens behind an object that its name has too, see `compat.draft_ahead`
    partial_block_is_clean: bool = False  # that block's page holds nothing but the prompt's tokens and zeros
    plan: list[ObjectRef] = field(default_factory=list)
    plan_tokens: int = 0  # tokens of the prompt that the plan may serve
    lookup: Any = None  # future of what the secondary tiers hold
    lookup_started_s: float = 0.0
    secondary_tokens: int = 0  # tokens of the latest hit that secondary tiers supply
    missing: dict[bytes, str] = field(default_factory=dict)  # why the secondary tiers lack an object, as they said
    unanswered: bool = False  # they did not say in time what they hold, or could not
    skip: SkipReason | None = None  # of the latest match
    is_exact: bool = True  # no KV that it is computed from came from a lossy tier
    is_drawn: bool = False  # whether it is to be checked has been decided
    is_checked: bool = False  # it goes without its hit, see `CheckPlanner`
    check: ObjectRef | None = None  # what is still to be compared of it
    given_up: bool = False  # a promise to it could not be kept
    local_tokens: int = 0  # that the engine's own prefix cache held when it was last asked for
    promised_tokens: int = 0  # of the latest load
    expected_tokens: int = 0  # computed when it begins: those found in the engine, and those promised
    counted: bool = False  # its miss, if any, is in the counters
    row: dict[str, Any] = field(default_factory=dict)
    _partial_block_hash: bytes | None = None

    def partial_block_hash(self, chunker: Chunker) -> bytes | None:
        """Names the prompt's last block where the prompt fills only a part of it, which serves the very same prompt
        alone; None where there is none, it is not kept, or it holds nothing but the token that must be computed."""
        if self._partial_block_hash is None and self.keeps_partial_block:
            tokens, block = self.request.prompt_token_ids, chunker.block_tokens
            full = chunker.num_blocks(len(tokens))
            partial = tokens[full * block :]
            if len(partial) > 1:
                parent = self.extend_hashes(chunker)[full - 1] if full else None
                extras = [*self.extras.get(full, ()), ("rest", str(len(partial)))]  # no full block has this name
                self._partial_block_hash = block_hashes(partial, len(partial), parent=parent, extras={0: extras})[0]
        return self._partial_block_hash

    @property
    def salt(self) -> str | None:
        return getattr(self.request, "cache_salt", None) or None

    def object_keys(self, chunker: Chunker) -> list[bytes]:
        """Hashes of all objects that the prompt may have."""
        hashes = self.extend_hashes(chunker)
        spans = chunker.spans(max(self.request.num_prompt_tokens - max(self.ahead, self.has_states), 0))
        partial = self.partial_block_hash(chunker)
        return [hashes[span.end_block - 1] for span in spans] + ([partial] if partial is not None else [])

    def hit_hashes(self, chunker: Chunker) -> list[bytes]:
        """Hashes of the blocks with which an object may end that serves the request."""
        return self.hashes[: chunker.num_blocks(self.request.num_tokens - 1)] if self.has_states else self.hashes

    def extend_hashes(self, chunker: Chunker) -> list[bytes]:
        """Hashes of all full blocks of the tokens known now; only new blocks are computed. With tokens `ahead` the
        chain runs over what is behind as many first tokens: a block's hash has all that its KV follows from."""
        tokens = self.request.all_token_ids
        done, block = len(self.hashes), chunker.block_tokens
        if chunker.num_blocks(max(len(tokens) - self.ahead, 0)) > done:
            extras = {at - done: pairs for at, pairs in self.extras.items() if at >= done}
            parent = self.hashes[-1] if self.hashes else None
            self.hashes += block_hashes(tokens[done * block + self.ahead :], block, parent=parent, extras=extras)
        return self.hashes


def request_adapter(request: Any) -> LoadedAdapter | None:
    """The LoRA adapter that the request is computed with, or None where there is none or its weights are not known."""
    lora = getattr(request, "lora_request", None)
    return None if lora is None else ADAPTERS.nameable(lora.lora_int_id, lora.lora_path)


def request_extras(
    request: Any,
    block_tokens: int,
    adapter: LoadedAdapter | None = None,
    media: Sequence[str] = (),
    ahead: int = 0,
) -> dict[int, list[Extra]] | None:
    """Tagged extras by block: LoRA, cache salt, multimodal inputs, which are named by `media`; the first tokens, where
    the chain begins `ahead` of them. None where the KV cannot be named by tokens."""
    if getattr(request, "prompt_embeds", None) is not None or getattr(request, "resumable", False):
        return None
    if getattr(request, "lora_request", None) is not None and adapter is None:
        return None
    extras: dict[int, list[Extra]] = {}
    salt = getattr(request, "cache_salt", None)
    if salt:
        extras.setdefault(0, []).append(("cache_salt", salt))
    if adapter is not None:
        extras.setdefault(0, []).append(("lora", str(adapter.digest)))
    features = getattr(request, "mm_features", None) or ()
    if len(media) != len(features):
        return None
    for feature, name in zip(features, media, strict=True):
        offset = feature.mm_position.offset
        extras.setdefault(max(offset - ahead, 0) // block_tokens, []).append(("mm", f"{name}@{offset}"))
    if ahead:
        extras.setdefault(0, []).append(("begins", ",".join(map(str, request.prompt_token_ids[:ahead]))))
    return extras


def wants_recompute(request: Any) -> bool:
    """Requests that need every position computed, such as those for prompt logprobs."""
    if getattr(request, "skip_reading_prefix_cache", False):
        return True
    params = getattr(request, "sampling_params", None)
    return params is not None and params.prompt_logprobs is not None
