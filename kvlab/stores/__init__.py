"""Stores: bytes in a tier, by URL.

``open_store("memory://?size=1GiB")``, ``open_store("file:///path?size=10GiB")``, and several of them, fastest first,
as one: ``open_stores(["memory://?size=1GiB", "file:///path?size=10GiB"])``. A package adds a scheme through
the entry point group ``kvlab.stores`` (scheme -> class with ``from_url(StoreURL)``).
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points

from kvlab.errors import ConfigError
from kvlab.stores.base import Store, StoreStats
from kvlab.stores.url import StoreURL

__all__ = ["STORES", "Store", "StoreStats", "StoreURL", "open_store", "open_stores"]

STORES = {  # scheme -> ("module:Class", what to install when the import fails)
    "memory": ("kvlab.stores.memory:MemoryStore", ""),
    "file": ("kvlab.stores.disk:DiskStore", ""),
    "redis": ("kvlab.stores.redis:RedisStore", ""),
    "rediss": ("kvlab.stores.redis:RedisStore", ""),
    "unix": ("kvlab.stores.redis:RedisStore", ""),
    "redis-sentinel": ("kvlab.stores.redis:RedisStore", ""),
    "redis-cluster": ("kvlab.stores.redis:RedisStore", ""),
}


def open_store(url: str) -> Store:
    """Open the store that `url` names. Unknown schemes and options are refused with the known ones named."""
    parsed = StoreURL.parse(url)
    found = {point.name: (point.value, "") for point in entry_points(group="kvlab.stores")}
    if parsed.scheme not in STORES and parsed.scheme not in found:
        known = ", ".join(sorted({*STORES, *found}))
        raise ConfigError(f"unknown store scheme {parsed.scheme!r} in {parsed.shown!r}; known: {known}")
    target, hint = STORES.get(parsed.scheme) or found[parsed.scheme]
    module, _, name = target.partition(":")
    try:
        cls = getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(f"{parsed.scheme}:// needs an extra package: {hint or error}") from error
    store = cls.from_url(parsed)
    if not isinstance(store, Store):
        raise ConfigError(f"{target} must be a kvlab Store, got {type(store).__name__}")
    store.url = parsed.masked
    try:
        parsed.done()
    except ConfigError:
        store.close()
        raise
    return store


def open_stores(urls: Sequence[str]) -> Store:
    """Open `urls`, fastest first, stacked as one `TieredStore`; a single one is opened as it is."""
    from kvlab.stores.tiered import TieredStore

    if not urls:
        raise ConfigError('name at least one store, like ["memory://?size=1GiB"]')
    stores: list[Store] = []
    try:
        stores.extend(open_store(url) for url in urls)
        return stores[0] if len(stores) == 1 else TieredStore(stores)
    except BaseException:
        for store in stores:
            store.close()
        raise
