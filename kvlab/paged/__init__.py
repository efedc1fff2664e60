"""Paged KV: layouts as data, what lies where in a page, and copies between an engine's pages and host memory."""

from kvlab.paged.layout import PageLayout, page_layout
from kvlab.paged.probe import Scratch, understand
from kvlab.paged.reference import gather, scatter
from kvlab.paged.transfer import Transfer, open_transfer
from kvlab.paged.typed import Opaque, PageMap, TypedPages

__all__ = [
    "Opaque",
    "PageLayout",
    "PageMap",
    "Scratch",
    "Transfer",
    "TypedPages",
    "gather",
    "open_transfer",
    "page_layout",
    "scatter",
    "understand",
]


def __dir__() -> list[str]:
    return __all__
