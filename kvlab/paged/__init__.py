"""Paged KV: layouts as data, and copies between an engine's pages and host memory."""

from kvlab.paged.layout import PageLayout, page_layout
from kvlab.paged.reference import gather, scatter
from kvlab.paged.transfer import Transfer, open_transfer

__all__ = ["PageLayout", "Transfer", "gather", "open_transfer", "page_layout", "scatter"]


def __dir__() -> list[str]:
    return __all__
