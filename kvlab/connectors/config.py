"""Settings of the vLLM connector, checked before an engine starts. vLLM itself checks none of them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self
from urllib.parse import urlencode

from kvlab.auth import AuthKey, auth_key
from kvlab.chunking import Chunker
from kvlab.errors import ConfigError, among
from kvlab.installed import options_of
from kvlab.stated import CHUNKED_KINDS, CODED_KINDS, is_chunked, is_coded
from kvlab.stores import check_url
from kvlab.stores.admission import get_rule
from kvlab.stores.eviction import get_policy
from kvlab.stores.served import SCHEME as SERVED
from kvlab.stores.url import StoreURL, shown_url
from kvlab.transforms import get_transform, transform_id
from kvlab.units import parse_bytes


@dataclass(frozen=True)
class ConnectorConfig:
    """What ``kv_connector_extra_config`` may hold.

    Parameters
    ----------
    tiers
        store URLs, fastest first. At most one ``memory://`` (the engine's own host memory, the first tier);
        any others are secondary tiers. ``?serde=NAME`` chooses how a tier encodes, ``?auth=FILE`` names the file of a
        key that the objects of secondary tiers are signed with; neither differs between these. No password may stand
        in a URL, as vLLM logs them: see docs/guide/security.md.
    chunk_tokens
        tokens of one stored object; a multiple of the engine's block size.
    staging
        host memory for objects on their way to and from secondary tiers when no ``memory://`` tier is given.
    gpu_staging
        GPU memory for the buffers between pages and host memory; on a CPU nothing is taken.
    lookup_timeout_ms
        how long a request may wait for secondary tiers to say what they have; then it goes without.
    load_timeout_ms
        how long a request may wait for a load from secondary tiers; then it is computed.
    save_partial_block
        save also the block that a prompt fills only in part, so that the same prompt computes one
        token when it comes again. Costs a block of each prompt; the bytes beyond its tokens are zeros.
    save_generated
        store the KV of generated tokens too, not only of prompts.
    min_hit_tokens
        shorter hits are recomputed rather than loaded.
    admission
        do not make loads that recent measurements show to take longer than computing the tokens.
    store_threshold
        save an object only from the n-th prompt on that holds it.
    store_rule
        a rule that decides which objects are saved, by name: see docs/guide/add-a-policy.md.
    transform
        what is done to KV on its way into host memory and back, by name: see docs/guide/add-a-transform.md.
    max_pinned_share
        share of the memory tier that requests may pin; 0 refuses pins.
    max_salt_share
        share of the memory tier that the objects of one ``cache_salt`` may take; beyond it a salt's own leave first.
    quality_check
        share of the requests with a hit in host memory that are computed instead, from 0 to 1: what is held of one
        block is compared with what was computed, and the difference counted.
    report
        attach a row (tokens hit, bytes, ms, tier) to each finished request's ``kv_transfer_params``.
    namespace
        extra text that keeps this engine's entries apart from others'.
    enabled
        False turns the cache off without taking the connector out.
    """

    tiers: tuple[str, ...] = ("memory://?size=1GiB",)
    chunk_tokens: int = 256
    staging: int = 256 << 20
    gpu_staging: int = 128 << 20
    lookup_timeout_ms: float = 100.0
    load_timeout_ms: float = 30_000.0
    save_partial_block: bool = True
    save_generated: bool = False
    min_hit_tokens: int = 1
    admission: bool = True
    store_threshold: int = 1
    store_rule: str = ""
    transform: str = ""
    max_pinned_share: float = 0.5
    max_salt_share: float = 1.0
    quality_check: float = 0.0
    report: bool = False
    namespace: str = ""
    enabled: bool = True

    memory_bytes: int = field(init=False, default=0)
    policy: str = field(init=False, default="lru")
    secondary_tiers: tuple[str, ...] = field(init=False, default=())
    serde: str = field(init=False, default="naive")  # of the secondary tiers
    slot_serde: str = field(init=False, default="naive")  # of host memory, whether it is a tier or on the way to them
    auth: AuthKey | None = field(init=False, default=None)
    auth_file: str = field(init=False, default="")
    transform_id: str = field(init=False, default="")

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> Self:
        """Check a dict from the user; unknown keys are refused with the known ones named."""
        if not isinstance(extra, Mapping):
            raise ConfigError(f"kv_connector_extra_config must be a dict of settings, got {type(extra).__name__}")
        known = [f.name for f in fields(cls) if f.init]
        unknown = sorted(set(extra) - set(known))
        if unknown:
            raise ConfigError(f"unknown connector setting {unknown[0]!r}; {among(unknown[0], known)}")
        return cls(**extra)

    def __post_init__(self) -> None:
        put = object.__setattr__
        listed: object = self.tiers  # from users: may be of any type
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(url, str) for url in listed):
            raise ConfigError(f"tiers must be a list of store URLs like ['memory://?size=1GiB'], got {_shown(listed)}")
        Chunker(self.chunk_tokens, 1)
        for name in ("staging", "gpu_staging"):
            try:
                put(self, name, parse_bytes(getattr(self, name)))
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
        for name in ("save_partial_block", "save_generated", "admission", "report", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("lookup_timeout_ms", "load_timeout_ms"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
                raise ConfigError(f"{name} must be a number from 0 to 10^9, got {value!r}")
        for name in ("max_pinned_share", "max_salt_share", "quality_check"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}")
        if self.max_salt_share == 0:
            raise ConfigError("max_salt_share must be above 0; a salt of no share could keep nothing")
        if not isinstance(self.namespace, str):
            raise ConfigError(f"namespace must be text, got {type(self.namespace).__name__}")
        for name in ("min_hit_tokens", "store_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
        lower: list[str] = []
        serdes: set[str] = set()
        key_files: set[str] = set()
        for position, raw in enumerate(self.tiers):
            url = StoreURL.parse(raw)
            if url.holds_secret:  # vLLM logs its arguments, and a server's are seen by every user of the machine
                ways = "give it by ?password_file=/path or the environment (KVLAB_REDIS_PASSWORD)"
                raise ConfigError(f"a tier's URL must hold no password, {url.shown!r} does; {ways}")
            if url.user and "password_file" not in url.options and not os.environ.get("KVLAB_REDIS_PASSWORD"):
                raise ConfigError(f"the user of {url.shown!r} needs ?password_file=/path or KVLAB_REDIS_PASSWORD")
            if url.scheme == "memory":
                if position:
                    raise ConfigError(
                        f"memory:// must be the first tier and the only one of its kind, got {_shown(self.tiers)}"
                    )
                if "auth" in url.options:
                    raise ConfigError(
                        f"auth is for the URLs of secondary tiers; the engine's own host memory, {url.shown!r}, is "
                        "not signed"
                    )
                put(self, "slot_serde", _checked_serde(url.take("serde", "naive")))
                if self.slot_serde != "naive" and not is_coded(self.slot_serde):
                    raise ConfigError(
                        f"serde {self.slot_serde!r} has no fixed size, which slots of host memory need; use "
                        f"{', '.join(CODED_KINDS)} at {url.shown!r}, or {self.slot_serde!r} at secondary tiers alone"
                    )
                put(self, "memory_bytes", url.take_bytes("size", default="1GiB"))
                put(self, "policy", url.take("policy", "lru"))
                get_policy(self.policy)
                if url.netloc or url.path:
                    raise ConfigError(f"memory:// is this process's memory and has no place, got {url.shown!r}")
                url.done()
                continue
            url.refuse_simulation_options()
            serdes.add(_checked_serde(url.take("serde", "naive")))
            key_files.add(url.take("auth", ""))
            for option in ("serde", "auth"):
                url.options.pop(option, None)
            base = raw.partition("?")[0]
            if any(base == other.partition("?")[0] for other in lower):
                raise ConfigError(f"{url.shown!r} stands twice among the tiers; name it once")
            lower.append(f"{base}?{urlencode(url.options)}" if url.options else base)
            check_url(lower[-1], also=("auth", "serde"))
        served = [url for url in lower if url.startswith(f"{SERVED}://")]
        if served and len(lower) > 1:
            raise ConfigError(
                f"{shown_url(served[0])!r} must be the only secondary tier: a cache server brings its own"
            )
        if served and any(map(is_chunked, serdes)):
            raise ConfigError(
                f"a cache server has no tables of models and codes no chunks as {sorted(serdes)[0]!r}: take "
                f"{', '.join(CODED_KINDS)} or lossless at {shown_url(served[0])!r}"
            )
        if len(serdes) > 1:
            raise ConfigError(
                f"all secondary tiers must use one serde, got {sorted(serdes)}; objects move between them as they are"
            )
        if len(key_files) > 1:
            raise ConfigError(
                "all secondary tiers must use one auth key file, or none; objects move between them as they are"
            )
        put(self, "auth_file", next(iter(key_files), ""))
        put(self, "auth", auth_key(self.auth_file or None))
        put(self, "serde", serdes.pop() if serdes else self.slot_serde)
        if self.memory_bytes and self.slot_serde not in ("naive", self.serde):
            raise ConfigError(
                f"tiers below memory:// with serde={self.slot_serde} must have the same serde, got {self.serde}: what "
                "one lost the other could not give back"
            )
        if not self.memory_bytes and is_coded(self.serde):
            put(self, "slot_serde", self.serde)
        put(self, "secondary_tiers", tuple(lower))
        if self.quality_check and not self.memory_bytes:
            raise ConfigError("quality_check compares what host memory holds: give memory:// as the first tier, or 0")
        if self.store_rule:
            get_rule(self.store_rule)
        if self.transform:
            get_transform(self.transform)
            put(self, "transform_id", transform_id(self.transform))
            if is_coded(self.serde) or is_chunked(self.serde):
                raise ConfigError(f"a transform works on KV as it is, use naive or lossless tiers; got {self.serde!r}")

    def __repr__(self) -> str:
        shown = {name: _shown(value) if name.endswith("tiers") else repr(value) for name, value in vars(self).items()}
        return f"ConnectorConfig({', '.join(f'{name}={value}' for name, value in shown.items())})"

    @property
    def keeps_memory(self) -> bool:
        """True where host memory is a tier of its own and not only a way to the lower ones."""
        return self.memory_bytes > 0

    @property
    def is_lossy(self) -> bool:
        """Whether what the tiers give back is not bit for bit what was computed."""
        return is_coded(self.serde) or is_chunked(self.serde) or bool(self.transform)

    @property
    def slots_are_exact(self) -> bool:
        """Whether host memory holds what was computed."""
        return self.slot_serde == "naive" and not self.transform

    @property
    def namespace_serde(self) -> str:
        """How the namespace names serde and transform: blocks that are coded one by one are other objects than chunks
        are."""
        kind, colon, options = self.serde.partition(":")
        name = f"{kind}-blocks{colon}{options}" if is_coded(self.serde) else self.serde
        return f"{name} of {self.transform_id}" if self.transform else name

    @property
    def server_socket(self) -> str:
        """The socket of the cache server that holds the secondary tiers; empty where this engine opens them."""
        first = self.secondary_tiers[0] if self.secondary_tiers else ""
        return StoreURL.parse(first).path if first.startswith(f"{SERVED}://") else ""

    @property
    def arena_bytes(self) -> int:
        """Budget of the engine's host memory."""
        return self.memory_bytes or self.staging


def _checked_serde(spec: str) -> str:
    """The whole name of the serde that `spec` chooses; ConfigError where no tier can have it."""
    if spec in ("naive", "lossless"):
        return spec  # without PyTorch, which a machine that only writes a configuration need not have
    if spec.partition(":")[0] == "cachegen":
        check_cachegen(spec)  # its tables lie beside a model, which is known once an engine starts
        return spec
    from kvlab.serde import get_serde

    serde = get_serde(spec)
    if serde.needs_kv_axes and not is_coded(spec) and not is_chunked(spec):
        known = ", ".join((*CODED_KINDS, *CHUNKED_KINDS))
        raise ConfigError(f"serde {spec!r} is not for an engine's pages; use naive, lossless, {known}")
    return serde.spec if is_coded(spec) else spec


def check_cachegen(spec: str) -> dict[str, str]:
    """The options of ``cachegen:tables=PATH,level=0.25``, both of which may be left out. ConfigError for others."""
    options = options_of("serde", spec, "level=0.25")
    if unknown := sorted(set(options) - {"tables", "level"}):
        raise ConfigError(f"cachegen takes tables and level, got {unknown[0]!r} in {spec!r}")
    try:
        level = float(options.get("level", "1"))
    except ValueError:
        level = 0.0
    if not 0 < level < float("inf"):
        raise ConfigError(f"level must be a number like 0.25, got {options['level'][:40]!r} in {spec!r}")
    return options


def _shown(tiers: object) -> str:
    """What was given as tiers, without what may be secret."""
    if isinstance(tiers, str):
        return repr(shown_url(tiers))
    if not isinstance(tiers, list | tuple):
        return type(tiers).__name__
    return str([shown_url(url) if isinstance(url, str) else type(url).__name__ for url in tiers])


def vllm_config(tiers: Sequence[str] = ("memory://?size=1GiB",), **settings: Any) -> dict[str, Any]:
    """Arguments for vLLM's ``KVTransferConfig``, checked; as JSON they are the value of ``--kv-transfer-config``.

    Parameters
    ----------
    tiers
        store URLs, fastest first. ``memory://`` is the engine's own host memory and may only come first; the others
        are secondary tiers, with ``serde=`` and ``auth=`` among their options.
    settings
        those of `ConnectorConfig`: ``chunk_tokens`` (tokens), ``lookup_timeout_ms``, ``store_threshold``, ...

    Raises
    ------
    ConfigError
        for a setting that is unknown or out of range, before an engine starts

    Examples
    --------
    >>> vllm_config(["memory://?size=8GiB", "file:///kv?size=1TiB&serde=lossless"], report=True)["kv_connector"]
    'KVLabConnector'
    """
    extra = {"tiers": list(tiers) if isinstance(tiers, tuple) else tiers, **settings}
    ConnectorConfig.from_extra(extra)
    return {
        "kv_connector": "KVLabConnector",
        "kv_connector_module_path": "kvlab.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
