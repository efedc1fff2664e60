"""Latency statistics from the benchmark client's detailed result, and how sure one can be of a difference.

Definitions are those of vLLM's ``benchmarks/serve.py``: TTFT is the first streamed message, ITL the gaps between later
ones, end to end their sum, TPOT (end to end - TTFT) / (output tokens - 1) of requests with more than one output token.
Means are over requests, ITL over all gaps; percentiles are linear; failed requests are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")
Array = np.ndarray[Any, np.dtype[np.float64]]


def samples_ms(details: Mapping[str, Any]) -> dict[str, Array]:
    """Milliseconds of each metric. `details` is the JSON of ``--save-detailed``."""
    done = [i for i, error in enumerate(details["errors"]) if not error]
    ttfts = [details["ttfts"][i] for i in done]
    itls = [details["itls"][i] for i in done]
    latencies = details.get("latencies")  # absent in vLLM 0.26
    e2els = [latencies[i] for i in done] if latencies else [t + sum(gaps) for t, gaps in zip(ttfts, itls, strict=True)]
    lens = [details["output_lens"][i] for i in done]
    tpots = [(e - t) / (n - 1) for e, t, n in zip(e2els, ttfts, lens, strict=True) if n > 1]
    gaps_ms = [gap for gaps in itls for gap in gaps]
    return {name: np.asarray(s, float) * 1e3 for name, s in zip(METRICS, (ttfts, tpots, gaps_ms, e2els), strict=True)}


def ttfts_ms(details: Mapping[str, Any]) -> list[float | None]:
    """TTFT of each request in the order sent; None where it failed."""
    return [
        None if error else round(ttft * 1e3, 3) for ttft, error in zip(details["ttfts"], details["errors"], strict=True)
    ]


def summary(details: Mapping[str, Any]) -> dict[str, float]:
    """``mean_ttft_ms``, ``median_tpot_ms``, ``std_itl_ms``, ``p99_e2el_ms`` and so on, by vLLM's names."""
    result: dict[str, float] = {}
    for name, values in samples_ms(details).items():
        some = values if values.size else np.zeros(1)
        result[f"mean_{name}_ms"] = float(some.mean())
        result[f"median_{name}_ms"] = float(np.median(some))
        result[f"std_{name}_ms"] = float(some.std())
        result[f"p99_{name}_ms"] = float(np.percentile(some, 99))
    return result


def itl_over_time(details: Mapping[str, Any], step_s: float = 1.0) -> list[tuple[float, float, float]]:
    """(seconds since the first request, median and p99 ITL in ms of the gaps that ended in that step)."""
    starts = details["start_times"]
    first = min(starts)
    ends: list[float] = []
    gaps: list[float] = []
    for start, ttft, itls, error in zip(starts, details["ttfts"], details["itls"], details["errors"], strict=True):
        if not error and itls:
            ends += (start - first + ttft + np.cumsum(itls)).tolist()
            gaps += itls
    if not gaps:
        return []
    step, values = (np.asarray(ends) // step_s).astype(int), np.asarray(gaps) * 1e3
    rows = []
    for at in np.unique(step):
        here = values[step == at]
        rows.append(
            (round(float(at) * step_s, 3), round(float(np.median(here)), 3), round(float(np.percentile(here, 99)), 3))
        )
    return rows


def reduction(
    before_ms: Sequence[float | None], after_ms: Sequence[float | None], *, resamples: int = 2000
) -> tuple[float, float, float]:
    """1 - mean(after) / mean(before), with the ends of its 95% bootstrap interval.

    Where both hold the same prompts in the same order, prompts are drawn in pairs, of those answered both times: most
    of the spread is theirs and not the cache's. Else each side is drawn for itself. None is a request that failed.
    Seeded, so that a table says the same each time it is made.
    """
    before, after = np.asarray(before_ms, float), np.asarray(after_ms, float)
    paired = before.size == after.size
    answered = ~np.isnan(before), ~np.isnan(after)
    if paired:
        answered = (answered[0] & answered[1],) * 2
    before, after = before[answered[0]], after[answered[1]]
    if not before.size or not after.size:
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    draws_before = rng.integers(0, before.size, (resamples, before.size))
    draws_after = draws_before if paired else rng.integers(0, after.size, (resamples, after.size))
    drawn = 1 - after[draws_after].mean(axis=1) / before[draws_before].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(1 - after.mean() / before.mean()), float(low), float(high)
