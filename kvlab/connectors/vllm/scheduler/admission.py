"""What is worth moving: loads that beat a recompute, and saves of objects that come again."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

from kvlab.stores.admission import get_rule
from kvlab.stores.reuse import ReuseCounter

MIN_PREFILL_TOKENS = 64  # a smaller step says little of what tokens cost in a large one
KEPT_RATES = 16
KEPT_ANSWERS = 64
COMPARABLE = 4
FORGET_S = 30.0  # a tier that was too slow is tried again after this long


class LoadAdmission:
    """Load if and only if ``ceil(t_load / t_step) * t_step <= num_tokens * t_token``, all of them measured.

    t_token: the median, over the latest prefills, of (seconds of the step - t_step) / its prompt tokens. The step
        itself is paid either way. Attention makes long prompts dearer than this.
    t_step: the median of the latest steps without a prefill. The engine notices a load between steps when its current
        step ends, so such a load takes whole steps while other requests run.
    t_load: tokens over the median rate of the tier's latest loads, those of less than a quarter of the tokens left out:
        they mostly measure latency.

    Without a sample of the last 30 seconds a tier is loaded from. If everything hits and no prefill was ever timed, one
    prompt every 30 seconds is computed to measure t_token. Time in vLLM's queue is not part of any sample.
    """

    def __init__(self, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.enabled = enabled
        self.is_busy = False  # other requests run, so a load between steps waits for their steps
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
            # Minus a step of the same time: a host that grows slower does not make older prefills look cheap.
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
        """A lookup in the secondary tiers found something of a prompt, or nothing."""
        self._answers.append(held)

    # ---- what follows

    def is_worth(self, num_tokens: Mapping[str, int]) -> bool:
        """Whether loading these tokens, by tier, takes no longer than computing them. Tokens of the tier `secondary`
        are loaded between steps."""
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
        """Median tokens per second over a tier's recent loads of at least `num_tokens` / 4; 0 without samples."""
        measured = self._loads.get(tier, deque())
        while measured and self._clock() - measured[0][0] > FORGET_S:
            measured.popleft()
        rates = [rate for _, size, rate in measured if size * COMPARABLE >= num_tokens]
        return median(rates) if rates else 0.0

    def _is_time_for_a_trial(self) -> bool:
        """Whether to compute a prompt that could be loaded, to measure what computing takes."""
        if len(self._loads.get("secondary", ())) < KEPT_RATES // 2 or self._clock() - self._last_trial < FORGET_S:
            return False
        self._last_trial = self._clock()
        return True


class SaveAdmission:
    """Admits an object from the n-th prompt on that contains it, as most of the traffic is seen once, if the rule
    named `store_rule` does too."""

    def __init__(self, store_threshold: int, store_rule: str = "") -> None:
        self._store_threshold = store_threshold
        self._uses = ReuseCounter()
        self._rule = get_rule(store_rule) if store_rule else None

    def is_due(self, key: bytes, end_token: int) -> bool:
        """Count a use of `key`, an object that ends with the prompt's first `end_token` tokens; whether to save it."""
        if self._store_threshold > 1 and self._uses.add(key) < self._store_threshold:
            return False
        return self._rule is None or self._rule.admit(key, end_token)
