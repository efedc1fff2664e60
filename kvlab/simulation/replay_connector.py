"""Replay traffic as vLLM's connector does over host memory and one secondary tier, one request after the other.

It differs from `CacheEngine` over a stack of stores: what lies in memory is neither looked up nor renewed below, the
objects of a hit are renewed once and cannot leave for each other, and a prompt that is held whole is not renewed again.
"""

from collections.abc import Collection, Sequence

from kvlab.simulation.replay import Objects, Replay, find
from kvlab.simulation.replay_tiers import Tier
from kvlab.simulation.traffic import Request
from kvlab.stores.eviction import EvictionPolicy


class _LeasingTier(Tier):
    def put(self, key: int, size: int, leased: Collection[int] = ()) -> bool:
        """Whether there was room, but for what is leased."""
        if size > self.capacity:
            return False
        while self.used + size > self.capacity:
            victim = self.policy.victim(leased)
            if not isinstance(victim, int):
                return False
            self.policy.discard(victim)
            gone = self.held.pop(victim)
            self.used -= gone
            self.count.evictions += 1
            self.count.evicted_size += gone
        return super().put(key, size)


def replay_connector(
    objects: Objects, requests: Sequence[Request], tiers: Sequence[tuple[EvictionPolicy, int]], sizes: list[int]
) -> Replay:
    """Replay `requests`, cut into `objects`, through `tiers` (policy, capacity): host memory, and perhaps one secondary
    tier."""
    stack = [_LeasingTier(policy, capacity) for policy, capacity in tiers]
    memory, secondary = stack[0], stack[1] if len(stack) > 1 else None
    step, result = objects.step, Replay([], [tier.count for tier in stack], [tier.held for tier in stack])
    for ids, keys, request in zip(objects.block_ids, objects.keys, requests, strict=True):
        candidates = (ids if step > 1 else keys) if request.loads else []
        found, hit = find(ids, keys, step, {key: 1 for key in candidates if any(key in tier.held for tier in stack)})
        loaded, num_loads = [0] * len(stack), [0] * len(stack)
        leased = {key for key in found if key in memory.held}
        for index, key in enumerate(found):
            size = sizes[min(step, hit - index * step)]
            level = 0 if key in leased else 1
            if secondary is not None and level:
                if not memory.put(key, size, leased):
                    hit, found = index * step, found[:index]
                    break
                secondary.policy.touch(key)
                leased.add(key)
            loaded[level] += size
            num_loads[level] += 1
        memory.policy.touch_all(reversed(found))
        result.hit_blocks.append(hit)
        for level, tier in enumerate(stack):
            tier.count.loaded.append(loaded[level])
            tier.count.num_loads.append(num_loads[level])
        if hit < len(ids) and request.saves:
            _save(ids, keys, step, sizes, memory, secondary)
    return result


def _save(
    ids: list[int], keys: list[int], step: int, sizes: list[int], memory: _LeasingTier, secondary: _LeasingTier | None
) -> None:
    """What memory lacks is put there, and below what is not there either; what is being written below stays."""
    writing: set[int] = set()
    for index, key in enumerate(keys):
        size = sizes[min(step, len(ids) - index * step)]
        if key not in memory.held and memory.put(key, size, writing) and secondary and key not in secondary.held:
            secondary.put(key, size)
            writing.add(key)
    memory.policy.touch_all(reversed(keys))
