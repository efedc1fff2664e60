"""A tier as its URL describes it, for those who do not open it: the simulator and the size calculator.

The same URLs open stores (`open_store`) and configure vLLM (`kvlab.vllm_config`), so that what was simulated can be
used. Three options are for simulation alone: the speed and the price of a tier, which a store has by its nature.
"""

from dataclasses import dataclass
from typing import Self

from kvlab.errors import ConfigError
from kvlab.stores.url import SIMULATION_OPTIONS, StoreURL
from kvlab.units import parse_bytes

# Options of stores that change neither what a tier holds nor how long a load takes in the simulator's model.
STORE_OPTIONS = frozenset(
    {"auth", "ca_file", "check", "credentials_file", "db", "deadline_ms", "device", "direct", "endpoint", "fsync",
     "keep_first", "longest_retry_ms", "metadata", "metrics_port", "password_file", "pinned", "plugin", "profile",
     "protocol", "region", "retry_ms", "sentinel_password_file", "shared", "timeout_ms", "tls", "ttl_ms",
     "verify", "wait_ms"}
)  # fmt: skip


@dataclass(frozen=True)
class TierSpec:
    """What a tier's URL says.

    scheme, place: of the URL, without login; the place is empty for ``memory://``.
    size_bytes, size_blocks: how much it holds, in bytes or, for simulation, in blocks; both None: no limit is given.
    policy, serde: by name; None where the URL gives none.
    gb_per_s, latency_ms, per_gb_month: speed (10^9 bytes per second, milliseconds to the first byte) and price (10^9
        bytes for 30 days), or None.
    """

    scheme: str
    place: str = ""
    size_bytes: int | None = None
    size_blocks: int | None = None
    policy: str | None = None
    serde: str | None = None
    gb_per_s: float | None = None
    latency_ms: float | None = None
    per_gb_month: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a URL, or a bare size, which is host memory. Raises ConfigError.

        >>> TierSpec.parse("file:///kv?size=1TiB&gb_per_s=6").size_bytes
        1099511627776
        >>> TierSpec.parse("10000 blocks").size_blocks
        10000
        """
        if not isinstance(text, str):
            raise ConfigError(f"a tier must be a URL like memory://?size=10GiB, got {type(text).__name__}")
        if "://" not in text:
            size_bytes, size_blocks = _size(text, text)
            return cls("memory", size_bytes=size_bytes, size_blocks=size_blocks)
        url = StoreURL.parse(text)
        size_bytes, size_blocks = _size(url.take("size", "unbounded"), url.shown)
        numbers = {name: _number(url, name) for name in SIMULATION_OPTIONS}
        policy, serde = (url.take(name, "") or None for name in ("policy", "serde"))
        for name in STORE_OPTIONS:
            url.take(name, "")
        url.done()
        return cls(url.scheme, url.netloc + url.path, size_bytes, size_blocks, policy, serde, **numbers)

    @property
    def name(self) -> str:
        """The URL without login and options: ``memory://``, ``file:///kv``."""
        return f"{self.scheme}://{self.place}"


def _size(text: str, shown: str) -> tuple[int | None, int | None]:
    """Bytes and blocks, one of which is None."""
    text = text.strip()
    if text in ("unbounded", "inf"):
        return None, None
    number = text.removesuffix("blocks").strip()
    if number == text:
        return parse_bytes(text), None
    if not number.isdigit():
        raise ConfigError(f"a size in blocks must be like '10000 blocks', got {text!r} in {shown!r}")
    return None, int(number)


def _number(url: StoreURL, option: str) -> float | None:
    text = url.take(option, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{option} must be a number, got {text!r} in {url.shown!r}")
    return number
