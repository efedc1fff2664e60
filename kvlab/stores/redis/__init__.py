"""A tier in Redis or Valkey: one server, one behind sentinels, or a cluster."""

from kvlab.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
