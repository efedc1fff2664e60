"""Who leaves when a tier is full. One small class per policy, over keys and byte sizes.

A policy only orders keys; the store (or the simulator) owns the bytes, asks `victim` and confirms with `discard`.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import ClassVar

from kvlab.errors import ConfigError


class EvictionPolicy(ABC):
    """Order of leaving. Not thread-safe: its owner holds a lock."""

    name: ClassVar[str]

    @abstractmethod
    def admit(self, key: Hashable, size: int) -> None:
        """`key` of `size` bytes has entered (or entered again with a new size)."""

    @abstractmethod
    def touch(self, key: Hashable) -> None:
        """`key` was used; unknown keys are ignored."""

    @abstractmethod
    def discard(self, key: Hashable) -> None:
        """`key` has left; unknown keys are ignored."""

    @abstractmethod
    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        """The key that should leave next, never one in `pinned`; None if there is none. It stays until `discard`."""


class LRUPolicy(EvictionPolicy):
    """Least recently used first."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def admit(self, key: Hashable, size: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: Hashable) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def discard(self, key: Hashable) -> None:
        self._order.pop(key, None)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        return next((key for key in self._order if key not in pinned), None)


POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (LRUPolicy,)}


def get_policy(name: str) -> EvictionPolicy:
    """A new, empty policy by name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
