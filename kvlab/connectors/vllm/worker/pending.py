"""A load between steps that has not ended, and what is told of loads."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvlab.connectors.vllm.messages import LoadOp, LoadRow, RequestLoad, SaveOp
from kvlab.paged.transfer import Clock


class PendingLoad:
    """Which of a load's objects are in their slots, and how far they have been copied to pages. Pages are filled in the
    prompt's order, up to the first object that is missing: KV without its prefix is useless."""

    def __init__(self, load: RequestLoad, ops: list[LoadOp], fence: Any) -> None:
        self.load = load
        self.ops = ops
        self.fence = fence  # the pages may be those of a request whose last step is still under way
        self.unsent = [op for op in ops if op.fetch]  # to be asked of the tier worker
        self.num_awaited = 0  # answers
        self.arrived = {op.generation for op in ops if not op.fetch}
        self.served_by: dict[int, str] = {}  # generation -> secondary tier
        self.copied: list[LoadOp] = []
        self.has_hole = False
        self.is_given_up = False
        self._missing: set[int] = set()
        self._clock: Clock | None = None  # of the latest copy, behind which all others are
        self._started = time.perf_counter()

    def answered(self, op: LoadOp, tier: str) -> None:
        """The object is in its slots; or, without a `tier`, in none."""
        self.num_awaited -= 1
        if tier:
            self.arrived.add(op.generation)
            self.served_by[op.generation] = tier
        else:
            self._missing.add(op.generation)

    def take_ready(self) -> list[LoadOp]:
        """The objects that can be copied next, in order."""
        if self.is_given_up or self.has_hole:
            return []
        ready: list[LoadOp] = []
        for op in self.ops[len(self.copied) :]:
            if op.generation not in self.arrived:
                self.has_hole = op.generation in self._missing
                break
            ready.append(op)
        self.copied += ready
        return ready

    def stop_before(self, op: LoadOp) -> None:
        """Its slots do not hold it after all, so nothing from it on is filled."""
        self.has_hole = True
        del self.copied[self.copied.index(op) :]

    def is_copying(self) -> bool:
        return self._clock is not None and self._clock.seconds() is None

    def copies(self, clock: Clock) -> None:
        self._clock = clock

    @property
    def touches_slots(self) -> bool:
        """Whether the tier worker or a copy may still use the slots."""
        return self.num_awaited > 0 or self.is_copying()

    @property
    def unfilled(self) -> list[LoadOp]:
        """Objects that were to come from secondary tiers, and whose slots hold nothing."""
        return [op for op in self.load.ops if op.fetch and op.generation not in self.arrived]

    @property
    def has_ended(self) -> bool:
        is_done = self.has_hole or len(self.copied) == len(self.ops)
        return is_done and not (self.unsent and not self.has_hole) and not self.touches_slots

    def waited_s(self) -> float:
        """Seconds since the request began to wait."""
        return time.perf_counter() - self._started


def load_row(
    load: RequestLoad, taken: Sequence[LoadOp], served_by: Mapping[int, str], seconds: float, block_bytes: int
) -> LoadRow:
    """Of a load whose objects `taken` were copied; `served_by`: the secondary tiers of generations that came from one.
    Blocks have so many bytes in pages."""
    num_bytes = sum(len(op.block_ids) for op in taken) * block_bytes
    tiers = dict.fromkeys(served_by.get(op.generation, "memory") for op in taken if op.picked)
    tokens = sum(op.num_tokens for op in taken)
    return LoadRow(load.request_id, tokens, num_bytes, seconds, "+".join(tiers) or "none", seconds)


def page_tokens(block_tokens: int, ops: Sequence[LoadOp | SaveOp]) -> dict[str, list[int]]:
    """What a codec must know of the pages that are copied: how many of a block's tokens are the object's. One of less
    than a block fills each of its pages in part. Nothing without a codec, where `block_tokens` is 0."""
    if not block_tokens:
        return {}
    counts = [(min(block_tokens, op.end_token - op.first_token), len(op.block_ids)) for op in ops]
    return {"num_tokens": [tokens for tokens, num_pages in counts for _ in range(num_pages)]}
