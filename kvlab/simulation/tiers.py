"""A tier as the simulator sees it: how much it holds, how fast it is, what it costs."""

from dataclasses import dataclass, replace

from kvlab.errors import ConfigError
from kvlab.units import format_bytes, parse_bytes

# GB/s and ms of known kinds, for first answers; measure your own and pass Tier(...) instead. Memory: one H100's
# staged copies over PCIe 5 (data/published/h100_peers.json). Disk: one NVMe drive on PCIe 4. Redis: one TCP connection.
SPEEDS = {"memory": (50.0, 0.1), "disk": (6.0, 0.5), "redis": (1.0, 1.0)}


@dataclass(frozen=True)
class Tier:
    """Where KV is kept.

    Parameters
    ----------
    capacity : bytes, or blocks of the traffic where `in_blocks`; None is unbounded.
    gb_per_s, latency_ms : reading from it, 10^9 bytes per second, and the time before the first byte.
    per_gb_month : price of 10^9 bytes for 30 days, in any currency.
    """

    capacity: int | None = None
    name: str = "memory"
    in_blocks: bool = False
    gb_per_s: float = SPEEDS["memory"][0]
    latency_ms: float = SPEEDS["memory"][1]
    per_gb_month: float = 0.0

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


def as_tier(given: "Tier | str | int") -> Tier:
    """A Tier, or from ``10GiB``, ``10000 blocks``, ``unbounded``, each with a kind before it: ``disk:1TiB``.

    >>> as_tier("disk:1TiB").gb_per_s
    6.0
    """
    if isinstance(given, Tier):
        return given
    if isinstance(given, int):
        return Tier(parse_bytes(given))
    kind, colon, size = given.partition(":") if isinstance(given, str) else ("", "", "")
    if not colon:
        kind, size = "memory", str(given)
    if kind not in SPEEDS:
        raise ConfigError(f"kind of tier must be one of {', '.join(SPEEDS)}; got {kind!r} in {given!r}")
    gb_per_s, latency_ms = SPEEDS[kind]
    tier = Tier(None, kind, gb_per_s=gb_per_s, latency_ms=latency_ms)
    size = size.strip()
    if size in ("unbounded", "inf"):
        return tier
    number = size.removesuffix("blocks").strip()
    if number != size:
        if not number.isdigit():
            raise ConfigError(f"a capacity in blocks must be like '10000 blocks', got {given!r}")
        return replace(tier, capacity=int(number), in_blocks=True)
    return replace(tier, capacity=parse_bytes(size))
