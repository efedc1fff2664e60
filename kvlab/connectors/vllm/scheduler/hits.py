"""Which stored objects would serve a prompt? What is worth loading, and where it goes, is decided elsewhere."""

from collections.abc import Mapping, Sequence

from kvlab.chunking import Chunker, Span, longest_prefix
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency, Where

HELD = (Where.MEMORY, Where.PENDING, Where.SECONDARY)


def find_hit(
    state: RequestState,
    chunker: Chunker,
    residency: Residency,
    answer: Mapping[bytes, bool],
    *,
    exact: bool = False,
) -> list[ObjectRef]:
    """The longest run of chunks that some tier holds, then the longest tail present; and behind the prompt's last full
    block the one that it fills in part. `answer`: what the secondary tiers hold. `exact`: only what lies in memory as
    it was computed."""
    hashes, block = state.hit_hashes(chunker), chunker.block_tokens

    def is_held(key: bytes) -> bool:
        return residency.where(key, answer) in HELD and (not exact or residency.is_exact(key))

    def ref(span: Span, key: bytes, end_token: int) -> ObjectRef:
        return ObjectRef(span, key, end_token, residency.is_in_memory(key))

    spans = longest_prefix(hashes, chunker.chunk_blocks, is_held)
    hit = [ref(span, hashes[span.end_block - 1], span.end_block * block) for span in spans]
    end, num_tokens = end_block(hit), state.request.num_prompt_tokens
    partial = state.partial_block_hash(chunker)
    if partial is not None and end == len(hashes) == num_tokens // block and is_held(partial):
        hit.append(ref(Span(end, end + 1), partial, num_tokens))
    return hit


def ready_run(hit: Sequence[ObjectRef], residency: Residency) -> list[ObjectRef]:
    """The beginning of `hit` that lies ready in memory, without holes."""
    run: list[ObjectRef] = []
    for ref in hit:
        entry = residency.index.get(ref.hash)
        if entry is None or not entry.ready or ref.span.first_block != end_block(run):
            break
        run.append(ref)
    return run


def served_part(plan: list[ObjectRef], usable: int, *, have_windows: bool) -> tuple[list[ObjectRef], int]:
    """The part of a plan that serves the first `usable` tokens or fewer, and how many it serves. Where layers see a
    window, an object serves hits that end with it or later, or leave out its last token."""
    if plan and have_windows and usable < plan[-1].end_token - 1:
        plan = plan[:-1]
    return plan, min(end_token(plan), usable)


def end_block(hit: Sequence[ObjectRef]) -> int:
    return hit[-1].span.end_block if hit else 0


def end_token(hit: Sequence[ObjectRef]) -> int:
    return hit[-1].end_token if hit else 0
