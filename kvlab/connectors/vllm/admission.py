"""What is worth moving: loads that beat a recompute, saves of what comes again. Measured, never configured."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

from kvlab.stores.sights import Sights

MIN_PREFILL_TOKENS = 64  # a smaller step says little of the rate of a large one
KEPT_RATES = 16
COMPARABLE = 4
FORGET_S = 30.0  # a tier that was too slow is tried again after this long


class LoadAdmission:
    """Compares tokens per second: a tier's loads, by how long they held up the engine, against its forward passes.

    It errs towards loading. A tier counts with the best rate of its latest loads, a recompute with the median of the
    latest prefills (which attention makes too fast for long prompts). What nobody measured within half a minute is
    loaded, and so is what is over `COMPARABLE` times as long as all that was: a small load is mostly the way there and
    back. Time in vLLM's queue is in neither.
    """

    def __init__(self, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self._clock = clock
        self._prefills: deque[float] = deque(maxlen=KEPT_RATES)
        self._loads: dict[str, deque[tuple[float, int, float]]] = {}  # tier -> (when, tokens, tokens/s)

    def prefilled(self, num_tokens: int, seconds: float) -> None:
        """A forward pass over `num_tokens` took `seconds`."""
        if num_tokens >= MIN_PREFILL_TOKENS and seconds > 0:
            self._prefills.append(num_tokens / seconds)

    def loaded(self, tier: str, num_tokens: int, seconds: float) -> None:
        """A load of `num_tokens` from `tier` held up the request or the engine for `seconds`."""
        if num_tokens > 0 and seconds > 0:
            self._loads.setdefault(tier, deque(maxlen=KEPT_RATES)).append(
                (self._clock(), num_tokens, num_tokens / seconds)
            )

    def is_worth(self, num_tokens: Mapping[str, int]) -> bool:
        """Whether loading these tokens, by tier, takes no longer than computing them."""
        if not self.enabled or not self._prefills:
            return True
        rates = {tier: self.load_rate(tier, count) for tier, count in num_tokens.items() if count}
        seconds = sum(num_tokens[tier] / rate for tier, rate in rates.items() if rate)
        return seconds <= sum(num_tokens.values()) / self.prefill_rate()

    def prefill_rate(self) -> float:
        """Tokens per second of the engine's forward passes; 0 if none was measured."""
        return median(self._prefills) if self._prefills else 0.0

    def load_rate(self, tier: str, num_tokens: int = 0) -> float:
        """Tokens per second of a tier at its best lately, in loads that say something of one of `num_tokens`; 0 if
        there was none."""
        measured = self._loads.get(tier, deque())
        while measured and self._clock() - measured[0][0] > FORGET_S:
            measured.popleft()
        return max((rate for _, size, rate in measured if size * COMPARABLE >= num_tokens), default=0.0)


class SaveAdmission:
    """Lets an object pass from the n-th prompt on that holds it: what is seen once is most of the traffic."""

    def __init__(self, after_sights: int) -> None:
        self._after_sights = after_sights
        self._sights = Sights()

    def is_due(self, key: bytes) -> bool:
        """Count a sight of `key`; whether it is the n-th or a later one."""
        return self._after_sights <= 1 or self._sights.add(key) >= self._after_sights
