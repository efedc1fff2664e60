"""Made-up traffic of three kinds, whose reuse can be set; the same seed gives the same traffic everywhere."""

import math
import random
from dataclasses import dataclass

from kvlab.errors import ConfigError
from kvlab.simulation.traffic import Request, Traffic


@dataclass(frozen=True)
class Kind:
    """Sizes in tokens (medians of log-normal draws with the given spread) and how prompts share prefixes."""

    shared_tokens: int  # system prompt or tool list
    num_shared: int  # how many of those there are; popularity falls like 1/rank
    opening_tokens: int  # of a new conversation, task or document, beyond what is shared
    turn_tokens: int  # added by each further turn, answer included; or the question asked of a document
    output_tokens: int
    keeps_turns: bool  # a turn becomes part of the next prompt; questions about a document do not
    recency: float  # chance that a further turn belongs to one of the 16 conversations used last
    spread: float = 0.7


KINDS = {
    "chat": Kind(512, 8, 700, 350, 250, keeps_turns=True, recency=0.6),
    "agent": Kind(4096, 4, 1500, 600, 150, keeps_turns=True, recency=0.9),
    "document": Kind(256, 2, 9000, 120, 200, keeps_turns=False, recency=0.3),
}
MOST_TOKENS = 128 * 1024  # a longer conversation ends


def generate_traffic(
    kind: str = "chat",
    num_requests: int = 2000,
    *,
    reuse: float = 0.5,
    seed: int = 0,
    requests_per_s: float = 4.0,
    block_tokens: int = 16,
) -> Traffic:
    """Traffic of `kind` (chat, agent, document) of which an unbounded cache would answer about `reuse`.

    Every request either goes on with a conversation (or asks of a known document) or opens a new one, whichever brings
    the share of blocks seen before closer to `reuse`, in [0, 0.99]; what a kind cannot reach it approaches.
    Arrivals are a Poisson process.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind of traffic must be one of {', '.join(KINDS)}; got {kind!r}")
    if not 0 <= reuse <= 0.99 or num_requests < 1 or block_tokens < 1 or not requests_per_s > 0:
        raise ConfigError(
            "traffic needs reuse in [0, 0.99] and positive num_requests, block_tokens, requests_per_s; "
            f"got {reuse}, {num_requests}, {block_tokens}, {requests_per_s}"
        )
    maker = _Maker(KINDS[kind], random.Random(f"{kind}/{seed}"), block_tokens, reuse)
    now, requests = 0.0, []
    for _ in range(num_requests):
        requests.append(maker.request(now))
        now += -math.log(1 - maker.rng.random()) / requests_per_s
    return Traffic(f"{kind}, reuse {reuse:g}", block_tokens, requests)


class _Maker:
    """Only `rng.random()` is drawn from: its sequence is the same in every Python version."""

    def __init__(self, kind: Kind, rng: random.Random, block_tokens: int, reuse: float) -> None:
        self.kind, self.rng, self.block_tokens, self.reuse = kind, rng, block_tokens, reuse
        self.num_blocks = 0  # also the next new id
        self.accesses = 0
        self.shared: dict[int, list[int]] = {}
        self.open: list[list[int]] = []  # blocks of each conversation or document, most recently used last

    def request(self, now: float) -> Request:
        reused = 1 - self.num_blocks / self.accesses if self.accesses else 1.0
        prefix = self._known() if self.open and reused < self.reuse else self._opened()
        ids = prefix + self._new(self._draw(self.kind.turn_tokens))
        if self.kind.keeps_turns:
            prefix = ids
        if len(prefix) * self.block_tokens < MOST_TOKENS:
            self.open.append(prefix)
            del self.open[:-4096]
        self.accesses += len(ids)
        beyond = int(self.rng.random() * self.block_tokens)  # tokens after the last full block
        return Request(now, len(ids) * self.block_tokens + beyond, self._draw(self.kind.output_tokens), ids)

    def _known(self) -> list[int]:
        among = min(16, len(self.open)) if self.rng.random() < self.kind.recency else len(self.open)
        return self.open.pop(-1 - int(self.rng.random() * among))

    def _opened(self) -> list[int]:
        fresh = self._new(self._draw(self.kind.opening_tokens))
        kind = self.kind
        prompt = kind.shared_tokens + kind.opening_tokens + kind.turn_tokens
        if self.rng.random() >= 0.5 * self.reuse * prompt / kind.shared_tokens:  # or this alone would exceed `reuse`
            return fresh
        weights = [1 / rank for rank in range(1, kind.num_shared + 1)]
        at = self.rng.random() * sum(weights)
        which = 0
        while at >= weights[which] and which < len(weights) - 1:
            at -= weights[which]
            which += 1
        if which not in self.shared:
            self.shared[which] = self._new(kind.shared_tokens)
        return self.shared[which] + fresh

    def _new(self, tokens: int) -> list[int]:
        first = self.num_blocks
        self.num_blocks += max(tokens // self.block_tokens, 1)
        return list(range(first, self.num_blocks))

    def _draw(self, median: int) -> int:
        """Log-normal by Box and Muller."""
        radius = math.sqrt(-2 * math.log(1 - self.rng.random()))
        return max(1, round(median * math.exp(self.kind.spread * radius * math.cos(2 * math.pi * self.rng.random()))))
