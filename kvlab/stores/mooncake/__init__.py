"""A tier in Mooncake Store."""

from kvlab.stores.mooncake.store import MooncakeStore

__all__ = ["MooncakeStore"]
