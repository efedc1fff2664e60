"""Codecs where the pages are: serdes over the typed pages of an engine, in torch and on a GPU."""

from kvlab.codecs.pages import PageCodec

__all__ = ["PageCodec"]


def __dir__() -> list[str]:
    return __all__
