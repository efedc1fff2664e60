"""`simulate`: what a cache would do for given traffic."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kvlab.errors import ConfigError
from kvlab.simulation.belady import belady
from kvlab.simulation.cost import CostModel, Ints, Served
from kvlab.simulation.foreign import policy_of
from kvlab.simulation.generate import KINDS, generate_traffic
from kvlab.simulation.replay import Objects, Replay, TierCount, cut, replay
from kvlab.simulation.replay_connector import ConnectorRules, replay_connector
from kvlab.simulation.replay_tiers import Admission, replay_tiers
from kvlab.simulation.reuse import reuse_histogram
from kvlab.simulation.tiers import Tier, tier_and_policy
from kvlab.simulation.trace_files import load_traffic
from kvlab.simulation.traffic import Traffic, traffic_of_prompts
from kvlab.sizing import KVSize, size_calculator
from kvlab.sizing.planning import SECONDS_PER_MONTH
from kvlab.stores.eviction import EvictionPolicy, policy_class, policy_name

BOUND = "belady"
Trace = Traffic | str | Path | Sequence[Sequence[int]]
Policy = str | type[EvictionPolicy]
UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class Simulation:
    """What happened. `row` is one flat row for pandas, `tiers` one row per tier.

    Three hit rates are reported: `block_hit_rate` (blocks found / blocks asked for), `token_hit_rate` (tokens likewise)
    and `request_hit_rate` (the mean over prompts of each prompt's share of tokens found). Arrays have shape [requests].
    `held`: of each tier, the objects that it holds at the end, each by the id of its last block; not of `belady`.
    """

    row: dict[str, Any]
    tiers: list[dict[str, Any]]
    traffic: Traffic
    hit_blocks: Ints
    hit_tokens: Ints
    served: Served | None = None
    served_without: Served | None = None
    held: Sequence[Collection[int]] = field(default=(), repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One row per tier, each with the run's own columns before it."""
        return [{**self.row, **tier} for tier in self.tiers]

    def reuse(self) -> list[dict[str, int | float]]:
        """Histogram of reuse distances of the traffic, in blocks; see `kvlab.simulation.reuse`."""
        return reuse_histogram(self.traffic)

    def __repr__(self) -> str:
        return "\n".join(f"{name:>18}  {_shown(value)}" for name, value in self.row.items())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>"
            for name, value in self.row.items()
        )
        return f"<table>{cells}</table>"


def simulate(
    trace: Trace,
    tiers: Sequence[Tier | str | int] | Tier | str | int = "unbounded",
    *,
    policy: Policy | None = None,
    model: Any = None,
    serde: str | float | None = None,
    chunk_tokens: int | None = None,
    admission: Admission | int | None = None,
    cost: CostModel | None = None,
    object_bytes: Callable[[int], int] | None = None,
    connector: bool | ConnectorRules = False,
) -> Simulation:
    """What a cache of these tiers would do for `trace`; no KV is moved.

    Prompts are cut, looked up, loaded, stored and renewed as `CacheEngine` does it, on the stores' eviction classes.

    Parameters
    ----------
    trace
        a `Traffic`, the path of a published trace, a list of token prompts, or ``chat``, ``agent``, ``document``
        for made-up traffic.
    tiers
        fastest first: `Tier`, or the URL that a store or vLLM's connector takes, such as ``memory://?size=10GiB``
        or ``file:///kv?size=1TiB``, with ``gb_per_s``, ``latency_ms`` and ``per_gb_month`` among its options; or a bare
        size of host memory: ``10GiB``, ``10000 blocks``, ``unbounded``.
    policy
        an eviction policy of the stores, by name or as a class, for the tiers whose URL names none (None: ``lru``); or
        ``belady``: the bound of `kvlab.simulation.belady`, which is one on `block_hit_rate`. Several tiers are one to
        it, and what their URLs name does not count.
    model
        what `size_calculator` takes, or a `KVSize`; needed where capacities are bytes.
    serde
        raw bytes per stored byte (1.45), or the name of a serde whose ratio is fixed.
    chunk_tokens
        tokens of a stored object, as `Chunker`'s; 256, or a block of the traffic if that is larger.
    admission
        store only at the n-th use (an int), or an `Admission`.
    cost
        adds seconds and money; needs `model` or `object_bytes`.
    object_bytes
        bytes of an object of so many tokens, instead of `model`'s and `serde`'s.
    connector
        replay as vLLM's connector uses its tiers, host memory and at most one below, instead of `CacheEngine`: True at
        the connector's default settings, else the `ConnectorRules` of others. Recurrent states, sliding windows and
        blocks that prompts fill in part are not replayed.

    Raises
    ------
    ConfigError
        naming the argument
    FormatError
        naming file, line, field and value of a trace

    Examples
    --------
    >>> run = simulate("chat", "1000 blocks", policy="s3fifo")
    >>> sorted(name for name in run.row if name.endswith("hit_rate"))
    ['block_hit_rate', 'request_hit_rate', 'token_hit_rate']
    """
    if not isinstance(connector, bool | ConnectorRules):
        raise ConfigError(f"connector must be true, false or ConnectorRules, got {connector!r}")
    traffic = as_traffic(trace)
    step_tokens = chunk_tokens or default_chunk(traffic)
    objects = cut(traffic, step_tokens)
    given = [tier_and_policy(tier) for tier in ([tiers] if isinstance(tiers, Tier | str | int) else tiers)]
    if not given:
        raise ConfigError("simulate needs at least one tier, such as 'memory://?size=10GiB' or '10000 blocks'")
    stack = [tier for tier, _ in given]
    policy = "lru" if policy is None else policy
    for one in (policy, *(named for _, named in given if named)):
        if one is not policy or policy != BOUND:
            policy_class(one, also=(BOUND,))
    if (policy == BOUND or not connector) and not all(each.loads and each.saves for each in traffic.requests):
        raise ConfigError(
            f"{traffic.name} holds prompts that a cache may not serve or not keep; connector=True replays them, with "
            "the policy of a store"
        )
    rules = connector if isinstance(connector, ConnectorRules) else ConnectorRules()
    policies: list[Policy] = [BOUND] if policy == BOUND else [named or policy for _, named in given]
    ratio = serde_ratio(serde)
    sizes, in_bytes = _sizes(traffic.block_tokens, objects.step, model, ratio, object_bytes)
    capacities = [_capacity(tier, sizes, in_bytes) for tier in stack]
    if isinstance(admission, int) and not isinstance(admission, bool):
        admission = Admission(store_threshold=admission)
    if admission is not None and not isinstance(admission, Admission):
        raise ConfigError(f"admission must be a number of uses or an Admission, got {admission!r}"[:200])
    per_block = min(size / blocks for blocks, size in enumerate(sizes) if blocks)
    if policy == BOUND:
        bound = belady(traffic, int(min(sum(capacities), UNBOUNDED) // per_block))
        lent = [round(blocks * per_block) for blocks in bound.hit_blocks]
        nothing = [[0] * len(lent) for _ in stack[1:]]
        done = Replay(bound.hit_blocks, [TierCount(x, [int(y > 0) for y in x]) for x in (lent, *nothing)])
        whole = bound.hit_last
    else:
        if connector:
            done = _as_connector(traffic, objects, policies, capacities, sizes, admission, rules)
        elif len(stack) == 1 and admission is None and capacities[0] >= max(sizes):
            done = replay(objects, policy_of(policies[0]), capacities[0], sizes)
        else:
            pairs = [(policy_of(one), capacity) for one, capacity in zip(policies, capacities, strict=True)]
            tokens = traffic.num_tokens.tolist()
            done = replay_tiers(objects, pairs, sizes, tokens, admission, block_tokens=traffic.block_tokens)
        whole = [hit == asked for hit, asked in zip(done.hit_blocks, traffic.num_blocks.tolist(), strict=True)]
    hit_blocks = np.array(done.hit_blocks, np.int64)
    # The last block may be filled only in part; a hit on it counts the tokens it has.
    short = np.maximum(traffic.num_blocks * traffic.block_tokens - traffic.num_tokens, 0)
    hit_tokens: Ints = hit_blocks * traffic.block_tokens - np.where(np.array(whole, bool), short, 0)
    row: dict[str, Any] = {
        "traffic": traffic.name,
        "policy": " + ".join(dict.fromkeys(map(policy_name, policies))),
        "tiers": " + ".join(tier.label for tier in stack),
        "urls": "" if policy == BOUND else _urls(stack, policies),
        "capacity": None if any(tier.capacity is None for tier in stack) else sum(capacities),
        "unit": "bytes" if in_bytes else "blocks",
        "serde_ratio": ratio,
        "chunk_tokens": step_tokens,
        "store_threshold": admission.store_threshold if admission else 1,
        "requests": len(traffic.requests),
        "block_hit_rate": float(hit_blocks.sum() / traffic.num_blocks.sum()),
        "token_hit_rate": float(hit_tokens.sum() / traffic.num_tokens.sum()),
        "request_hit_rate": float((hit_tokens / traffic.num_tokens).mean()),
        "evictions": sum(count.evictions for count in done.tiers),
        "loaded": sum(sum(count.loaded) for count in done.tiers),
        "stored": sum(count.put_size for count in done.tiers),
    }
    if connector:
        row |= asdict(rules)
    tier_rows = [_tier_row(tier, size, count) for tier, size, count in zip(stack, capacities, done.tiers, strict=True)]
    if cost is None:
        return Simulation(row, tier_rows, traffic, hit_blocks, hit_tokens, held=done.held)
    if not in_bytes:
        raise ConfigError("a cost model needs bytes: give model=... (or object_bytes=...)")
    loaded = [np.array(count.loaded, np.int64) for count in done.tiers]
    served = cost.serve(traffic.arrivals_s, traffic.num_tokens, hit_tokens, stack, loaded)
    nothing_hit = np.zeros_like(hit_tokens)
    without = cost.serve(traffic.arrivals_s, traffic.num_tokens, nothing_hit, [], [])
    held = [count.put_size - count.evicted_size for count in done.tiers]
    row |= _seconds_and_money(cost, served, without, stack, held, traffic.duration_s)
    return Simulation(row, tier_rows, traffic, hit_blocks, hit_tokens, served, without, done.held)


def _as_connector(
    traffic: Traffic,
    objects: Objects,
    policies: Sequence[Policy],
    capacities: Sequence[int],
    sizes: list[int],
    admission: Admission | None,
    rules: ConnectorRules,
) -> Replay:
    if len(capacities) > 2 or admission is not None:
        raise ConfigError("connector=True simulates host memory and at most one tier below, without admission")
    pairs = [(policy_of(one), capacity) for one, capacity in zip(policies, capacities, strict=True)]
    return replay_connector(objects, traffic.requests, pairs, sizes, rules, block_tokens=traffic.block_tokens)


def as_traffic(trace: Trace) -> Traffic:
    """What `simulate` takes as a trace, as `Traffic`."""
    if isinstance(trace, Traffic):
        return trace
    if isinstance(trace, str) and trace in KINDS:
        return generate_traffic(trace)
    if isinstance(trace, str | Path):
        return load_traffic(trace)
    return traffic_of_prompts(trace)


def default_chunk(traffic: Traffic) -> int:
    """256 tokens, or the nearest the traffic's blocks allow."""
    return max(256 // traffic.block_tokens, 1) * traffic.block_tokens


def serde_ratio(serde: str | float | None) -> float:
    """Raw bytes per stored byte."""
    if serde is None:
        return 1.0
    if isinstance(serde, str):
        from kvlab.serde import get_serde  # loads torch

        stored = get_serde(serde).ratio()
        if stored is None:
            raise ConfigError(
                f"the ratio of serde {serde!r} depends on the KV; measure it and give the number, such as 1.45"
            )
        return 1 / stored
    if not serde > 0:
        raise ConfigError(f"serde as a ratio (raw bytes per stored byte) must be positive, got {serde}")
    return float(serde)


def _sizes(
    block_tokens: int, step: int, model: Any, ratio: float, object_bytes: Callable[[int], int] | None
) -> tuple[list[int], bool]:
    """Size of an object of 0, 1, ... `step` blocks; whether in bytes (else in blocks)."""
    if object_bytes is not None:
        return [0, *(_size(object_bytes, blocks * block_tokens) for blocks in range(1, step + 1))], True
    if model is None:
        if ratio != 1:
            raise ConfigError("a serde changes bytes: give model=... too")
        return list(range(step + 1)), False
    size = model if isinstance(model, KVSize) else size_calculator(model)
    return [max(round(size.chunk_bytes(blocks * block_tokens) / ratio), 1) for blocks in range(step + 1)], True


def _size(object_bytes: Callable[[int], int], num_tokens: int) -> int:
    size: object = object_bytes(num_tokens) if callable(object_bytes) else None
    if not isinstance(size, int | float) or isinstance(size, bool) or not 0 < size < float("inf"):
        told = f"object_bytes must be a function from tokens to bytes above 0; of {num_tokens} it gives {size!r}"
        raise ConfigError(told[:200])
    return max(round(size), 1)


def _capacity(tier: Tier, sizes: list[int], in_bytes: bool) -> int:
    if tier.capacity is None:
        return UNBOUNDED
    if tier.in_blocks:
        return tier.capacity * sizes[-1] // (len(sizes) - 1)
    if not in_bytes:
        raise ConfigError(f"a capacity in bytes ({tier.label}) needs model=..., or give it in blocks: '10000 blocks'")
    return tier.capacity


def _urls(stack: Sequence[Tier], policies: Sequence[Policy]) -> str:
    """What opens tiers like these, or nothing where a tier has no URL."""
    urls = [tier.url_with(policy) for tier, policy in zip(stack, policies, strict=True)]
    return "+".join(urls) if all(urls) else ""


def _tier_row(tier: Tier, capacity: int, count: TierCount) -> dict[str, Any]:
    return {
        "tier": tier.name,
        "tier_capacity": None if tier.capacity is None else capacity,
        "tier_loads": sum(count.num_loads),
        "tier_loaded": sum(count.loaded),
        "tier_puts": count.puts,
        "tier_stored": count.put_size,
        "tier_evictions": count.evictions,
        "tier_evicted": count.evicted_size,
    }


def _seconds_and_money(
    cost: CostModel, served: Served, without: Served, tiers: list[Tier], held: list[int], duration_s: float
) -> dict[str, float]:
    ttft, base = served.ttft_s * 1e3, without.ttft_s * 1e3
    gpu_s, gpu_s_without = float(served.compute_s.sum()), float(without.compute_s.sum())
    per_s = cost.per_gpu_hour * cost.gpus / 3600
    kept = sum(
        (size if tier.capacity is None or tier.in_blocks else tier.capacity) / 1e9 * tier.per_gb_month
        for tier, size in zip(tiers, held, strict=True)
    )
    storage = kept * duration_s / SECONDS_PER_MONTH
    return {
        "ttft_ms": float(ttft.mean()),
        "ttft_p50_ms": float(np.median(ttft)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "ttft_without_ms": float(base.mean()),
        "ttft_saved_ms": float((base - ttft).mean()),
        "gpu_s": gpu_s,
        "gpu_s_saved": gpu_s_without - gpu_s,
        "gpu_cost": gpu_s * per_s,
        "storage_cost": storage,
        "saved_cost": (gpu_s_without - gpu_s) * per_s - storage,
    }


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
