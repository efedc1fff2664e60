"""What is worth moving: loads that beat a recompute, saves of what comes again. Measured, never configured."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

from kvlab.stores.reuse import ReuseCounter

MIN_PREFILL_TOKENS = 64  # a smaller step says little of what tokens cost in a large one
KEPT_RATES = 16
KEPT_ANSWERS = 64
COMPARABLE = 4
FORGET_S = 30.0  # a tier that was too slow is tried again after this long


class LoadAdmission:
    """Compares seconds: what a load holds up the request or the engine, against what the tokens add to a forward pass.

    A token costs the median of the latest prefills, less what a step without one took then: that is paid either way
    (and attention makes long prompts dearer than this). A tier counts with the median rate of its latest loads. One
    between steps is noticed when the step under way ends, so it takes whole steps while others are served.
    What nobody measured within half a minute is loaded, and so is what is over `COMPARABLE` times as long as all that
    was: a small load is mostly the way there and back. Where everything is loaded nothing is computed, so one prompt
    is, now and then, until it is known what that takes. Time in vLLM's queue is in nothing of this.
    """

    def __init__(self, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self.is_busy = False  # others are computing: whoever waits between steps waits for theirs
        self._clock = clock
        self._prefills: deque[float] = deque(maxlen=KEPT_RATES)  # seconds that each token added to a step
        self._steps: deque[float] = deque(maxlen=KEPT_RATES)  # seconds of steps without a prefill
        self._loads: dict[str, deque[tuple[float, int, float]]] = {}  # tier -> (when, tokens, tokens/s)
        self._answers: deque[bool] = deque(maxlen=KEPT_ANSWERS)
        self._last_trial = -math.inf

    # ---- what was measured

    def forward(self, prefill_tokens: int, seconds: float) -> None:
        """A forward pass with so many tokens of prompts took `seconds`."""
        if prefill_tokens >= MIN_PREFILL_TOKENS:
            # Less than a step of its own time: a host that grows slower does not make the prefills of before cheap.
            self._prefills.append(max(seconds - self.step_seconds(), 0.0) / prefill_tokens)
        elif prefill_tokens == 0:
            self._steps.append(seconds)

    def loaded(self, tier: str, num_tokens: int, seconds: float) -> None:
        """A load of `num_tokens` from `tier` held up the request or the engine for `seconds`."""
        if num_tokens > 0 and seconds > 0:
            self._loads.setdefault(tier, deque(maxlen=KEPT_RATES)).append(
                (self._clock(), num_tokens, num_tokens / seconds)
            )

    def answered(self, *, held: bool) -> None:
        """Secondary tiers were asked for a prompt, and held something of it or not."""
        self._answers.append(held)

    # ---- what follows

    def is_worth(self, num_tokens: Mapping[str, int]) -> bool:
        """Whether loading these tokens, by tier, takes no longer than computing them. Whatever comes from the tier
        `secondary` is loaded between steps."""
        if not self.enabled:
            return True
        total, secondary = sum(num_tokens.values()), num_tokens.get("secondary", 0)
        if not self._prefills:
            return not (secondary and total >= MIN_PREFILL_TOKENS and self._is_time_for_a_trial())
        rates = {tier: self.load_rate(tier, count) for tier, count in num_tokens.items() if count}
        seconds = sum(num_tokens[tier] / rate for tier, rate in rates.items() if rate)
        step = self.step_seconds()
        if seconds and secondary and self.is_busy and step:
            seconds = math.ceil(seconds / step) * step
        return seconds <= self.compute_seconds(total)

    def is_worth_waiting(self, num_tokens: int, seconds: float) -> bool:
        """Whether a prompt that could load up to `num_tokens` should wait `seconds` for the answer of secondary tiers:
        not where they seldom hold anything and there is little to win."""
        if not self.enabled or not self._prefills:
            return True
        share = (sum(self._answers) + 1) / (len(self._answers) + 2)
        return seconds <= share * self.compute_seconds(num_tokens)

    def is_worth_a_step(self, num_tokens: int) -> bool:
        """The same for waiting until the engine asks again: a step, if it is busy."""
        return self.is_worth_waiting(num_tokens, self.step_seconds() if self.is_busy else 0.0)

    def compute_seconds(self, num_tokens: int) -> float:
        """What `num_tokens` add to a forward pass; 0 if no prefill was measured."""
        return num_tokens * median(self._prefills) if self._prefills else 0.0

    def step_seconds(self) -> float:
        """A step without a prefill; 0 if none was measured."""
        return median(self._steps) if self._steps else 0.0

    def load_rate(self, tier: str, num_tokens: int = 0) -> float:
        """Tokens per second of a tier lately, in loads that say something of one of `num_tokens`; 0 if there was
        none."""
        measured = self._loads.get(tier, deque())
        while measured and self._clock() - measured[0][0] > FORGET_S:
            measured.popleft()
        rates = [rate for _, size, rate in measured if size * COMPARABLE >= num_tokens]
        return median(rates) if rates else 0.0

    def _is_time_for_a_trial(self) -> bool:
        """Whether to compute something so as to learn what it takes, now that this much was loaded."""
        if len(self._loads.get("secondary", ())) < KEPT_RATES // 2 or self._clock() - self._last_trial < FORGET_S:
            return False
        self._last_trial = self._clock()
        return True


class SaveAdmission:
    """Lets an object pass from the n-th prompt on that holds it: what is seen once is most of the traffic."""

    def __init__(self, store_threshold: int) -> None:
        self._store_threshold = store_threshold
        self._uses = ReuseCounter()

    def is_due(self, key: bytes) -> bool:
        """Count a sight of `key`; whether it is the n-th or a later one."""
        return self._store_threshold <= 1 or self._uses.add(key) >= self._store_threshold
