"""Paged KV: layouts as data, and copies between an engine's pages and contiguous chunk buffers."""

from kvlab.paged.layout import PageLayout, page_layout
from kvlab.paged.reference import gather, scatter

__all__ = ["PageLayout", "gather", "page_layout", "scatter"]


def __dir__() -> list[str]:
    return __all__
