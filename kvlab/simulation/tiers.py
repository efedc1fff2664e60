"""A tier as the simulator sees it: how much it holds, how fast it is, what it costs."""

from dataclasses import dataclass, field

from kvlab.errors import ConfigError
from kvlab.stores.eviction import EvictionPolicy, policy_class, policy_name
from kvlab.stores.spec import TierSpec
from kvlab.stores.url import SIMULATION_OPTIONS
from kvlab.units import format_bytes, parse_bytes

# GB/s and ms of known kinds, for first answers; measure your own and pass Tier(...) instead. Memory: one H100's
# staged copies over PCIe 5 (data/published/h100_peers.json). Disk: one NVMe drive on PCIe 4. Redis: one TCP connection.
KINDS = {"file": "disk", "rediss": "redis", "unix": "redis", "redis-sentinel": "redis", "redis-cluster": "redis"}
SPEEDS = {"memory": (50.0, 0.1), "disk": (6.0, 0.5), "redis": (1.0, 1.0)}
DEFAULT_POLICY = "lru"  # of stores


@dataclass(frozen=True)
class Tier:
    """Where KV is kept.

    Parameters
    ----------
    capacity
        bytes, or blocks of the traffic where `in_blocks`; None is unbounded.
    gb_per_s, latency_ms
        reading from it, 10^9 bytes per second, and the time before the first byte.
    per_gb_month
        price of 10^9 bytes for 30 days, in any currency.
    url
        what opens such a tier: the URL that described it without the options that are for simulation alone. Empty for
        a tier that is described otherwise, or by a URL that names no place or no size in bytes.
    """

    capacity: int | None = None
    name: str = "memory"
    in_blocks: bool = False
    gb_per_s: float = SPEEDS["memory"][0]
    latency_ms: float = SPEEDS["memory"][1]
    per_gb_month: float = 0.0
    url: str = field(default="", compare=False, repr=False)  # that a store or vLLM's connector opens it by

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 0:
            raise ConfigError(f"capacity of tier {self.name!r} must not be negative, got {self.capacity}")
        if not self.gb_per_s > 0 or self.latency_ms < 0 or self.per_gb_month < 0:
            raise ConfigError(
                f"tier {self.name!r} needs gb_per_s > 0, latency_ms >= 0, per_gb_month >= 0; "
                f"got {self.gb_per_s}, {self.latency_ms}, {self.per_gb_month}"
            )

    @property
    def label(self) -> str:
        """``memory:10 GiB``, ``memory:1000 blocks``, ``memory:unbounded``."""
        if self.capacity is None:
            return f"{self.name}:unbounded"
        return f"{self.name}:{f'{self.capacity} blocks' if self.in_blocks else format_bytes(self.capacity)}"

    def url_with(self, policy: str | type[EvictionPolicy]) -> str:
        """`url`, which says `policy` too where that is not the default; nothing for a class that goes by no name. Redis
        evicts as its server is told, not its URL."""
        _, mark, query = self.url.partition("?")
        says = any(option.startswith("policy=") for option in query.split("&"))
        if policy == DEFAULT_POLICY or says or not self.url or self.name not in ("memory", "disk"):
            return self.url
        name = policy_name(policy)
        if not isinstance(policy, str) and not _is_known(name, policy):
            return ""
        return f"{self.url}{'&' if mark else '?'}policy={name}"


def as_tier(given: "Tier | str | int") -> Tier:
    """A Tier, or from the URL of a tier, as stores and vLLM's connector take it, or from a bare size of host memory:
    ``memory://?size=10GiB``, ``file:///kv?size=1TiB&gb_per_s=12``, ``10GiB``, ``10000 blocks``, ``unbounded``.

    >>> as_tier("file://?size=1TiB").gb_per_s
    6.0
    """
    return tier_and_policy(given)[0]


def tier_and_policy(given: "Tier | str | int") -> tuple[Tier, str | None]:
    """A tier as `as_tier` reads it, and the eviction policy that its URL names, if any."""
    if isinstance(given, Tier):
        return given, None
    if isinstance(given, int):
        return Tier(parse_bytes(given), url=f"memory://?size={given}"), None
    spec = TierSpec.parse(given)
    if spec.serde is not None:
        raise ConfigError(
            f"serde in the URL of {spec.name} holds for one tier, and here objects have one size in all tiers: give it "
            "as serde=..., by name where its ratio is fixed, else as the measured ratio"
        )
    kind = KINDS.get(spec.scheme, spec.scheme)
    usual_gb_per_s, usual_latency_ms = SPEEDS.get(kind, (None, None))
    gb_per_s = spec.gb_per_s if spec.gb_per_s is not None else usual_gb_per_s
    latency_ms = spec.latency_ms if spec.latency_ms is not None else usual_latency_ms
    if gb_per_s is None or latency_ms is None:
        raise ConfigError(f"the speed of {spec.name} is not known: add gb_per_s=... and latency_ms=... to its URL")
    in_blocks = spec.size_blocks is not None
    capacity = spec.size_blocks if in_blocks else spec.size_bytes
    price = spec.per_gb_month or 0.0
    return Tier(capacity, kind, in_blocks, gb_per_s, latency_ms, price, _opens(given, spec)), spec.policy


def _is_known(name: str, policy: type[EvictionPolicy]) -> bool:
    try:
        return policy_class(name) is policy
    except ConfigError:
        return False


def _opens(given: str, spec: TierSpec) -> str:
    """The URL of a store like this tier, or nothing."""
    if spec.size_bytes is None or (spec.scheme != "memory" and not spec.place):
        return ""
    if "://" not in given:
        return f"memory://?size={given.replace(' ', '')}"
    base, _, query = given.partition("?")
    kept = [option for option in query.split("&") if option.partition("=")[0] not in SIMULATION_OPTIONS]
    return f"{base}?{'&'.join(kept)}" if kept else base
