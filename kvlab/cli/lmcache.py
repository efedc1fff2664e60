"""LMCache's settings as kvlab's: one table, from which the page docs/guide/from-lmcache.md is made.

Names and defaults are those of ``lmcache/v1/config.py``; sizes are there in units of 2**30 bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from urllib.parse import urlencode, urlsplit

from kvlab.errors import ConfigError, nearest
from kvlab.stores.url import shown_url

POLICIES = ("lru", "lfu", "fifo", "mru")
ALIASES = {  # LMCache's own
    "enable_xpyd": "enable_pd", "nixl_role": "pd_role", "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port", "nixl_peer_host": "pd_peer_host", "controller_url": "controller_pull_url",
    "plugin_locations": "runtime_plugin_locations", "external_backends": "storage_plugins",
}  # fmt: skip
MAPPED = {  # key of LMCache -> what it becomes
    "chunk_size": "`chunk_tokens`",
    "local_cpu": "a first tier `memory://`; true unless told",
    "max_local_cpu_size": "`size` of `memory://`, 5 GiB unless told; `staging` where `local_cpu` is false",
    "local_disk": "a tier `file:///path`; of several folders the first",
    "max_local_disk_size": "`size` of `file://`",
    "remote_url": "a tier: `redis://`, `rediss://`, `redis-sentinel://`, `unix://`, `lm://`; "
    "`valkey://` is `redis://`; "
    "`s3://bucket.s3.region.amazonaws.com` is `s3://bucket?region=region`, another host its `endpoint`; "
    "`mooncakestore://` is `mooncake://`; `fs://host/path` is `file:///path`, with a size to be given",
    "remote_serde": "`serde=` of the secondary tiers: `naive`",
    "extra_config": "`s3_region`, `disable_tls` where `remote_url` is a bucket; its other entries are LMCache's own",
    "cache_policy": "`policy=` of `memory://` and `file://`: LRU, LFU, FIFO, MRU",
    "save_decode_cache": "`save_generated`",
    "save_unfull_chunk": "`save_partial_block`",
    "min_retrieve_tokens": "`min_hit_tokens`",
    "lookup_timeout_ms": "`lookup_timeout_ms`",
    "blocking_timeout_secs": "`load_timeout_ms`",
}
UNMAPPED = {  # pattern of keys -> why nothing takes their place
    "pre_caching_hash_algorithm": "keys are the same in every process, whatever PYTHONHASHSEED is",
    "enable_blending": "only prefixes are reused",
    "blend_*": "only prefixes are reused",
    "enable_p2p": "engines share KV through a tier: `kvlab serve` on a host, else Redis or a shared file system",
    "p2p_*": "engines share KV through a tier: `kvlab serve` on a host, else Redis or a shared file system",
    "enable_pd": "prefill and decode in one engine; between engines use vLLM's own NixlConnector",
    "pd_*": "prefill and decode in one engine; between engines use vLLM's own NixlConnector",
    "nixl_*": "NIXL carries nothing between engines here; as storage it is a tier, nixl:///path?size=100GiB",
    "transfer_channel": "NIXL carries nothing between engines here; as storage it is a tier, nixl:///path?size=100GiB",
    "gds_*": "no file goes straight into a GPU's memory; disk tiers read past the page cache into pinned memory",
    "use_gds": "no file goes straight into a GPU's memory; disk tiers read past the page cache into pinned memory",
    "maru_*": "there is no CXL backend",
    "enable_controller": "there is no controller; `kvlab store` looks into tiers",
    "controller_*": "there is no controller; `kvlab store` looks into tiers",
    "lmcache_*": "there is no controller; `kvlab store` looks into tiers",
    "mp_*": "the connector runs within vLLM; engines of a host share a cache by `kvlab serve`",
    "internal_api_server_*": "counters are in vLLM's /metrics, tiers are looked into by `kvlab store`",
    "use_layerwise": "objects hold all layers and are loaded whole",
    "enable_async_loading": "loads from secondary tiers always run in the background",
    "use_gpu_connector_v3": "pages are copied by kvlab's own kernels",
    "local_cpu_use_hugepages": "host memory uses transparent huge pages where the system gives them",
    "reserve_local_cpu_size": "the tier takes its size and no more",
    "enable_lazy_memory_allocator": "host memory is taken at start",
    "lazy_memory_*": "host memory is taken at start",
    "numa_mode": "host memory lies with the cores that the engine may use",
    "local_disk_path_sharding": "one folder serves all ranks",
    "retrieve_locations": "tiers are asked in their order",
    "store_location": "what is stored goes to every tier",
    "external_lookup_client": "each tier is asked itself",
    "hit_miss_ratio": "counts of hits and misses are in vLLM's /metrics",
    "lookup_server_worker_ids": "the scheduler looks up by itself",
    "enable_scheduler_bypass_lookup": "the scheduler looks up by itself",
    "priority_limit": "requests of all priorities are stored; the hint `save` of a request leaves it out",
    "cost_aware_*": "there is no such policy; a class of your own takes its place (add-a-policy.md)",
    "runtime_plugin_locations": "there are no plugin processes",
    "storage_plugins": "stores of other packages come by the entry point group kvlab.stores",
    "remote_storage_plugins": "stores of other packages come by the entry point group kvlab.stores",
    "script_allowed_imports": "there are no scripts",
    "enable_chunk_statistics": "`kvlab simulate` tells what traffic reuses",
    "chunk_statistics_*": "`kvlab simulate` tells what traffic reuses",
    "enable_kv_events": "there are no KV events",
    "pin_*": "leases end with the request",
    "remote_config_url": "settings are those of --kv-transfer-config alone",
    "app_id": "settings are those of --kv-transfer-config alone",
    "*hidden_state*": "hidden states are not cached",
    "audit_actual_remote_url": "there is no audit connector",
    "py_enable_gc": "Python's collector is left as it is",
    "track_usage": "nothing is sent anywhere",
    "log_level": "the level is VLLM_LOGGING_LEVEL",
    "use_experimental": "there is one version",
}  # fmt: skip
KEYS_OF_ENVIRONMENT = "LMCACHE_"
UNKNOWN = "no key of LMCache that is known here"
OF_BUCKETS = ("s3_region", "disable_tls")  # of extra_config
CONFIG_FILE = "LMCACHE_CONFIG_FILE"  # LMCache reads this file, then the other variables over it


@dataclass
class Translated:
    """kvlab's tiers and settings, and what of LMCache's has no counterpart: one line each."""

    tiers: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """LMCache's settings among the variables, by key; not the file's path."""
    found = {name: value for name, value in environ.items() if name.startswith(KEYS_OF_ENVIRONMENT) and value}
    found.pop(CONFIG_FILE, None)
    return {name.removeprefix(KEYS_OF_ENVIRONMENT).lower(): value for name, value in found.items()}


def from_yaml(text: str, shown: str) -> dict[str, Any]:
    """LMCache's settings of a YAML file."""
    import yaml  # here, as it costs other commands 0.1 s

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{shown} must hold settings like chunk_size: 256, got {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def translate(given: Mapping[str, Any]) -> Translated:
    """LMCache's settings as kvlab's. Raises ConfigError for a value that LMCache would not take either."""
    done = Translated()
    keys: dict[str, Any] = {}
    for written, value in given.items():
        key = ALIASES.get(written, written)
        if value is None or value == "":
            continue
        if key in MAPPED:
            keys[key] = value
        else:
            done.left_out.append(f"{written}: {reason(key)}")
    policy = _policy(keys, done)
    _memory(keys, done, policy)
    _disk(keys, done, policy)
    _remote(keys, done)
    if not done.tiers:
        raise ConfigError("no tier is left: set local_cpu, local_disk with max_local_disk_size, or remote_url")
    for key, name, read in (
        ("chunk_size", "chunk_tokens", _whole),
        ("save_decode_cache", "save_generated", _truth),
        ("lookup_timeout_ms", "lookup_timeout_ms", _number),
    ):
        if key in keys:
            done.settings[name] = read(key, keys[key])
    if "blocking_timeout_secs" in keys:
        done.settings["load_timeout_ms"] = 1000 * _number("blocking_timeout_secs", keys["blocking_timeout_secs"])
    if "min_retrieve_tokens" in keys:
        done.settings["min_hit_tokens"] = max(_whole("min_retrieve_tokens", keys["min_retrieve_tokens"]), 1)
    if "save_unfull_chunk" in keys:
        done.settings["save_partial_block"] = _truth("save_unfull_chunk", keys["save_unfull_chunk"])
        if not done.settings["save_partial_block"]:
            done.left_out.append(
                "save_unfull_chunk: false leaves out a prompt's last, partial block; its whole blocks are stored"
            )
    return done


def reason(key: str) -> str:
    """Why `key` has no counterpart."""
    for pattern, why in UNMAPPED.items():
        if fnmatch(key, pattern):
            return why.replace("`", "")
    known = [*MAPPED, *ALIASES, *(pattern for pattern in UNMAPPED if "*" not in pattern)]
    return UNKNOWN + nearest(key, known, 0.8)


def page_tables() -> str:
    """The tables of docs/guide/from-lmcache.md."""
    lines = ["| LMCache | kvlab |", "|---|---|", *(f"| `{key}` | {what} |" for key, what in MAPPED.items())]
    grouped: dict[str, list[str]] = {}
    for pattern, why in UNMAPPED.items():
        grouped.setdefault(why, []).append(f"`{pattern}`")
    lines += ["", "| no counterpart | why |", "|---|---|"]
    lines += [f"| {', '.join(patterns)} | {why} |" for why, patterns in grouped.items()]
    return "\n".join(lines)


def _policy(keys: Mapping[str, Any], done: Translated) -> str:
    name = str(keys.get("cache_policy", "lru")).strip().lower()
    if name not in POLICIES:
        done.left_out.append(f"cache_policy: there is no policy {name!r}; lru takes its place")
        name = "lru"
    return "" if name == "lru" else f"&policy={name}"


def _memory(keys: Mapping[str, Any], done: Translated, policy: str) -> None:
    size = _size("max_local_cpu_size", keys.get("max_local_cpu_size", 5.0))
    if _truth("local_cpu", keys.get("local_cpu", True)) and size:
        done.tiers.append(f"memory://?size={size}{policy}")
    elif "max_local_cpu_size" in keys and size:
        done.settings["staging"] = size


def _disk(keys: Mapping[str, Any], done: Translated, policy: str) -> None:
    if "local_disk" not in keys:
        return
    folders = [folder.strip().strip("'\"") for folder in str(keys["local_disk"]).split(",")]
    folder = folders[0].removeprefix("file://").rstrip("/")
    if len(folders) > 1:
        done.left_out.append(f"local_disk: a disk tier has one folder, {folder}; join disks below it")
    size = _size("max_local_disk_size", keys.get("max_local_disk_size", 0.0))
    if not size:
        done.left_out.append("local_disk: it holds nothing without max_local_disk_size, and becomes no tier")
    else:
        done.tiers.append(f"file://{folder}?size={size}{policy}")


def _remote(keys: Mapping[str, Any], done: Translated) -> None:
    extra = _extra(keys, done)
    serde = str(keys.get("remote_serde", "naive")).strip().lower()
    if serde != "naive":
        done.left_out.append(
            f"remote_serde: {serde} is not taken over, naive takes its place; ?serde=int4 is small too, and "
            "?serde=cachegen:level=0.25 with tables that kvlab profile makes of the model"
        )
    if "remote_url" not in keys:
        return
    url = str(keys["remote_url"]).strip().strip("'\"")
    scheme, _, rest = url.partition("://")
    scheme = {"valkey": "redis", "valkeys": "rediss"}.get(scheme, scheme)
    if scheme == "fs":
        path = urlsplit(url).path.rstrip("/")
        done.tiers.append(f"file://{path}?size=100GiB&shared=true")
        done.left_out.append(
            f"remote_url: fs:// has no budget and file:// needs one: 100GiB stands in file://{path}, change it"
        )
        return
    if scheme == "s3":
        _bucket(rest.partition("/")[0], extra, done)
        return
    if scheme == "mooncakestore":
        done.tiers.append(f"mooncake://{rest.partition('/')[0]}")
        done.left_out.append(
            "remote_url: what extra_config says of Mooncake's client is left out; ?protocol=, ?device= and ?metadata= "
            "of mooncake:// take its place"
        )
        return
    if scheme not in ("redis", "rediss", "redis-sentinel", "unix", "lm"):
        kind = shown_url(url).partition("://")[0]
        done.left_out.append(f"remote_url: there is no backend {kind}://; docs/guide/stores.md lists those there are")
        return
    login, at, rest = rest.rpartition("@")
    if at:
        user, _, password = login.partition(":")
        rest = f"{user}@{rest}" if user and not password else rest
        if password:
            way = "set KVLAB_REDIS_PASSWORD or add ?password_file=/path"
            named = f" and name the user, {scheme}://USER@{rest}" if user else ""
            done.left_out.append(f"remote_url: a password stands in no URL; {way}{named}")
    done.tiers.append(f"{scheme}://{rest.rstrip('/')}")


def _extra(keys: Mapping[str, Any], done: Translated) -> Mapping[str, Any]:
    """`extra_config`, which a variable of the environment holds as text. What is not of a bucket is named."""
    extra = keys.get("extra_config", {})
    if isinstance(extra, str):
        extra = from_yaml(extra, "extra_config")
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra_config of LMCache must hold settings, got {type(extra).__name__}")
    used = OF_BUCKETS if str(keys.get("remote_url", "")).startswith("s3://") else ()
    if left := [str(name) for name in extra if name not in used]:
        done.left_out.append(f"extra_config: its entries are LMCache's own: {', '.join(left)}")
    return extra


def _bucket(host: str, extra: Mapping[str, Any], done: Translated) -> None:
    """LMCache names a bucket by its host, the region in `extra_config`."""
    bucket, _, endpoint = host.partition(".")
    found = re.fullmatch(r"s3[.-](?:dualstack\.)?([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?", endpoint)
    region = str(extra.get("s3_region") or (found[1] if found else ""))
    options = {"region": region} if region else {}
    if not endpoint:
        done.left_out.append(f"remote_url: s3://{bucket} is taken as a bucket's name, of AWS")
    elif not found or endpoint.endswith(".cn"):
        secure = not _truth("disable_tls", extra.get("disable_tls", False))
        options["endpoint"] = f"http{'s' if secure else ''}://{endpoint}"
    done.tiers.append(f"s3://{bucket}?{urlencode(options, safe=':/')}".rstrip("?"))
    done.left_out.append("remote_url: credentials of a bucket come from where AWS tools find them, not from here")


def _size(key: str, value: Any) -> str:
    """LMCache's size, in 2**30 bytes, as kvlab writes it; empty for 0."""
    number = _number(key, value)
    return f"{number:g}GiB" if number else ""


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number < 1e12:
        raise ConfigError(f"{key} of LMCache must be a number, got {value!r}")
    return int(number) if number == int(number) else number


def _whole(key: str, value: Any) -> int:
    number = _number(key, value)
    if number != int(number):
        raise ConfigError(f"{key} of LMCache must be a whole number, got {value!r}")
    return int(number)


def _truth(key: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "yes", "no", "on", "off", "y", "n", "t", "f"):
        raise ConfigError(f"{key} of LMCache must be true or false, got {value!r}")
    return text in ("true", "1", "yes", "on", "y", "t")
