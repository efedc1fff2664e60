"""Which stored objects would serve a prompt? What is worth loading, and where it goes, is decided elsewhere."""

from collections.abc import Mapping, Sequence

from kvlab.chunking import Chunker, Span
from kvlab.connectors.vllm.scheduler.requests import ObjectRef, RequestState
from kvlab.connectors.vllm.scheduler.slots import SlotIndex


class Planner:
    """Looks objects up in the memory tier's index and in what the secondary tiers said they hold."""

    def __init__(self, index: SlotIndex, chunker: Chunker, *, keeps_memory: bool) -> None:
        self._index = index
        self._chunker = chunker
        self._keeps_memory = keeps_memory

    def plan(self, state: RequestState, secondary: Mapping[bytes, bool]) -> list[ObjectRef]:
        """The longest run of chunks that some tier holds, then the longest tail present; and behind the prompt's last
        full block the one that it fills in part."""
        hashes = state.hashes
        plan: list[ObjectRef] = []
        step, block = self._chunker.chunk_blocks, self._chunker.block_tokens
        for start in range(0, len(hashes), step):
            ends = range(min(start + step, len(hashes)), start, -1)
            end = next((end for end in ends if self._held(hashes[end - 1], secondary)), None)
            if end is None:
                return plan
            plan.append(ObjectRef(Span(start, end), hashes[end - 1], end * block, self.in_memory(hashes[end - 1])))
            if end < start + step:
                break
        end, num_tokens = end_block(plan), state.request.num_prompt_tokens
        rest = state.partial_block_hash(self._chunker)
        if rest is not None and end == len(hashes) == num_tokens // block and self._held(rest, secondary):
            plan.append(ObjectRef(Span(end, end + 1), rest, num_tokens, self.in_memory(rest)))
        return plan

    def _held(self, key: bytes, secondary: Mapping[bytes, bool]) -> bool:
        return self.in_memory(key) or secondary.get(key, False)

    def in_memory(self, key: bytes) -> bool:
        entry = self._index.get(key)
        return entry is not None and (self._keeps_memory or not entry.ready)

    def ready_run(self, plan: Sequence[ObjectRef]) -> list[ObjectRef]:
        """The beginning of `plan` that lies ready in memory, without holes."""
        run: list[ObjectRef] = []
        for ref in plan:
            entry = self._index.get(ref.hash)
            if entry is None or not entry.ready or ref.span.first_block != end_block(run):
                break
            run.append(ref)
        return run


def end_block(plan: Sequence[ObjectRef]) -> int:
    return plan[-1].span.end_block if plan else 0


def end_token(plan: Sequence[ObjectRef]) -> int:
    return plan[-1].end_token if plan else 0
