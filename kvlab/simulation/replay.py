"""Replay traffic through one tier, call by call as `CacheEngine` does, with the stores' own eviction classes.

For each prompt the engine would `load`, compute the rest, `save`. On the policy that is: touch what was found
from the last object to the first, touch each once more as it is read, admit what was not there (evicting where there is
no room), touch all of the prompt's objects from the last to the first. No bytes move; everything else happens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from kvlab.errors import ConfigError
from kvlab.simulation.traffic import Traffic
from kvlab.stores.eviction import EvictionPolicy


@dataclass(frozen=True)
class Objects:
    """Traffic cut into stored objects: chunks of `step` blocks and each prompt's tail.

    `keys[r]` are the objects prompt r is stored as; an object goes by the id of its last block, as in `kvlab.chunking`.
    """

    block_ids: list[list[int]]
    keys: list[list[int]]
    step: int


@dataclass
class TierCount:
    """What one tier saw. Sizes are in the unit of its capacity (bytes, or blocks)."""

    loaded: list[int]  # size read from it, per prompt
    num_loads: list[int]  # objects read from it, per prompt
    puts: int = 0
    put_size: int = 0
    evictions: int = 0
    evicted_size: int = 0


@dataclass
class Replay:
    """`hit_blocks[r]`: length in blocks of the prefix of prompt r that was there. `held`: what each tier holds at the
    end, by key."""

    hit_blocks: list[int] = field(default_factory=list)
    tiers: list[TierCount] = field(default_factory=list)
    held: Sequence[Collection[int]] = ()


@lru_cache(maxsize=4)
def cut(traffic: Traffic, chunk_tokens: int) -> Objects:
    """The objects of every prompt; `chunk_tokens` must be a multiple of the traffic's block."""
    step, rest = divmod(chunk_tokens, traffic.block_tokens)
    if rest or step < 1:
        raise ConfigError(
            f"chunk_tokens must be a multiple of the traffic's block_tokens={traffic.block_tokens}, got {chunk_tokens}"
        )
    block_ids = [request.block_ids for request in traffic.requests]
    if step == 1:
        return Objects(block_ids, block_ids, 1)
    keys = [ids[step - 1 :: step] + (ids[-1:] if len(ids) % step else []) for ids in block_ids]
    return Objects(block_ids, keys, step)


def find(ids: list[int], keys: list[int], step: int, held: dict[int, int]) -> tuple[list[int], int]:
    """The longest run of chunks in `held`, then the longest tail there: the objects, and their length in blocks."""
    run = 0
    for key in keys:
        if key not in held:
            break
        run += 1
    if run == len(keys):
        return keys, len(ids)
    found, hit = keys[:run], run * step
    if step > 1:
        for position in range(min(hit + step, len(ids)) - 1, hit - 1, -1):
            if ids[position] in held:
                return [*found, ids[position]], position + 1
    return found, hit


def replay(objects: Objects, policy: EvictionPolicy, capacity: int, sizes: list[int]) -> Replay:
    """Replay through one tier of `capacity`; an object of m blocks has size ``sizes[m]``, none above `capacity`.

    One loop, written for speed: about a million block accesses per second.
    """
    step, full = objects.step, sizes[objects.step]
    held: dict[int, int] = {}
    touch_all, evict, admit = policy.touch_all, policy.evict, policy.admit
    leave: Callable[[Any], int] = held.pop
    room = capacity if step > 1 else capacity // full
    puts = put_size = 0
    hit_blocks: list[int] = []
    loaded: list[int] = []
    num_loads: list[int] = []
    for ids, keys in zip(objects.block_ids, objects.keys, strict=True):
        found, hit = find(ids, keys, step, held)
        hit_blocks.append(hit)
        num_loads.append(len(found))
        if found:
            touch_all(reversed(found))  # lookup
            touch_all(found)  # load
            loaded.append(full * (hit // step) + (sizes[hit % step] if hit % step else 0))
        else:
            loaded.append(0)
        missing = [key for key in keys if key not in held]
        if step == 1:  # all of one size
            for key in missing:  # store
                if room:
                    room -= 1
                else:
                    leave(evict())  # something is held, so something leaves
                held[key] = full
                admit(key, full)
        elif missing:
            last, last_size = keys[-1], sizes[len(ids) % step or step]
            for key in missing:
                size = last_size if key == last else full
                while room < size:
                    room += leave(evict())
                held[key] = size
                room -= size
                put_size += size
                admit(key, size)
        puts += len(missing)
        touch_all(reversed(keys))
    if step == 1:
        put_size = puts * full
    count = TierCount(loaded, num_loads, puts, put_size, puts - len(held), put_size - sum(held.values()))
    return Replay(hit_blocks, [count], [held])
