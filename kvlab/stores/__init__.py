"""Stores: bytes in a tier, by URL.

``open_store("memory://?size=1GiB")``, ``open_store("file:///path?size=10GiB")``, and several of them, fastest first,
as one: ``open_stores(["memory://?size=1GiB", "file:///path?size=10GiB"])``. A package adds a scheme through
the entry point group ``kvlab.stores``: scheme -> class with ``from_url(StoreURL)``. A class may have
``arguments(StoreURL)`` instead: it returns the constructor's keyword arguments and opens nothing, so that `check_url`
can tell what is wrong with a URL.
"""

from collections.abc import Sequence
from typing import Any

from kvlab.errors import ConfigError, KVLabError, among
from kvlab.installed import class_at, found, label
from kvlab.stores.base import Store, StoreCounters
from kvlab.stores.url import StoreURL

__all__ = ["STORES", "Store", "StoreCounters", "StoreURL", "check_url", "open_store", "open_stores"]

GROUP = "kvlab.stores"  # of entry points
STORES = {  # scheme -> "module:Class"; imported on use
    "memory": "kvlab.stores.memory:MemoryStore",
    "file": "kvlab.stores.disk:DiskStore",
    "redis": "kvlab.stores.redis:RedisStore",
    "rediss": "kvlab.stores.redis:RedisStore",
    "unix": "kvlab.stores.redis:RedisStore",
    "redis-sentinel": "kvlab.stores.redis:RedisStore",
    "redis-cluster": "kvlab.stores.redis:RedisStore",
    "s3": "kvlab.stores.s3:S3Store",
    "lm": "kvlab.stores.lm:LMStore",
    "memcached": "kvlab.stores.memcached:MemcachedStore",
    "mooncake": "kvlab.stores.mooncake:MooncakeStore",
    "nixl": "kvlab.stores.nixl:NixlStore",
    "kvlab": "kvlab.stores.served:ServedStore",
}
REFUSED = {  # scheme -> why, and what there is instead
    "gds": "no store goes from files straight into a GPU's memory: file:///path reads a folder past the page cache, "
    "nixl:///path?plugin=GDS has cuFile through NIXL",
}


def open_store(url: str) -> Store:
    """Open the store that `url` names; use it as a context manager, or call `close`.

    Parameters
    ----------
    url
        ``memory://?size=1GiB``, ``file:///path?size=10GiB``, ``redis://host:6379/0``, ``rediss://``, ``unix://``,
        ``redis-sentinel://``, ``redis-cluster://``, ``s3://bucket/prefix``, ``lm://host:65432``,
        ``memcached://host:11211``, ``mooncake://master:50051``, ``nixl:///path``, or a scheme of the entry point group
        ``kvlab.stores``. Sizes are bytes or text such as ``200GiB``; times are milliseconds. docs/guide/stores.md lists
        the options.

    Raises
    ------
    ConfigError
        for an unknown scheme or option, with the known ones named
    StoreError
        where the medium cannot be opened

    Examples
    --------
    >>> with open_store("memory://?size=1MiB&policy=s3fifo") as store:
    ...     store.put("key", b"value"), bytes(store.get("key")), store.get("absent")
    (True, b'value', None)
    """
    parsed = StoreURL.parse(url)
    cls, where = _class_of(parsed)
    try:
        if hasattr(cls, "arguments"):  # nothing is opened for a wrong option
            arguments = cls.arguments(parsed)
            parsed.done()
            store = cls(**arguments)
        else:
            store = cls.from_url(parsed)
    except KVLabError:
        raise
    except Exception as error:
        if parsed.scheme in STORES:
            raise
        # not what it says: that may hold the URL's password
        raise ConfigError(f"{where} cannot be opened, its class raises {type(error).__name__}") from error
    if not isinstance(store, Store):
        raise ConfigError(f"{where} must be a kvlab Store, got {type(store).__name__}")
    store.url = parsed.masked
    try:
        parsed.done()
    except ConfigError:
        store.close()
        raise
    return store


def check_url(url: str, *, also: Sequence[str] = ()) -> None:
    """Raise the ConfigError that `open_store(url)` would raise, as far as it can be told without opening the store
    or reading the files that the URL names. `also`: options that the caller takes itself."""
    parsed = StoreURL.parse(url)
    parsed.reads_files = False
    cls, _ = _class_of(parsed)
    if hasattr(cls, "arguments"):
        cls.arguments(parsed)
        for option in also:
            parsed.take(option, "")
        parsed.done()


def _class_of(url: StoreURL) -> tuple[Any, str]:
    """The class for this scheme, and how errors name it."""
    others = found(GROUP)
    target = STORES.get(url.scheme) or others.get(url.scheme)
    if target is None and url.scheme in REFUSED:
        raise ConfigError(f"{url.shown!r} cannot be opened: {REFUSED[url.scheme]}")
    if target is None:
        known = sorted({*STORES, *others})
        raise ConfigError(f"unknown store scheme {url.scheme!r} in {url.shown!r}; {among(url.scheme, known)}")
    return class_at(GROUP, url.scheme, target), label(GROUP, url.scheme, target)


def open_stores(urls: Sequence[str | Store]) -> Store:
    """Open `urls`, fastest first, stacked as one `TieredStore`; a single one is opened as it is. One that is open
    already is taken over."""
    from kvlab.stores.tiered import TieredStore

    if not urls:
        raise ConfigError('name at least one store, like ["memory://?size=1GiB"]')
    stores: list[Store] = []
    try:
        stores.extend(open_store(url) if isinstance(url, str) else url for url in urls)
        return stores[0] if len(stores) == 1 else TieredStore(stores)
    except BaseException:
        for store in stores:
            store.close()
        raise


def __dir__() -> list[str]:
    return __all__
