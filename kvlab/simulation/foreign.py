"""What users put into a simulation: policies and rules, whose mistakes are told as theirs, and arguments."""

from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import TypeVar

from kvlab.errors import ConfigError
from kvlab.installed import told
from kvlab.simulation.cost import Prefill
from kvlab.stores.admission import AdmissionRule, get_rule
from kvlab.stores.eviction import POLICIES, EvictionPolicy, get_policy, policy_class, policy_name

T = TypeVar("T")
ADVICE = "kvlab.testing.PolicyTests says what a policy must keep to"


def policy_of(policy: str | type[EvictionPolicy]) -> EvictionPolicy:
    """`get_policy`; what one of another package raises, or names without having been given it, is a ConfigError with
    its name."""
    made = get_policy(policy)
    return made if policy_class(policy) in POLICIES.values() else _Policy(made, policy_name(policy))


def rule_of(rule: str | type[AdmissionRule]) -> AdmissionRule:
    """`get_rule`; what it raises is a ConfigError with its name."""
    return _Rule(get_rule(rule))


def check_asked(policies: object, prefill: object) -> None:
    """ConfigError unless a miss page can be made with these."""
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise ConfigError(f"policies must be a list of policies, got {policies!r}"[:200])
    if prefill is not None and not isinstance(prefill, Prefill):
        raise ConfigError(f"prefill must be a Prefill, got {prefill!r}"[:200])


class _Policy(EvictionPolicy):
    def __init__(self, policy: EvictionPolicy, name: str) -> None:
        self._policy, self._name = policy, name
        self._held: set[Hashable] = set()

    def _asked(self, method: Callable[..., T], *args: object) -> T:
        try:
            return method(*args)
        except Exception as error:
            raise ConfigError(f"policy {self._name!r} failed: {told(error)}; {ADVICE}"[:400]) from error

    def admit(self, key: Hashable, size: int) -> None:
        self._held.add(key)
        self._asked(self._policy.admit, key, size)

    def touch(self, key: Hashable) -> None:
        self._asked(self._policy.touch, key)

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        self._asked(self._policy.touch_all, keys)

    def discard(self, key: Hashable) -> None:
        self._held.discard(key)
        self._asked(self._policy.discard, key)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        return self._known(self._asked(self._policy.victim, pinned))

    def evict(self) -> Hashable | None:
        key = self._known(self._asked(self._policy.evict))
        if key is None and self._held:
            raise ConfigError(f"policy {self._name!r} lets none of {len(self._held)} keys leave; {ADVICE}")
        self._held.discard(key)
        return key

    def _known(self, key: Hashable | None) -> Hashable | None:
        is_known = key is None or (type(key) is not bool and self._asked(self._held.__contains__, key))
        if not is_known:
            raise ConfigError(f"policy {self._name!r} names {key!r}, which it was not given; {ADVICE}"[:400])
        return key


class _Rule(AdmissionRule):
    def __init__(self, rule: AdmissionRule) -> None:
        self._rule = rule

    def admit(self, key: object, end_token: int) -> bool:
        try:
            return bool(self._rule.admit(key, end_token))
        except Exception as error:
            name = type(self._rule).__name__
            raise ConfigError(f"admission rule {name!r} failed: {told(error)}"[:400]) from error
