"""The backends that are compared, as data: the server's flags and environment, and what each needs beside it.

Only these differ between backends. vLLM's own prefix cache on the GPU is off everywhere but in ``vllm-prefix`` and
``vllm-simple``: left on, it would serve the second run and every backend would look alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlab.connectors.config import ConnectorConfig, vllm_config
from kvlab.errors import ConfigError, nearest


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
        return self.name.startswith(("kvlab", "lmcache")) and self.name != "lmcache-mp"


NAMES = (
    "none",
    "vllm-prefix",
    "vllm-offload",
    "vllm-fs",
    "vllm-simple",
    "lmcache-mp",
    "lmcache-cpu",
    "lmcache-disk",
    "lmcache-redis",
    "kvlab-memory",
    "kvlab-disk",
    "kvlab-redis",
    "kvlab-tiered",
    "kvlab-serve",
)
NEEDS_REDIS = ("lmcache-redis", "kvlab-redis")
DEPRECATED = ("lmcache-cpu", "lmcache-disk", "lmcache-redis")  # LMCache in the engine's process
NEEDS_GPU = {  # what they say of themselves, or do
    "vllm-offload": "vLLM's OffloadingConnector supports CUDA, ROCm and XPU only",
    "vllm-fs": "vLLM's OffloadingConnector supports CUDA, ROCm and XPU only",
    "vllm-simple": "vLLM's SimpleCPUOffloadConnector copies on CUDA streams",
    "lmcache-mp": "vLLM for CPUs does not start with LMCache's connector",
    **dict.fromkeys(DEPRECATED, "LMCache starts on a CPU, and loads nothing"),
}


def named_backend(
    name: str,
    *,
    cache_bytes: int,
    folder: Path,
    redis_url: str | None = None,
    beside: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Backend:
    """The backend called `name`. `cache_bytes` is the size of its tier, `beside` the address of a cache that runs
    beside the engine, `settings` go to kvlab's connector alone."""
    if name not in NAMES:
        raise ConfigError(
            f"backend must be one of {', '.join(NAMES)}, or store URLs; got {name!r}{nearest(name, NAMES)}"
        )
    if name in NEEDS_REDIS and redis_url is None:
        raise ConfigError(f"backend {name!r} needs a Redis server; give its URL")
    off = ("--no-enable-prefix-caching",)
    if name == "none":
        return Backend(name, off)
    if name == "vllm-prefix":
        return Backend(name, ("--enable-prefix-caching",))
    if name.startswith("vllm-"):
        return _of_vllm(name, off, cache_bytes, folder)
    if name == "lmcache-mp":
        extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": int(beside) if beside.isdecimal() else 0}
        return Backend(name, (*off, *_connector(_both("LMCacheMPConnector", extra))))
    if name.startswith("lmcache-"):
        flags = (*off, *_connector(_both("LMCacheConnectorV1", {})))
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
        "kvlab-serve": [f"kvlab://{beside}"],
        "kvlab-tiered": [f"memory://?size={cache_bytes // 4}", f"file://{folder}?{size}"],
    }[name]
    return from_tiers(tiers, name=name, folder=folder if "file://" in tiers[-1] else None, settings=settings)


def _of_vllm(name: str, off: tuple[str, ...], cache_bytes: int, folder: Path) -> Backend:
    """vLLM's own connectors. Its files have no limit of their own: host memory, a quarter, lies above them. The simple
    one caches nothing without vLLM's prefix cache, which therefore is on beside it."""
    connector = "SimpleCPUOffloadConnector" if name == "vllm-simple" else "OffloadingConnector"
    extra: dict[str, Any] = {"cpu_bytes_to_use": cache_bytes}
    if name == "vllm-fs":
        tiers = [{"type": "fs", "root_dir": str(folder)}]
        extra = {"cpu_bytes_to_use": cache_bytes // 4, "spec_name": "TieringOffloadingSpec", "secondary_tiers": tiers}
    prefix = ("--enable-prefix-caching",) if name == "vllm-simple" else off
    return Backend(name, (*prefix, *_connector(_both(connector, extra))), {}, folder if name == "vllm-fs" else None)


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


def _both(connector: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    more = {"kv_connector_extra_config": dict(extra)} if extra else {}
    return {"kv_connector": connector, "kv_role": "kv_both", **more}


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
