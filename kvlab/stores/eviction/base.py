"""What an eviction policy is."""

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable
from typing import ClassVar


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

    def evict(self) -> Hashable | None:
        """`victim` and `discard` in one step, for owners that pin nothing; None if nothing is here."""
        key = self.victim()
        if key is not None:
            self.discard(key)
        return key

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        """`touch` each of `keys`, in their order."""
        for key in keys:
            self.touch(key)
