"""GPUDirect Storage by its own name: refused, with what there is instead."""

from typing import NoReturn

from kvlab.errors import ConfigError
from kvlab.stores.base import Store
from kvlab.stores.cuda_library import require_cuda
from kvlab.stores.url import StoreURL

INSTEAD = "file:///path has a folder read past the page cache, nixl:///path?plugin=GDS has cuFile through NIXL"


class GdsStore(Store):
    """Not a store: kvlab has no path from files straight into a GPU's memory."""

    @classmethod
    def from_url(cls, url: StoreURL) -> NoReturn:
        require_cuda("gds://")
        raise ConfigError(f"gds:// is not supported, got {url.shown!r}: {INSTEAD}")
