"""Who leaves when a tier is full. One small class per policy, over keys and byte sizes.

A policy only orders keys; the store (or the simulator) owns the bytes, asks `victim` and confirms with `discard`.
None of them is told the capacity: a victim is only asked for when the tier is full, so what is held then is it.
A package adds a policy through the entry point group ``kvlab.policies``: name -> class, made without arguments.
"""

from kvlab.errors import ConfigError, among
from kvlab.installed import class_at, found, label, told
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
    "policy_class",
    "policy_name",
]

GROUP = "kvlab.policies"  # of entry points
POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (LRUPolicy, FIFOPolicy, LFUPolicy, MRUPolicy, S3FIFOPolicy, ARCPolicy)
}


def get_policy(policy: str | type[EvictionPolicy]) -> EvictionPolicy:
    """A new, empty policy by name, or of a class.

    Raises
    ------
    ConfigError
        for an unknown name, with the known ones named, and for a class that is no policy or cannot be made
    """
    cls = policy_class(policy)
    try:
        return cls()
    except Exception as error:
        if cls in POLICIES.values():
            raise
        raise ConfigError(
            f"policy {policy_name(policy)!r} must be made without arguments and raise nothing: {told(error)}"
        ) from error


def policy_class(policy: object, *, also: tuple[str, ...] = ()) -> type[EvictionPolicy]:
    """The class of `policy`: a name of `POLICIES` or of an entry point, or the class itself. `also`: names that the
    caller takes beside them."""
    if isinstance(policy, str):
        if policy in POLICIES:
            return POLICIES[policy]
        others = found(GROUP)
        if policy not in others:
            raise ConfigError(
                f"unknown eviction policy {policy!r}; {among(policy, sorted({*POLICIES, *others, *also}))}"
            )
        cls: object = class_at(GROUP, policy, others[policy])
        shown = label(GROUP, policy, others[policy])
    else:
        cls, shown = policy, "policy"
    if not (isinstance(cls, type) and issubclass(cls, EvictionPolicy)):
        kind = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        raise ConfigError(f"{shown} must be a name or a class made from EvictionPolicy, got {kind}")
    return cls


def policy_name(policy: str | type[EvictionPolicy]) -> str:
    """What rows and figures call it: its name, or that of a class without one."""
    if isinstance(policy, str):
        return policy
    cls = policy_class(policy)
    return str(vars(cls).get("name", cls.__name__))
