"""TTFT as a cost model predicts it, beside what was measured; and why, where they are apart."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kvlab.simulation.cost import CostModel
from kvlab.simulation.tiers import Tier
from kvlab.sizing import KVSize

TOLERANCE = 0.15
SPREAD = 0.05  # a median no further than this above the least repeat is no noise
COMPUTED, LOADED = "none", "kvlab"  # backends of data/measured/gpu_ttft.csv: nothing cached, all in the memory tier


def latest(rows: Iterable[Mapping[str, Any]], *backends: str) -> list[Mapping[str, Any]]:
    """The last measured row of each of `backends` and each length, by length."""
    last = {(row["backend"], int(row["tokens"])): row for row in rows if row["backend"] in backends}
    return [last[key] for key in sorted(last, key=lambda key: (backends.index(key[0]), key[1]))]


def predict(
    rows: Iterable[Mapping[str, Any]], cost: CostModel, tier: Tier, size: KVSize, *, block_tokens: int = 16
) -> list[dict[str, Any]]:
    """One row for each computed or loaded row of gpu_ttft.csv: `predicted_ms`, `measured_ms` (its median), `error`,
    and `why`, empty where they are within `TOLERANCE`.

    A hit ends at the last block before the prompt's last token: vLLM computes one token at least.
    """
    told = []
    for row in latest(rows, COMPUTED, LOADED):
        tokens, measured = int(row["tokens"]), float(row["ttft_ms_median"])
        hit = (tokens - 1) // block_tokens * block_tokens if row["backend"] == LOADED else 0
        one = np.array([tokens]), np.array([hit]), [tier], [np.array([hit * size.bytes_per_token])]
        predicted = float(cost.serve(np.zeros(1), *one).ttft_s[0]) * 1e3
        fixed = cost.overhead_ms + (tier.latency_ms if hit else 0.0)
        error = predicted / measured - 1
        why = "" if abs(error) <= TOLERANCE else _why(row, predicted, fixed)
        shown = {"how": "loaded" if hit else "computed", "tokens": tokens, "fixed_ms": fixed}
        told.append({**shown, "predicted_ms": predicted, "measured_ms": measured, "error": error, "why": why})
    return told


def _why(row: Mapping[str, Any], predicted: float, fixed: float) -> str:
    """One sentence, from the row's own spread and the model's own parts."""
    measured, least = float(row["ttft_ms_median"]), float(row["ttft_ms_min"])
    work = "loading" if row["backend"] == LOADED else "computing"
    grown = predicted - fixed  # what the model takes to grow with the prompt
    if measured > predicted:
        if abs(predicted / least - 1) <= TOLERANCE and measured / least - 1 >= SPREAD:
            return (
                f"noise: the least of {row['repeats']} repeats, {least:.1f} ms, is {predicted / least - 1:+.0%} off; "
                f"their median is {measured / least - 1:.0%} above it"
            )
        return (
            f"not in the model: even the least of {row['repeats']} repeats took {least - predicted:.1f} ms more than "
            f"{work} and the fixed {fixed:.1f} ms"
        )
    if measured < fixed:
        return f"the fixed cost is too high here: it is {fixed:.1f} ms, the whole request took {measured:.1f} ms"
    if work == "loading" and measured >= grown:
        return (
            f"overlap: the model adds the fixed {fixed:.1f} ms and the load's {grown:.1f} ms; "
            f"both fit into what was measured if {predicted - measured:.1f} ms go by side by side"
        )
    return f"{work} was {grown / (measured - fixed):.2f} times as fast as the rate assumed, if the fixed cost is right"
