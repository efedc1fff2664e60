"""A tier in host memory."""

from kvlab.stores.memory.store import Loan, MemoryStore

__all__ = ["Loan", "MemoryStore"]
