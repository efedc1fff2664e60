"""A tier in host memory."""

from kvlab.stores.memory.store import MemoryStore

__all__ = ["MemoryStore"]
