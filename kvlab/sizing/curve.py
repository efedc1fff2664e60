"""`KVCurve`: bytes of one model's KV as a function of the sequence length."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import CacheSpec, Conventions, Layer, StateKV, spec_bytes
from kvlab.sizing.model_config import ModelConfig, context_length
from kvlab.sizing.parallel import stages_of
from kvlab.units import parse_bytes, parse_tokens

_FAR = 1 << 50  # more tokens than anything holds: the bound of searches


@dataclass(frozen=True)
class KVCurve:
    """The KV of one sequence of one model: growing bytes per token, windowed parts, fixed state.

    Figures named without `rank` are sums over all `tp` ranks and `pp` stages, replicated heads and latents included;
    `rank_bytes` is what the fullest rank holds. All figures are *logical* bytes; `reserved` is what vLLM sets aside.
    `factor` (a serde's stored bytes per raw byte) scales every logical figure, rounded up to whole bytes.
    """

    config: ModelConfig
    layers: tuple[Layer, ...]
    conventions: Conventions
    tp: int = 1
    pp: int = 1
    factor: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def dtype(self) -> str:
        return self.conventions.kv.name

    @property
    def context(self) -> int | None:
        """Longest context the config declares, in tokens."""
        return context_length(self.config)

    @cached_property
    def _specs(self) -> list[tuple[CacheSpec, int]]:
        """Each distinct part as one TP rank keeps it, and how many layers keep it."""
        return [(spec.shard(self.tp), n) for spec, n in Counter(p for x in self.layers for p in x.specs).items()]

    def _scaled(self, num_bytes: int) -> int:
        return -(-num_bytes * self.factor.numerator // self.factor.denominator)

    def at(self, tokens: int | str) -> int:
        """Bytes of one sequence of `tokens` (4096, ``"32k"``), over all ranks."""
        n = parse_tokens(tokens)
        return self._scaled(self.tp * sum(spec_bytes(spec, n, self.conventions) * count for spec, count in self._specs))

    def rank_bytes(self, tokens: int | str) -> int:
        """Bytes of one sequence of `tokens` on the rank that holds most: one TP rank of the fattest PP stage."""
        n = parse_tokens(tokens)
        stages = ([p for x in stage for p in x.specs] for stage in stages_of(list(self.layers), self.pp))
        return self._scaled(
            max(sum(spec_bytes(p.shard(self.tp), n, self.conventions) for p in stage) for stage in stages)
        )

    @cached_property
    def growing_bytes(self) -> int:
        """Bytes that every further token adds for ever (not counting windows), over all ranks."""
        growing = (
            p.token_bytes(self.conventions) * n for p, n in self._specs if not p.window and p.fixed_tokens is None
        )
        return self._scaled(self.tp * sum(growing))

    @cached_property
    def windows(self) -> dict[int, int]:
        """Window in tokens -> bytes per token of the layers that keep only that many, over all ranks."""
        found: dict[int, int] = {}
        for spec, count in self._specs:
            if spec.window:
                found[spec.window] = found.get(spec.window, 0) + self.tp * spec.token_bytes(self.conventions) * count
        return {window: self._scaled(size) for window, size in sorted(found.items())}

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes that one sequence needs at any length: recurrent states, cross-attention."""
        return self.at(0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, where one number tells all; raises ConfigError saying why where none does."""
        why = []
        if self.windows:
            why.append("layers keep a window of " + ", ".join(f"{w:,}" for w in self.windows) + " tokens only")
        if self.fixed_bytes:
            why.append(f"{self.fixed_bytes:,} bytes are fixed per sequence")
        if why:
            raise ConfigError(
                f"{self.name} has no single number of bytes per token: {' and '.join(why)}; "
                f"use at(n), or growing_bytes ({self.growing_bytes:,})"
            )
        return self.growing_bytes

    @property
    def replication(self) -> float:
        """Bytes over all TP ranks, divided by the bytes that one rank would hold alone."""
        n = 1 << 20
        alone = sum(spec_bytes(spec, n, self.conventions) for layer in self.layers for spec in layer.specs)
        return self.tp * sum(spec_bytes(spec, n, self.conventions) * count for spec, count in self._specs) / alone

    def chunk_bytes(self, tokens: int | str = 256) -> int:
        """Bytes of a stored chunk from whose end a model can go on: KV of its tokens, plus states where there are."""
        return self.at(tokens)

    def max_tokens(self, memory: int | str, *, per_rank: bool = False) -> int:
        """Longest sequence that `memory` (bytes, ``"80GiB"``) holds; `per_rank`: each rank has that much.

        0 where not even the fixed part fits. Raises ConfigError where the size stops growing, so that no longest is.
        """
        budget = parse_bytes(memory)
        size = self.rank_bytes if per_rank else self.at
        if not self.growing_bytes and size(_FAR) <= budget:
            raise ConfigError(f"{self.name} never needs more than {size(_FAR):,} bytes; any number of tokens fits")
        return _largest(lambda n: size(n) <= budget)

    def max_sequences(self, memory: int | str, tokens: int | str, *, per_rank: bool = False) -> int:
        """How many sequences of `tokens` each fit into `memory`; `per_rank`: each rank has that much."""
        each = self.rank_bytes(tokens) if per_rank else self.at(tokens)
        if each == 0:
            raise ConfigError(f"sequences of {tokens} tokens need no memory at all; give a positive number of tokens")
        return parse_bytes(memory) // each

    @property
    def has_state(self) -> bool:
        """Whether some layer keeps a recurrent state."""
        return any(isinstance(spec, StateKV) for layer in self.layers for spec in layer.specs)


def _largest(fits: Callable[[int], bool]) -> int:
    """Largest n with fits(n), for a monotone `fits`; 0 where not even 1 fits."""
    low, high = 0, 1
    while high < _FAR and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
