"""From hits to seconds and money: a stated model, nothing hidden.

    TTFT = wait + overhead + load + prefill
    load = sum over the tiers read from of latency + bytes / bandwidth
    prefill(h -> n) = a (n - h) + b (n^2 - h^2)    h tokens loaded, n in the prompt, one at least is computed

``a`` and ``b`` come from a measured rate, from FLOPs, or from measured TTFTs (`fit_prefill`). Loading and computing do
not overlap, chunks are not computed while others load, and a request that is being decoded slows no other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlab.errors import ConfigError
from kvlab.simulation.tiers import Tier
from kvlab.sizing import KVSize

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prefill:
    """Seconds to compute a prompt: `s_per_token` a, and `s_per_token2` b for attention."""

    s_per_token: float
    s_per_token2: float = 0.0

    def __post_init__(self) -> None:
        if not self.s_per_token > 0 or self.s_per_token2 < 0:
            raise ConfigError(
                f"prefill needs s_per_token > 0, s_per_token2 >= 0; got {self.s_per_token}, {self.s_per_token2}"
            )

    @classmethod
    def at_rate(cls, tokens_per_s: float) -> "Prefill":
        """From a measured rate, for prompts of any length."""
        if not tokens_per_s > 0:
            raise ConfigError(f"tokens_per_s must be positive, got {tokens_per_s}")
        return cls(1 / tokens_per_s)

    @classmethod
    def from_flops(cls, size: KVSize, num_params: float, flops: float, mfu: float) -> "Prefill":
        """From `flops` per second of which the share `mfu` is reached; the work is that of `KVSize.breakeven`."""
        short, long = 1 << 10, 1 << 20
        one, other = (
            size.breakeven(tokens=n, flops=flops, mfu=mfu, num_params=num_params).prefill_s for n in (short, long)
        )
        b = (other / long - one / short) / (long - short)
        return cls(one / short - b * short, max(b, 0.0))

    def seconds(self, num_tokens: Ints, start: Ints | int = 0) -> Floats:
        """Seconds to compute tokens `start` to `num_tokens` of each prompt."""
        n, h = np.asarray(num_tokens, np.float64), np.asarray(start, np.float64)
        return np.asarray(self.s_per_token * (n - h) + self.s_per_token2 * (n * n - h * h), np.float64)


def fit_prefill(
    measured: Sequence[tuple[int, float]], size: KVSize, num_params: float, flops: float
) -> tuple[Prefill, float, float]:
    """The model's two unknowns from measured (tokens, TTFT in ms) of computed prompts, by least relative squares.

    Returns the prefill, the overhead in ms and the share of `flops` reached. Needs two lengths.
    """
    tokens, ms = np.array([n for n, _ in measured], np.int64), np.array([t for _, t in measured], np.float64)
    if len(set(tokens.tolist())) < 2:
        raise ConfigError(f"fit_prefill needs TTFTs of two lengths or more, got {len(set(tokens.tolist()))}")
    at_peak = Prefill.from_flops(size, num_params, flops, 1.0)
    columns = np.stack([np.ones(len(ms)), at_peak.seconds(tokens) * 1e3], axis=1) / ms[:, None]
    overhead_ms, per_peak = (float(x) for x in np.linalg.lstsq(columns, np.ones(len(ms)), rcond=None)[0])
    if per_peak <= 0:
        raise ConfigError("measured TTFTs do not grow with the prompt; no prefill speed fits them")
    return Prefill(at_peak.s_per_token * per_peak, at_peak.s_per_token2 * per_peak), overhead_ms, 1 / per_peak


def fit_tier(measured: Sequence[tuple[int, float]], name: str = "memory") -> Tier:
    """An unbounded tier as fast as measured (bytes, ms of loading them) say, by least relative squares.

    What an engine does for every hit besides moving bytes becomes latency. Needs two sizes.
    """
    size, ms = np.array([b for b, _ in measured], np.float64), np.array([t for _, t in measured], np.float64)
    if len(set(size.tolist())) < 2:
        raise ConfigError(f"fit_tier needs loads of two sizes or more, got {len(set(size.tolist()))}")
    columns = np.stack([np.ones(len(ms)), size / 1e6], axis=1) / ms[:, None]
    latency_ms, ms_per_mb = (float(x) for x in np.linalg.lstsq(columns, np.ones(len(ms)), rcond=None)[0])
    if ms_per_mb <= 0:
        raise ConfigError("measured loads do not grow with their bytes; no bandwidth fits them")
    return Tier(None, name, gb_per_s=1 / ms_per_mb, latency_ms=max(latency_ms, 0.0))


@dataclass(frozen=True)
class CostModel:
    """Seconds and money of serving.

    Parameters
    ----------
    overhead_ms
        of every request, computed or loaded.
    only_if_faster
        load a hit only where that beats computing it.
    servers
        engines that take requests one after the other, in order of arrival; 0: no waiting.
    per_gpu_hour, gpus
        price of one GPU for an hour, and GPUs per engine. Only seconds of computing are charged.
    """

    prefill: Prefill
    overhead_ms: float = 0.0
    only_if_faster: bool = False
    servers: int = 0
    per_gpu_hour: float = 0.0
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.overhead_ms < 0 or self.servers < 0 or self.per_gpu_hour < 0 or self.gpus < 1:
            raise ConfigError(
                "cost model needs overhead_ms, servers, per_gpu_hour >= 0 and gpus >= 1; "
                f"got {self.overhead_ms}, {self.servers}, {self.per_gpu_hour}, {self.gpus}"
            )

    def serve(
        self,
        arrivals_s: Floats,
        num_tokens: Ints,
        hit_tokens: Ints,
        tiers: Sequence[Tier],
        loaded_bytes: Sequence[Ints],
    ) -> "Served":
        """Serve prompts of which `hit_tokens` are loaded, `loaded_bytes[i]` of them from tier i. Arrays [requests]."""
        load_s = np.zeros(len(num_tokens))
        for tier, num_bytes in zip(tiers, loaded_bytes, strict=True):
            load_s += np.where(num_bytes > 0, tier.latency_ms / 1e3 + num_bytes / (tier.gb_per_s * 1e9), 0.0)
        rest_s = self.prefill.seconds(num_tokens, np.minimum(hit_tokens, num_tokens - 1))
        if self.only_if_faster:
            whole_s = self.prefill.seconds(num_tokens)
            worth = load_s + rest_s < whole_s
            load_s, rest_s = np.where(worth, load_s, 0.0), np.where(worth, rest_s, whole_s)
        service_s = self.overhead_ms / 1e3 + load_s + rest_s
        wait_s = waits(arrivals_s, service_s, self.servers) if self.servers else np.zeros(len(service_s))
        return Served(wait_s + service_s, rest_s)


@dataclass(frozen=True)
class Served:
    """Per request: time to first token, and seconds of it that a GPU computes."""

    ttft_s: Floats
    compute_s: Floats


def waits(arrivals_s: Floats, service_s: Floats, servers: int) -> Floats:
    """Seconds each request waits for one of `servers`, first come first served."""
    free = [0.0] * servers
    waited = np.zeros(len(arrivals_s))
    for index, (arrival, service) in enumerate(zip(arrivals_s.tolist(), service_s.tolist(), strict=True)):
        start = max(arrival, free[0])
        waited[index] = start - arrival
        heapq.heapreplace(free, start + service)
    return waited
