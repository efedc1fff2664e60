"""Which level to send by a deadline: CacheGen's Algorithm 1 (arXiv 2310.07240, section 5.3).

Before each chunk: if recomputing all that is left from its text fits the time left, do that (no loss at all); else
take the best level of which everything left arrives in time at the bandwidth seen last; else the smallest. Pure
arithmetic on sizes and seconds, so the engine and a notebook use the same function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvlab.errors import ConfigError

RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Choice:
    """What was chosen for one chunk: a level's name or ``recompute``, and the seconds from start to its arrival."""

    level: str
    done_s: float


def choose_level(
    sizes: Sequence[dict[str, int]], remaining_s: float, bytes_per_s: float, recompute_s: float | None
) -> str:
    """The level for the next chunk.

    `sizes` has one dict per chunk left: bytes by level name, best level first (all with the same names).
    `recompute_s` is how long all chunks left would take from text, None where that is no choice.
    """
    if not sizes or not sizes[0] or not bytes_per_s > 0:
        raise ConfigError(f"choosing a level needs a chunk with levels and a bandwidth above 0, got {bytes_per_s}")
    if recompute_s is not None and recompute_s <= remaining_s:
        return RECOMPUTE
    levels = list(sizes[0])
    for level in levels:
        if sum(chunk[level] for chunk in sizes) / bytes_per_s <= remaining_s:
            return level
    return levels[-1]


def stream(
    sizes: Sequence[dict[str, int]],
    trace: Sequence[tuple[float, float]],
    deadline_s: float,
    recompute_s: Sequence[float] | None = None,
    first_guess: float | None = None,
) -> list[Choice]:
    """Run all chunks over a bandwidth trace and return what was chosen and when each was there.

    `trace` is (from second, bytes per second), rising; the last goes on for ever. The bandwidth believed for a
    chunk is what the one before it saw, at first `first_guess` (default: the trace's own first value).
    """
    if not trace or any(rate <= 0 for _, rate in trace) or trace[0][0] > 0:
        raise ConfigError("a trace must begin at second 0 and every bandwidth be above 0")
    now, believed = 0.0, first_guess or trace[0][1]
    choices = []
    for index in range(len(sizes)):
        left = sum(recompute_s[index:]) if recompute_s is not None else None
        level = choose_level(sizes[index:], deadline_s - now, believed, left)
        if level == RECOMPUTE and recompute_s is not None:
            now += recompute_s[index]
        else:
            started = now
            now = _arrival(trace, now, sizes[index][level])
            believed = sizes[index][level] / (now - started) if now > started else believed
        choices.append(Choice(level, now))
    return choices


def _arrival(trace: Sequence[tuple[float, float]], start: float, num_bytes: float) -> float:
    """When `num_bytes` sent from second `start` have arrived."""
    now, left = start, float(num_bytes)
    for index, (_, rate) in enumerate(trace):
        end = trace[index + 1][0] if index + 1 < len(trace) else float("inf")
        if end <= now:
            continue
        if left <= (end - now) * rate:
            return now + left / rate
        left -= (end - now) * rate
        now = end
    return now
