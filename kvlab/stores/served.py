"""``kvlab:///run/kvlab.sock``: the tiers of a cache server (`kvlab serve`), to which engines attach."""

from typing import Any, NoReturn

from kvlab.errors import ConfigError
from kvlab.stores.url import StoreURL

SCHEME = "kvlab"


class ServedStore:
    """Known by its URL alone: an engine reads and writes a cache server's tiers through memory that both map, which is
    no store of bytes. `open_store` refuses it and names the ways to look inside."""

    def __init__(self, path: str) -> None:
        refuse(path)

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        if url.netloc or not url.path.strip("/"):
            raise ConfigError(f"a cache server's socket must be like kvlab:///run/kvlab.sock, got {url.shown!r}")
        return {"path": url.path}


def refuse(path: str) -> NoReturn:
    raise ConfigError(
        f"kvlab://{path} is for engines, which attach to it; open the tiers that the server was given, or its --metrics"
    )
