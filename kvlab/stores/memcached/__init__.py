"""A tier in memcached."""

from kvlab.stores.memcached.store import MemcachedStore

__all__ = ["MemcachedStore"]
