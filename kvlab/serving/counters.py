"""What the server says of its cache: counters from /metrics, and the log lines that tell of each load."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SAMPLE = re.compile(r"^(vllm:\w+?)(?:_total)?(?:\{(.*)\})? ([-+.\deEinfNa]+)$")
_SOURCE = re.compile(r'source="([^"]*)"')
_LINE = re.compile(r"Retrieved (\d+) of (\d+) tokens, ([\d.]+) MB, ([\d.]+) ms, [\d.]+ GB/s \(([^)]*)\)(?: for (\S+))?")
_LMCACHE_LINE = re.compile(
    r"\[req_id=(\S+)\] Retrieved (\d+) out of \d+ required tokens \(from (\d+) total tokens\)\."
    r" size: ([\d.]+) gb, cost ([\d.]+) ms"
)
COUNTERS = (
    "vllm:external_prefix_cache_queries",
    "vllm:external_prefix_cache_hits",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_by_source",
    "vllm:num_preemptions",
)


@dataclass(frozen=True)
class Load:
    """One request's hit, as the connector logged it; bytes and milliseconds run to the end of the copy."""

    hit_tokens: int
    prompt_tokens: int
    num_bytes: int
    ms: float
    tier: str
    request_id: str


def read_counters(metrics: str) -> dict[str, float]:
    """Sums over engines of the counters above, from the text of /metrics; by-source ones are ``NAME/SOURCE``."""
    sums: dict[str, float] = {}
    for line in metrics.splitlines():
        found = _SAMPLE.match(line)
        if found is None or found[1] not in COUNTERS:
            continue
        source = _SOURCE.search(found[2] or "")
        name = found[1].removeprefix("vllm:") + (f"/{source[1]}" if source else "")
        sums[name] = sums.get(name, 0.0) + float(found[3])
    return sums


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    """What was counted in between."""
    return {name: round(value - before.get(name, 0.0)) for name, value in after.items()}


def read_loads(log: str) -> list[Load]:
    """The loads that kvlab or LMCache told of in a piece of the server's log, in order."""
    loads = [
        Load(int(m[1]), int(m[2]), round(float(m[3]) * 1e6), float(m[4]), m[5], m[6] or "") for m in _LINE.finditer(log)
    ]
    loads += [
        Load(int(m[2]), int(m[3]), round(float(m[4]) * 2**30), float(m[5]), "lmcache", m[1])
        for m in _LMCACHE_LINE.finditer(log)
    ]
    return loads


def hits_by_prompt(loads: Iterable[Load], prompt_lens: Sequence[int], prefix: str) -> list[int]:
    """Tokens loaded for each prompt of the run, 0 where none were. Request ids say which prompt a load is of."""
    hits = [0] * len(prompt_lens)
    number = re.compile(re.escape(prefix) + r"(\d+)")
    for load in loads:
        if (found := number.search(load.request_id)) and int(found[1]) < len(hits):
            hits[int(found[1])] = max(hits[int(found[1])], load.hit_tokens)
    return hits


def by_tier(loads: Iterable[Load]) -> dict[str, dict[str, Any]]:
    """Loads, tokens, bytes, milliseconds and GB/s (10^9 bytes) of each tier."""
    tiers: dict[str, dict[str, Any]] = {}
    for load in loads:
        row = tiers.setdefault(load.tier, {"loads": 0, "tokens": 0, "bytes": 0, "ms": 0.0})
        row["loads"] += 1
        row["tokens"] += load.hit_tokens
        row["bytes"] += load.num_bytes
        row["ms"] = round(row["ms"] + load.ms, 3)
    for row in tiers.values():
        row["gb_per_s"] = round(row["bytes"] / max(row["ms"], 1e-6) / 1e6, 3)
    return tiers
