"""A folder whose files NVIDIA NIXL reads and writes."""

from kvlab.stores.nixl.store import NixlStore

__all__ = ["NixlStore"]
