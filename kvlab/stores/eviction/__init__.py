"""Who leaves when a tier is full. One small class per policy, over keys and byte sizes.

A policy only orders keys; the store (or the simulator) owns the bytes, asks `victim` and confirms with `discard`.
None of them is told the capacity: a victim is only asked for when the tier is full, so what is held then is it.
"""

from kvlab.errors import ConfigError
from kvlab.stores.eviction.arc import ARCPolicy
from kvlab.stores.eviction.base import EvictionPolicy
from kvlab.stores.eviction.lfu import LFUPolicy
from kvlab.stores.eviction.queues import FIFOPolicy, LRUPolicy, MRUPolicy
from kvlab.stores.eviction.s3fifo import S3FIFOPolicy

__all__ = [
    "POLICIES",
    "ARCPolicy",
    "EvictionPolicy",
    "FIFOPolicy",
    "LFUPolicy",
    "LRUPolicy",
    "MRUPolicy",
    "S3FIFOPolicy",
    "get_policy",
]

POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (LRUPolicy, FIFOPolicy, LFUPolicy, MRUPolicy, S3FIFOPolicy, ARCPolicy)
}


def get_policy(name: str) -> EvictionPolicy:
    """A new, empty policy by name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
