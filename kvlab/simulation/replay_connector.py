"""Replay traffic as vLLM's connector does over host memory and one secondary tier, one request after the other.

It differs from `CacheEngine` over a stack of stores: what lies in memory is neither looked up nor renewed below, the
objects of a hit are renewed once and cannot leave for each other, and a prompt that is held whole is not renewed again.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvlab.errors import ConfigError
from kvlab.simulation.replay import Objects, Replay, find
from kvlab.simulation.replay_tiers import Tier
from kvlab.simulation.traffic import Request
from kvlab.stores.eviction import EvictionPolicy


@dataclass(frozen=True)
class ConnectorRules:
    """Settings of vLLM's connector that decide how much of a prompt is served, at the connector's own defaults.

    Without `save_partial_block` whole blocks before the prompt's last token are served, else all but that token (which
    counts as found). Hits of fewer than `min_hit_tokens` tokens are computed.
    """

    save_partial_block: bool = True
    min_hit_tokens: int = 1

    def __post_init__(self) -> None:
        if type(self.save_partial_block) is not bool:
            raise ConfigError(f"save_partial_block must be true or false, got {self.save_partial_block!r}")
        if type(self.min_hit_tokens) is not int or self.min_hit_tokens < 1:
            raise ConfigError(f"min_hit_tokens must be an integer >= 1, got {self.min_hit_tokens!r}")

    def most_blocks(self, num_tokens: int, num_blocks: int, block_tokens: int) -> int:
        """How many of a prompt's blocks can be served."""
        return num_blocks if self.save_partial_block else min(num_blocks, (num_tokens - 1) // block_tokens)

    def is_too_short(self, hit_blocks: int, num_tokens: int, block_tokens: int) -> bool:
        """Whether a hit is computed for its length. The prompt's last token is never loaded."""
        return min(hit_blocks * block_tokens, num_tokens - 1) < self.min_hit_tokens

    def served(self, hit_blocks: int, num_tokens: int, num_blocks: int, block_tokens: int) -> int:
        """Blocks that are loaded where `hit_blocks` are held."""
        served = min(hit_blocks, self.most_blocks(num_tokens, num_blocks, block_tokens))
        return 0 if self.is_too_short(served, num_tokens, block_tokens) else served


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
    objects: Objects,
    requests: Sequence[Request],
    tiers: Sequence[tuple[EvictionPolicy, int]],
    sizes: list[int],
    rules: ConnectorRules | None = None,
    *,
    block_tokens: int = 1,
) -> Replay:
    """Replay `requests`, cut into `objects`, through `tiers` (policy, capacity): host memory, and perhaps one secondary
    tier."""
    rules = rules or ConnectorRules()
    stack = [_LeasingTier(policy, capacity) for policy, capacity in tiers]
    memory, secondary = stack[0], stack[1] if len(stack) > 1 else None
    step, result = objects.step, Replay([], [tier.count for tier in stack], [tier.held for tier in stack])
    for ids, keys, request in zip(objects.block_ids, objects.keys, requests, strict=True):
        found: list[int] = []
        tokens, hit, served = request.num_tokens, 0, 0
        most = rules.most_blocks(tokens, len(ids), block_tokens)
        if request.loads and most:
            found, hit = find(ids, keys, step, memory.held)
            if secondary is not None and hit < most:
                below = {key: 1 for key in ids if key in memory.held or key in secondary.held}
                found, hit = find(ids, keys, step, below)
            served = rules.served(hit, tokens, len(ids), block_tokens)
            if not served:
                found, hit = [], 0
        loaded, num_loads = [0] * len(stack), [0] * len(stack)
        leased = {key for key in found if key in memory.held}
        for index, key in enumerate(found):
            if index * step >= served:
                break  # it is renewed, and nothing of it loaded
            level = 0 if key in leased else 1
            if secondary is not None and level:
                if not memory.put(key, sizes[min(step, hit - index * step)], leased):
                    hit = served = index * step
                    found = found[:index]
                    break
                secondary.policy.touch(key)
                leased.add(key)
            loaded[level] += sizes[min(step, served - index * step)]
            num_loads[level] += 1
        memory.policy.touch_all(reversed(found))
        result.hit_blocks.append(served)
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
