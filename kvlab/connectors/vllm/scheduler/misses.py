"""Why is a request not served in full? The first block that no tier holds says it."""

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
    if key in index.evicted:
        return "evicted"
    return state.missing.get(key, "not_asked" if asks else "never_stored")
