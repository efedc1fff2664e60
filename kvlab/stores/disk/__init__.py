"""A tier in a folder."""

from kvlab.stores.disk.store import DiskStore

__all__ = ["DiskStore"]
