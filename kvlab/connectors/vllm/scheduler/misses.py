"""Why is a request not served in full? The first block that no tier holds says it."""

from collections import Counter
from collections.abc import Sequence

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.hits import end_block
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency, Where


def miss_reason(
    state: RequestState,
    plan: Sequence[ObjectRef],
    chunker: Chunker,
    residency: Residency,
    *,
    lossy: bool,
    asks: bool,
) -> str:
    """Why the first block that no tier holds is not there; empty if all are. `asks`: there are secondary tiers."""
    if state.hints.wrong:
        return "wrong_hint"
    at = max(end_block(plan), state.local_tokens // chunker.block_tokens)
    if at >= (state.request.num_tokens - 1) // chunker.block_tokens:
        return ""
    state.extend_hashes(chunker)  # a request that was given up at once has none yet
    hashes, index = state.hit_hashes(chunker), residency.index
    chunk_end = min(at - at % chunker.chunk_blocks + chunker.chunk_blocks, len(hashes))
    key = hashes[chunk_end - 1]
    if refusal := state.hints.refusal(lossy=lossy):
        return refusal
    if state.skip is not None:
        return state.skip.value
    if residency.is_corrupt(key):
        return Where.CORRUPT.value
    if index.get(key) is not None:
        return ""
    if state.unanswered:
        return "not_asked"
    said = state.missing.get(key, "")
    if said in ("", "never_stored") and any(name in index.evicted for name in hashes[at:chunk_end]):
        return "evicted"  # a chunk or a tail that began with this block
    return said or ("not_asked" if asks else "never_stored")


def count_miss(state: RequestState, reason: str, counters: Counter[str]) -> None:
    """The request's row has the latest reason; the counters have its first."""
    if "miss" not in state.row:
        counters[f"miss_{reason}"] += 1
    state.row["miss"] = reason
