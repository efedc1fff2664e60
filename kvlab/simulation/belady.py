"""The bound: what a cache that knows the future would answer.

Belady's rule, prompt by prompt: after each prompt keep those blocks whose next use comes soonest, and never keep
what is not used again. It decides on single blocks and need not hold a prefix to use what follows it, so no policy
that stores whole prefixes in objects can have more block hits: in the terms of interval scheduling, it picks the
largest set of spans between uses such that at no time more than `capacity` overlap, and for such sets this greedy
rule is optimal.
(Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.)
"""

import heapq
from dataclasses import dataclass

from kvlab.simulation.traffic import Traffic

_NEVER = 1 << 60


@dataclass(frozen=True)
class Bound:
    """Per prompt: blocks that were there, and whether the last block was one of them."""

    hit_blocks: list[int]
    hit_last: list[bool]


def belady(traffic: Traffic, capacity_blocks: int) -> Bound:
    """Blocks of each prompt that an all-knowing cache of `capacity_blocks` holds when it comes.

    The number of hits is the bound. Among equally late blocks those deeper in their prompt leave first.
    """
    prompts = [request.block_ids for request in traffic.requests]
    later = _next_uses(prompts)
    held: dict[int, int] = {}  # block -> prompt that uses it next
    latest: list[tuple[int, int, int]] = []  # heap of (-next use, -depth, block); entries that are out of date stay
    hit_blocks, hit_last = [], []
    for index, (ids, uses) in enumerate(zip(prompts, later, strict=True)):
        hits = 0
        was_held = False
        for depth, (block, use) in enumerate(zip(ids, uses, strict=True)):
            was_held = held.pop(block, -1) == index
            hits += was_held
            if use != _NEVER:
                held[block] = use
                heapq.heappush(latest, (-use, -depth, block))
        hit_blocks.append(hits)
        hit_last.append(was_held)
        while len(held) > capacity_blocks:
            use, _, block = heapq.heappop(latest)
            if held.get(block) == -use:
                del held[block]
    return Bound(hit_blocks, hit_last)


def _next_uses(prompts: list[list[int]]) -> list[list[int]]:
    """For each access, the index of the next prompt that holds the same block."""
    later: list[list[int]] = []
    upcoming: dict[int, int] = {}
    for index in range(len(prompts) - 1, -1, -1):
        later.append([upcoming.get(block, _NEVER) for block in prompts[index]])
        for block in prompts[index]:
            upcoming[block] = index
    later.reverse()
    return later
