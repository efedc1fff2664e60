"""From bytes to plans: what fits a tier, where loading beats recomputing, what keeping costs."""

from dataclasses import dataclass

from kvlab.errors import ConfigError
from kvlab.sizing.curve import KVCurve
from kvlab.sizing.model_config import hidden_size, num_heads
from kvlab.stores.spec import TierSpec

REDIS_VALUE_LIMIT = 512 * 2**20  # proto-max-bulk-len, the largest value a Redis server accepts by default
SECONDS_PER_MONTH = 30 * 24 * 3600


@dataclass(frozen=True)
class TierPlan:
    """What a tier of `size_bytes` holds: whole chunks, and sessions of `session_tokens` cut into chunks."""

    tier: str
    size_bytes: int
    chunk_tokens: int
    chunk_bytes: int
    chunks: int
    tokens: int
    session_tokens: int
    session_bytes: int
    sessions: int
    fits_redis_value: bool


def plan_tier(size: KVCurve, tier: TierSpec, session_tokens: int, chunk_tokens: int) -> TierPlan:
    """Fill one tier. A session is stored as full chunks and a tail; each ends with a state where there are states.

    `fits_redis_value` tells whether one chunk stays within Redis's default 512 MB value limit.
    """
    if chunk_tokens < 1 or session_tokens < 1:
        raise ConfigError(f"chunk and session must be at least one token, got {chunk_tokens} and {session_tokens}")
    size_bytes = tier.size_bytes
    if size_bytes is None:
        raise ConfigError(f"{tier.name} needs a size in bytes to be planned, such as {tier.name}?size=64GiB")
    chunk_bytes = size.chunk_bytes(chunk_tokens)
    full, tail = divmod(session_tokens, chunk_tokens)
    session_bytes = full * chunk_bytes + (size.chunk_bytes(tail) if tail else 0)
    chunks = size_bytes // chunk_bytes
    return TierPlan(
        tier=tier.name,
        size_bytes=size_bytes,
        chunk_tokens=chunk_tokens,
        chunk_bytes=chunk_bytes,
        chunks=chunks,
        tokens=chunks * chunk_tokens,
        session_tokens=session_tokens,
        session_bytes=session_bytes,
        sessions=size_bytes // session_bytes,
        fits_redis_value=chunk_bytes <= REDIS_VALUE_LIMIT,
    )


@dataclass(frozen=True)
class Breakeven:
    """Loading `tokens` wins where the way is faster than `bytes_per_s` (10^9 bytes are 1 GB)."""

    tokens: int
    prefill_s: float
    kv_bytes: int
    latency_s: float

    @property
    def bytes_per_s(self) -> float:
        if self.prefill_s <= self.latency_s:
            return float("inf")  # the latency alone takes longer than computing
        return self.kv_bytes / (self.prefill_s - self.latency_s)

    def load_s(self, bytes_per_s: float) -> float:
        """Seconds to load the KV over a way of `bytes_per_s`."""
        return self.latency_s + self.kv_bytes / bytes_per_s

    def speedup(self, bytes_per_s: float) -> float:
        """Times faster than computing, over a way of `bytes_per_s`."""
        return self.prefill_s / self.load_s(bytes_per_s)


def breakeven(
    size: KVCurve,
    prefill_tokens_per_s: float | None = None,
    *,
    tokens: int = 4096,
    flops: float | None = None,
    mfu: float = 0.5,
    num_params: float | None = None,
    latency_s: float = 0.0,
) -> Breakeven:
    """Bandwidth at which loading the KV of `tokens` takes as long as prefilling them.

    Give the measured `prefill_tokens_per_s`, or `flops` (per second, all ranks), `mfu` and `num_params` (active ones):
    then prefill is (2 * num_params * n + 2 * layers * heads * head_dim * n^2) / (flops * mfu), the second term being
    causal attention over the layers that attend to everything.
    """
    if tokens < 1:
        raise ConfigError(f"tokens must be positive, got {tokens}")
    if prefill_tokens_per_s is not None:
        if not prefill_tokens_per_s > 0:
            raise ConfigError(f"prefill_tokens_per_s must be positive, got {prefill_tokens_per_s}")
        prefill_s = tokens / prefill_tokens_per_s
    elif flops and num_params and mfu > 0:
        work = 2 * num_params * tokens + 2 * _attention_width(size) * tokens**2
        prefill_s = work / (flops * mfu)
    else:
        raise ConfigError("breakeven needs prefill_tokens_per_s, or flops and num_params (and mfu)")
    return Breakeven(tokens, prefill_s, size.at(tokens), latency_s)


def _attention_width(size: KVCurve) -> int:
    """Sum over fully attending layers of heads x head_dim, the factor of the n^2 term."""
    full = sum(1 for layer in size.layers if layer.kind.startswith(("full", "MLA", "MTP")))
    config = size.config
    width = config.get("head_dim")
    return full * (num_heads(config) * width if isinstance(width, int) else hidden_size(config))


@dataclass(frozen=True)
class Cost:
    """Money for keeping one sequence's KV against computing it again."""

    kv_bytes: int
    prefill_s: float
    recompute: float
    store_per_month: float

    @property
    def breakeven_reuses_per_month(self) -> float:
        """Reuses per month above which keeping is cheaper than recomputing."""
        return self.store_per_month / self.recompute


def cost(
    size: KVCurve, tokens: int, *, per_gb_month: float, per_gpu_hour: float, prefill_tokens_per_s: float, gpus: int = 1
) -> Cost:
    """Prices in any currency: `per_gb_month` for 10^9 bytes kept a month, `per_gpu_hour` for each of `gpus`."""
    for label, value in (
        ("per_gpu_hour", per_gpu_hour),
        ("prefill_tokens_per_s", prefill_tokens_per_s),
        ("gpus", gpus),
    ):
        if not value > 0:
            raise ConfigError(f"{label} must be positive, got {value}")
    if per_gb_month < 0 or tokens < 1:
        raise ConfigError(f"per_gb_month must not be negative and tokens positive, got {per_gb_month} and {tokens}")
    kv_bytes, prefill_s = size.at(tokens), tokens / prefill_tokens_per_s
    return Cost(kv_bytes, prefill_s, prefill_s * gpus * per_gpu_hour / 3600, kv_bytes / 1e9 * per_gb_month)
