"""The backends that are compared, as data: the server's flags and environment, and what each needs beside it.

Only these differ between backends. vLLM's own prefix cache on the GPU is off everywhere but in ``vllm-prefix``: left
on, it would serve the second run and every backend would look alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlab.connectors.config import ConnectorConfig, vllm_config
from kvlab.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """`flags` and `env` start the server; `folder` is where its disk tier lies; `redis` is the server it talks to."""

    name: str
    flags: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    redis: str | None = None

    @property
    def tells_of_loads(self) -> bool:
        """Whether its server logs each load, so that hits can be checked against them."""
        return self.name.startswith(("kvlab", "lmcache"))


NAMES = (
    "none",
    "vllm-prefix",
    "vllm-offload",
    "lmcache-cpu",
    "lmcache-disk",
    "lmcache-redis",
    "kvlab-memory",
    "kvlab-disk",
    "kvlab-redis",
    "kvlab-tiered",
)
NEEDS_REDIS = ("lmcache-redis", "kvlab-redis")


def named_backend(
    name: str,
    *,
    cache_bytes: int,
    folder: Path,
    redis_url: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Backend:
    """The backend called `name`. `cache_bytes` is the size of its tier, `settings` go to kvlab's connector alone."""
    if name not in NAMES:
        raise ConfigError(f"backend must be one of {', '.join(NAMES)}, or store URLs; got {name!r}")
    if name in NEEDS_REDIS and redis_url is None:
        raise ConfigError(f"backend {name!r} needs a Redis server; give its URL")
    off = ("--no-enable-prefix-caching",)
    if name == "none":
        return Backend(name, off)
    if name == "vllm-prefix":
        return Backend(name, ("--enable-prefix-caching",))
    if name == "vllm-offload":
        extra = {"cpu_bytes_to_use": cache_bytes}
        return Backend(
            name,
            (
                *off,
                *_connector(
                    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
                ),
            ),
        )
    if name.startswith("lmcache-"):
        flags = (*off, *_connector({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}))
        disk = folder if name == "lmcache-disk" else None
        return Backend(
            name,
            flags,
            _lmcache_env(name, cache_bytes, folder, redis_url),
            disk,
            redis_url if "redis" in name else None,
        )
    size = f"size={cache_bytes}"
    tiers = {
        "kvlab-memory": [f"memory://?{size}"],
        "kvlab-disk": [f"file://{folder}?{size}"],
        "kvlab-redis": [redis_url or ""],
        "kvlab-tiered": [f"memory://?size={cache_bytes // 4}", f"file://{folder}?{size}"],
    }[name]
    return from_tiers(tiers, name=name, folder=folder if "file://" in tiers[-1] else None, settings=settings)


def from_tiers(
    tiers: Sequence[str],
    *,
    name: str | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Backend:
    """kvlab over any store URLs, fastest first. Raises ConfigError on a wrong one, before a server is started."""
    config = vllm_config(list(tiers), **{"report": True, **(settings or {})})
    redis = next((url for url in ConnectorConfig(tuple(tiers)).secondary_tiers if url.startswith("redis")), None)
    if folder is None:
        folder = next(
            (Path(url.partition("?")[0].removeprefix("file://")) for url in tiers if url.startswith("file://")), None
        )
    label = name or "kvlab " + "+".join(url.partition(":")[0] for url in tiers)
    return Backend(label, ("--no-enable-prefix-caching", *_connector(config)), {}, folder, redis)


def _connector(config: Mapping[str, Any]) -> tuple[str, str]:
    return "--kv-transfer-config", json.dumps(config)


def _lmcache_env(name: str, cache_bytes: int, folder: Path, redis_url: str | None) -> dict[str, str]:
    """LMCache's variables. Tails shorter than a chunk are stored, as in the published runs: ShareGPT's prompts are
    mostly shorter than one chunk. Its disk reads go past the page cache, as ours do."""
    size = f"{cache_bytes / 2**30:.2f}"
    buffer = size if name == "lmcache-cpu" else f"{min(cache_bytes / 2**30, 5):.2f}"  # 5 GB is its default
    env = {
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_SAVE_UNFULL_CHUNK": "True",
        "LMCACHE_LOCAL_CPU": "True" if name == "lmcache-cpu" else "False",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": buffer,
        "LMCACHE_TRACK_USAGE": "false",
    }
    if name == "lmcache-disk":
        env |= {"LMCACHE_LOCAL_DISK": f"file://{folder}/", "LMCACHE_MAX_LOCAL_DISK_SIZE": size}
        env |= {"LMCACHE_EXTRA_CONFIG": json.dumps({"use_odirect": True})}
    if name == "lmcache-redis":
        env |= {"LMCACHE_REMOTE_URL": redis_url or "", "LMCACHE_REMOTE_SERDE": "naive"}
    return env
