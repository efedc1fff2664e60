"""A tier in LMCache's cache server (``lm://``)."""

from kvlab.stores.lm.store import LMStore

__all__ = ["LMStore"]
