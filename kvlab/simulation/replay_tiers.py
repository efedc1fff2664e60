"""Replay traffic through several tiers, and with admission: as `CacheEngine` over a write-through `TieredStore`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.errors import ConfigError
from kvlab.simulation.foreign import rule_of
from kvlab.simulation.replay import Objects, Replay, TierCount, find
from kvlab.stores.admission import AdmissionRule, get_rule
from kvlab.stores.eviction import EvictionPolicy


@dataclass(frozen=True)
class Admission:
    """What is worth storing: objects that at least `store_threshold` prompts have held, of prompts of `min_tokens` or
    more, and that `rule` admits, a class or a name. Every object ever seen is remembered.
    """

    store_threshold: int = 1
    min_tokens: int = 0
    rule: str | type[AdmissionRule] | None = None

    def __post_init__(self) -> None:
        if self.rule is not None:
            get_rule(self.rule)
        if self.store_threshold < 1 or self.min_tokens < 0:
            raise ConfigError(
                f"admission needs store_threshold >= 1 and min_tokens >= 0, "
                f"got {self.store_threshold} and {self.min_tokens}"
            )


class Tier:
    """A policy, what it holds by key, and counts."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy, self.capacity, self.used = policy, capacity, 0
        self.held: dict[int, int] = {}
        self.count = TierCount([], [])

    def put(self, key: int, size: int) -> bool:
        if size > self.capacity:
            return False
        while self.used + size > self.capacity:
            gone: Any = self.policy.evict()  # something is held, so something leaves
            gone_size = self.held.pop(gone)
            self.used -= gone_size
            self.count.evictions += 1
            self.count.evicted_size += gone_size
        self.held[key] = size
        self.used += size
        self.policy.admit(key, size)
        self.count.puts += 1
        self.count.put_size += size
        return True


def replay_tiers(
    objects: Objects,
    tiers: Sequence[tuple[EvictionPolicy, int]],
    sizes: list[int],
    num_tokens: Sequence[int],
    admission: Admission | None = None,
    *,
    block_tokens: int = 1,
) -> Replay:
    """Replay through `tiers` (policy, capacity), fastest first.

    What is stored goes to every tier; what is read comes from the first tier that has it and is copied to those above.
    """
    admission = admission or Admission()
    stack = [Tier(policy, capacity) for policy, capacity in tiers]
    uses: dict[int, int] = {}
    rule = rule_of(admission.rule) if admission.rule is not None else None
    result = Replay([], [tier.count for tier in stack], [tier.held for tier in stack])
    step = objects.step
    for ids, keys, tokens in zip(objects.block_ids, objects.keys, num_tokens, strict=True):
        if len(stack) == 1:
            found, hit = find(ids, keys, step, stack[0].held)
        else:
            candidates = ids if step > 1 else keys
            found, hit = find(ids, keys, step, {key: 1 for key in candidates if any(key in t.held for t in stack)})
        for tier in stack:
            tier.policy.touch_all(reversed(found))
        loaded, num_loads = [0] * len(stack), [0] * len(stack)
        for index, key in enumerate(found):
            blocks = min(step, hit - index * step)
            for level, tier in enumerate(stack):
                if key in tier.held:
                    tier.policy.touch(key)
                    loaded[level] += sizes[blocks]
                    num_loads[level] += 1
                    for above in stack[:level]:
                        above.put(key, sizes[blocks])
                    break
            else:  # what was copied upwards has just pushed it out of the only tier that had it
                hit = index * step
                break
        result.hit_blocks.append(hit)
        for level, tier in enumerate(stack):
            tier.count.loaded.append(loaded[level])
            tier.count.num_loads.append(num_loads[level])
        if admission.store_threshold > 1:
            for key in keys:
                uses[key] = uses.get(key, 0) + 1
        there = [any(key in tier.held for tier in stack) for key in keys]
        for index, (key, present) in enumerate(zip(keys, there, strict=True)):
            if present:
                continue
            too_new = admission.store_threshold > 1 and uses[key] < admission.store_threshold
            if too_new or tokens < admission.min_tokens:
                break
            if rule is not None and not rule.admit(key, min((index + 1) * step, len(ids)) * block_tokens):
                break
            size = sizes[min(step, len(ids) - index * step)]
            if not any([tier.put(key, size) for tier in stack]):
                break
        for tier in stack:
            tier.policy.touch_all(reversed(keys))
    return result
